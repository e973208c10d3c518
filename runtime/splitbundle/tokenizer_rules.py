"""What a tokenizer.json must be before the library that runs it sees it: ``spec/v1/bundle.md``, section "text"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from splitbundle import files, strict_json
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.fields import escape

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle

MAX_MARKS: Final = 2**23
"""See ``strict_json.MAX_MARKS``: half a million merges of two tokens each have some two million."""
MODELS: Final = ("BPE", "Unigram", "WordLevel", "WordPiece")
HINT: Final = "The model can't be given such a token: its tokenizer is another model's, or was changed after training"


def read(bundle: Bundle, path: str) -> bytes:
    """A bundle's tokenizer.json, hashed and judged.

    Raises:
        BundleError: ``file.*`` where it isn't the listed file; as for ``check``.
    """
    data = files.read_listed(bundle.path, path, bundle.manifest.files[path], files.MAX_TEXT_BYTES)
    check(data, path, bundle.architecture.vocab_size)
    return data


def check(data: bytes, path: str, vocab_size: int) -> None:
    """Judges a tokenizer.json for a model that has ``vocab_size`` token ids.

    Raises:
        BundleError: ``json.*``; ``text.tokenizer`` for an id that the model hasn't or that two tokens have, or where
            there is no vocabulary.
    """
    document = strict_json.parse(data, path, max_bytes=files.MAX_TEXT_BYTES, max_marks=MAX_MARKS)
    owners: dict[int, str] = {}
    for pointer, token, number in _tokens(document, path):
        _check_id(number, pointer, path, vocab_size)
        if owners.setdefault(number, token) != token:
            raise _problem(
                path, pointer, "an id that no other token has", f"{number}, that of {quoted(owners[number])}"
            )
    for pointer, number in _inserted(document, path):
        _check_id(number, pointer, path, vocab_size)


def _check_id(number: object, pointer: str, path: str, vocab_size: int) -> None:
    if type(number) is not int or not 0 <= number < vocab_size:
        wanted = f"a token id from 0 to {vocab_size - 1}, as the model has {vocab_size}"
        raise _problem(path, pointer, wanted, quoted(number), HINT)


def _tokens(document: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Every token with its pointer and its id: the vocabulary's, then those that were added to it."""
    model = _member(document, path, "", "model", dict)
    kind = model.get("type")
    if kind not in MODELS:
        raise _problem(path, "/model/type", f"one of {', '.join(MODELS)}", quoted(kind))
    known: dict[str, Any] = {}
    if kind == "Unigram":  # (token, score); the place in the list is the id
        for number, entry in enumerate(_member(model, path, "/model", "vocab", list)):
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise _problem(path, f"/model/vocab/{number}", "a token and its score", quoted(entry))
            known[entry[0]] = number
            yield f"/model/vocab/{number}", entry[0], number
    else:
        known = _member(model, path, "/model", "vocab", dict)
        for token, number in known.items():
            yield f"/model/vocab/{escape(token)}", token, number
    added: dict[str, Any] = {}
    for i, entry in enumerate(_list(document, path, "", "added_tokens")):
        at = f"/added_tokens/{i}"
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise _problem(path, at, "an object with a token's content and id", quoted(entry))
        token, given = entry["content"], entry.get("id")
        of = known.get(token, added.setdefault(token, given))
        if given != of and type(given) is int:
            raise _problem(path, f"{at}/id", f"{quoted(of)}, the id that the token has already", quoted(given))
        yield f"{at}/id", token, given


def _inserted(document: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Ids that are put in by number: those before, after and between texts, and those of padding."""
    padding = document.get("padding")
    if isinstance(padding, dict):
        yield "/padding/pad_id", padding.get("pad_id")
    processor = document.get("post_processor")
    several = processor.get("processors") if isinstance(processor, dict) else None
    found = [("/post_processor", processor)] if not isinstance(several, list) else []
    found += [(f"/post_processor/processors/{i}", each) for i, each in enumerate(several or ())]
    for at, each in found:
        if not isinstance(each, dict):
            continue
        for name in ("cls", "sep"):  # (token, id)
            pair = each.get(name)
            if isinstance(pair, list) and len(pair) == 2:
                yield f"{at}/{name}/1", pair[1]
        special = each.get("special_tokens")
        for token, entry in special.items() if isinstance(special, dict) else ():
            ids = entry.get("ids") if isinstance(entry, dict) else None
            for i, number in enumerate(ids if isinstance(ids, list) else ()):
                yield f"{at}/special_tokens/{escape(token)}/ids/{i}", number


def _member(value: Any, path: str, at: str, name: str, kind: type) -> Any:
    member = value.get(name) if isinstance(value, dict) else None
    if not isinstance(member, kind):
        what = "an object" if kind is dict else "an array"
        raise _problem(path, f"{at}/{name}", what, quoted(member))
    return member


def _list(value: Any, path: str, at: str, name: str) -> list[Any]:
    found: list[Any] = [] if value.get(name) is None else _member(value, path, at, name, list)
    return found


def _problem(path: str, pointer: str, expected: str, got: str, hint: str | None = None) -> BundleError:
    return BundleError(
        Problem(code="text.tokenizer", file=path, pointer=pointer, expected=expected, got=got, hint=hint)
    )
