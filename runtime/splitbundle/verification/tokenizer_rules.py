"""Check a tokenizer.json before the library ``tokenizers`` loads it: ``spec/v1/bundle.md``, section "text"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.fields import escape
from splitbundle.storage import files

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

MAX_MARKS: Final = 2**23
"""See ``strict_json.MAX_MARKS``. Half a million merges of two tokens each have some two million marks."""
MAX_INSERTED: Final = 1024
MAX_GROWTH: Final = 1024
MAX_ID: Final = 2**32 - 1
MODELS: Final = ("BPE", "Unigram", "WordLevel", "WordPiece")
HINT: Final = "The model has no such token: the tokenizer belongs to another model, or was changed after training"
WHOLE: Final = "Fetch the file again, or save it with the library tokenizers"


def read(bundle: BundleReader, path: str) -> bytes:
    """Return the bytes of a bundle's tokenizer.json after checking its digest and its contents.

    Raises:
        BundleError: ``file.*`` if it isn't the listed file; as for ``check``.
    """
    data = files.read_listed(bundle.path, path, bundle.manifest.files[path], files.MAX_TEXT_BYTES)
    check(data, path, bundle.architecture.vocab_size)
    return data


def check(data: bytes, path: str, vocab_size: int) -> None:
    """Check a tokenizer.json for a model that has ``vocab_size`` token ids.

    Raises:
        BundleError: ``json.*``; ``text.tokenizer`` for an id of the vocabulary that the model lacks or that two tokens
            share, or if there is no vocabulary.
    """
    document = strict_json.parse(data, path, max_bytes=files.MAX_TEXT_BYTES, max_marks=MAX_MARKS)
    owners: dict[int, str] = {}
    for pointer, token, number in _tokens(document, path):
        # An added token may lie beyond the embedding: no text gives its id unless the text spells the token.
        _check_id(number, pointer, path, MAX_ID + 1 if pointer.startswith("/added_tokens/") else vocab_size)
        if owners.setdefault(number, token) != token:
            raise _problem(
                path, pointer, "an id that no other token has", f"{number}, that of {quoted(owners[number])}"
            )
    for count, (pointer, number) in enumerate(_inserted(document, path), 1):
        if count > MAX_INSERTED:
            raise _problem(path, pointer, f"at most {MAX_INSERTED} ids that are added to a text", "more")
        _check_id(number, pointer, path, vocab_size)
    _check_growth(document, path)


def _check_id(number: object, pointer: str, path: str, vocab_size: int) -> None:
    if type(number) is not int or not 0 <= number < vocab_size:
        of = "" if vocab_size > MAX_ID else f", as the model has {vocab_size}"
        raise _problem(path, pointer, f"a token id from 0 to {vocab_size - 1}{of}", quoted(number), HINT)


def _tokens(document: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the JSON pointer, the text and the id of every token: first the vocabulary, then the added tokens."""
    model = _member(document, path, "", "model", dict)
    kind = model.get("type")  # absent in files of before tokenizers 0.9: the library tells the model by its fields
    if kind is not None and kind not in MODELS:
        raise _problem(path, "/model/type", f"one of {', '.join(MODELS)}", quoted(kind))
    known: dict[str, Any] = {}
    if kind == "Unigram" or (kind is None and isinstance(model.get("vocab"), list)):
        # (token, score); the index in the list is the id
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
    """Yield the JSON pointer and the id of each token that is inserted by id.

    These tokens go before, after and between texts.
    """
    processor = document.get("post_processor")
    for at, each in _parts(processor, "/post_processor"):
        for name in ("cls", "sep"):  # (token, id)
            pair = each.get(name)
            if isinstance(pair, list) and len(pair) == 2:
                yield f"{at}/{name}/1", pair[1]
        special = each.get("special_tokens")
        for token, entry in special.items() if isinstance(special, dict) else ():
            ids = entry.get("ids") if isinstance(entry, dict) else None
            for i, number in enumerate(ids if isinstance(ids, list) else ()):
                yield f"{at}/special_tokens/{escape(token)}/ids/{i}", number


def _parts(value: object, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object in a value, at any depth, with its JSON pointer. Sequences may contain sequences."""
    if isinstance(value, dict):
        yield at, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        if isinstance(child, dict | list):
            yield from _parts(child, f"{at}/{escape(str(name))}")


def _check_growth(document: Any, path: str) -> None:
    """Refuse replacements that could make a text too long.

    If each one replaces the output of the one before, a few replacements can turn a word into gigabytes.
    """
    for place in ("normalizer", "decoder", "pre_tokenizer"):
        growth = 1
        for at, each in _parts(document.get(place), f"/{place}"):
            for name in ("content", "prepend", "replacement", "prefix"):
                text = each.get(name)
                growth *= max(1, len(text)) if isinstance(text, str) else 1
                if growth > MAX_GROWTH:
                    expected = f"replacements that make a text at most {MAX_GROWTH} times as long"
                    raise _problem(path, f"{at}/{name}", expected, quoted(text))


def _member(value: Any, path: str, at: str, name: str, kind: type) -> Any:
    member = value.get(name) if isinstance(value, dict) else None
    if not isinstance(member, kind):
        what = "an object" if kind is dict else "an array"
        raise _problem(path, f"{at}/{name}", what, quoted(member))
    return member


def _list(value: Any, path: str, at: str, name: str) -> list[Any]:
    found: list[Any] = [] if value.get(name) is None else _member(value, path, at, name, list)
    return found


def _problem(path: str, pointer: str, expected: str, got: str, hint: str = WHOLE) -> BundleError:
    return BundleError(
        Problem(code="text.tokenizer", file=path, pointer=pointer, expected=expected, got=got, hint=hint)
    )
