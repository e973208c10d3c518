"""Check a tokenizer.json before the library ``tokenizers`` loads it: ``spec/v1/bundle.md``, section "text"."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.fields import escape
from splitbundle.records import field, record
from splitbundle.storage import files

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

MAX_MARKS: Final = 2**23
"""See ``strict_json.MAX_MARKS``. Half a million merges of two tokens each have some two million marks."""
MAX_ID: Final = 2**31 - 1
ONE_BEYOND_OF: Final = 100
"""The model may lack one in so many tokens of the vocabulary: control tokens of a larger model of its family."""
MAX_INSERTED: Final = 1024
MAX_STEPS: Final = 1024
MAX_GROWTH: Final = 1024
MODELS: Final = ("BPE", "Unigram", "WordLevel", "WordPiece")
STEP_GROWTH: Final = {"ByteLevel": 4, "Metaspace": 2}
"""A type of step -> how many times as long it can make a text, beside its replacements."""
WHOLE: Final = "Fetch the file again, or save it with the library tokenizers"
HINT: Final = "The model has no such token: the tokenizer belongs to another model, or was changed after training"


@record(frozen=True, slots=True, kw_only=True)
class TokenIds:
    """What a reader should know of a tokenizer that is accepted."""

    beyond: dict[str, int] = field(default_factory=dict)
    """The tokens that the model lacks, with their ids. A text that would give one of them is refused."""
    renumbered: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The added tokens to which the file gives another id than they have -> the id in the file, and the id."""


def read(bundle: BundleReader, path: str) -> bytes:
    """Return the bytes of a bundle's tokenizer.json after checking its digest and its contents.

    Raises:
        BundleError: ``file.*`` if it isn't the listed file; as for ``check``.
    """
    data = files.read_listed(bundle.path, path, bundle.manifest.files[path], files.MAX_TEXT_BYTES)
    check(data, path, bundle.architecture.vocab_size)
    return data


def check(data: bytes, path: str, vocab_size: int) -> TokenIds:
    """Check a tokenizer.json for a model that has ``vocab_size`` token ids.

    Raises:
        BundleError: ``json.*``; ``text.tokenizer`` if two tokens share an id, if the model lacks a token that every
            text would have or too many of the vocabulary, or if there is no vocabulary.
    """
    document = strict_json.parse(data, path, max_bytes=files.MAX_TEXT_BYTES, max_marks=MAX_MARKS)
    vocabulary, size = _vocabulary(document, path)
    _check_share(vocabulary, size, path, vocab_size)
    added, renumbered = _added(document, path, vocabulary, size)
    _check_inserted(document, path, vocab_size)
    _check_growth(document, path)
    beyond = {token: number for token, number in (vocabulary | added).items() if number >= vocab_size}
    return TokenIds(beyond=beyond, renumbered=renumbered)


def _vocabulary(document: Any, path: str) -> tuple[dict[str, int], int]:
    """Return the vocabulary as token -> id, and its number of entries."""
    model = _member(document, path, "", "model", dict)
    kind = model.get("type")
    if "type" in model and kind not in MODELS:
        raise _problem(path, "/model/type", f"one of {', '.join(MODELS)}, or none", quoted(kind))
    if kind == "Unigram" or (kind is None and isinstance(model.get("vocab"), list)):
        entries = _member(model, path, "/model", "vocab", list)
        for number, entry in enumerate(entries):  # (token, score); the index in the list is the id
            good = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if not good or type(entry[1]) not in (int, float):
                raise _problem(path, f"/model/vocab/{number}", "a token and its score", quoted(entry))
        return {entry[0]: number for number, entry in enumerate(entries)}, len(entries)
    vocabulary: dict[str, int] = _member(model, path, "/model", "vocab", dict)
    owners: dict[int, str] = {}
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number <= MAX_ID:
            _check_id(number, f"/model/vocab/{escape(token)}", path)
        if owners.setdefault(number, token) != token:
            got = f"{number}, that of {quoted(owners[number])}"
            raise _problem(path, f"/model/vocab/{escape(token)}", "an id that no other token has", got)
    return vocabulary, len(vocabulary)


def _check_id(number: Any, pointer: str, path: str, vocab_size: int = MAX_ID + 1) -> int:
    if type(number) is not int or not 0 <= number < vocab_size:
        of_model = f", as the model has {vocab_size}" if vocab_size <= MAX_ID else ""
        hint = HINT if of_model else None
        raise _problem(path, pointer, f"a token id from 0 to {vocab_size - 1}{of_model}", quoted(number), hint)
    return int(number)


def _check_share(vocabulary: dict[str, int], size: int, path: str, vocab_size: int) -> None:
    """Refuse the vocabulary of another model: it has many tokens that this model lacks."""
    beyond = [(token, number) for token, number in vocabulary.items() if number >= vocab_size]
    if len(beyond) * ONE_BEYOND_OF > size:
        token, number = beyond[0]
        expected = f"ids below {vocab_size}, as the model has {vocab_size}, for all but one token in {ONE_BEYOND_OF}"
        got = f"{len(beyond)} of {size}, the first {quoted(token)} with {number}"
        raise _problem(path, "/model/vocab", expected, got, HINT)


def _added(
    document: Any, path: str, vocabulary: dict[str, int], size: int
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Return the ids of the added tokens, as the library gives them: the file's own ids count for nothing."""
    added: dict[str, int] = {}
    renumbered: dict[str, tuple[int, int]] = {}
    next_id = size
    for i, entry in enumerate(_list(document, path, "", "added_tokens")):
        at = f"/added_tokens/{i}"
        if not isinstance(entry, dict) or not {"content", "id"} <= entry.keys():
            raise _problem(path, at, "an object with a token's content and id", quoted(entry))
        token = entry["content"]
        if not isinstance(token, str):
            raise _problem(path, f"{at}/content", "a string", quoted(token))
        given = _check_id(entry["id"], f"{at}/id", path)
        if not token:  # the library leaves it out
            continue
        if token not in vocabulary and token not in added:
            added[token], next_id = next_id, next_id + 1
        number = vocabulary.get(token, added.get(token, 0))
        if given != number:
            renumbered[token] = (given, number)
    holes = any(number >= size for number in vocabulary.values())
    if added and holes:
        # Versions of the library give other ids to the added tokens then, and may give one that is taken.
        first = next(iter(added))
        expected = f"ids from 0 to {size - 1} for the {size} tokens of the vocabulary, as tokens are added to it"
        raise _problem(path, "/model/vocab", expected, f"greater ones, and the added token {quoted(first)}")
    return added, renumbered


def _check_inserted(document: Any, path: str, vocab_size: int) -> None:
    """Check the ids that go before and after every text."""
    count = 0
    for at, each in _parts(document.get("post_processor"), "/post_processor"):
        for name in ("cls", "sep"):  # (token, id)
            pair = each.get(name)
            if isinstance(pair, list) and len(pair) == 2:
                _check_id(pair[1], f"{at}/{name}/1", path, vocab_size)
        single = _items(each.get("single"))
        count += len(single) + len(_items(each.get("pair")))
        used = {_special(piece) for piece in single}
        special = each.get("special_tokens")
        for token, entry in special.items() if isinstance(special, dict) else ():
            ids = _items(entry.get("ids") if isinstance(entry, dict) else None)
            count += len(ids)
            for i, number in enumerate(ids if token in used else ()):
                _check_id(number, f"{at}/special_tokens/{escape(token)}/ids/{i}", path, vocab_size)
        if count > MAX_INSERTED:
            raise _problem(path, at, f"templates of at most {MAX_INSERTED} items and ids", "more")


def _special(piece: Any) -> str | None:
    """Return the name of the special token that an item of a template puts beside a text, or None."""
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None


def _parts(value: object, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every object in a value, at any depth, with its JSON pointer. Sequences may contain sequences."""
    if isinstance(value, dict):
        yield at, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        if isinstance(child, dict | list):
            yield from _parts(child, f"{at}/{escape(str(name))}")


def _check_growth(document: Any, path: str) -> None:
    """Refuse steps that could make a text too long.

    If each one works on the output of the one before, a few steps can turn a word into gigabytes.
    """
    for place in ("normalizer", "decoder", "pre_tokenizer"):
        growth = 1.0
        for count, (at, each) in enumerate(_parts(document.get(place), f"/{place}"), 1):
            growth *= _growth(each)
            if count > MAX_STEPS:
                raise _problem(path, at, f"at most {MAX_STEPS} objects in /{place}", "more")
            if growth > MAX_GROWTH:
                raise _problem(path, at, f"steps that make a text at most {MAX_GROWTH} times as long", "more")


def _growth(step: dict[str, Any]) -> float:
    """Return how many times as long a step can make a text of one character or more."""
    content, pattern, prepend = step.get("content"), step.get("pattern"), step.get("prepend")
    kind = step.get("type")
    growth = float(STEP_GROWTH.get(kind, 1)) if isinstance(kind, str) else 1.0
    if isinstance(content, str) and isinstance(pattern, dict):
        replaced = pattern.get("String")
        if isinstance(replaced, str) and replaced:
            growth *= max(1.0, len(content) / len(replaced))
        else:  # a regular expression may match nothing, before each character: then it inserts
            growth *= 1 + len(content)
    if isinstance(prepend, str):
        growth *= 1 + len(prepend)
    if isinstance(charsmap := step.get("precompiled_charsmap"), str):
        growth *= _longest_replacement(charsmap)
    return growth


def _longest_replacement(charsmap: str) -> int:
    """Return the length of the longest text that a map of SentencePiece puts in place of a character.

    The map is the size of a trie in four bytes, the trie, and the texts, each with a zero byte at its end.
    """
    try:
        data = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, ValueError):  # the library refuses it
        return 1
    trie = int.from_bytes(data[:4], "little") // 4 * 4
    return max(1, *map(len, data[4 + trie :].split(b"\0")))


def _member(value: Any, path: str, at: str, name: str, kind: type) -> Any:
    what = "an object" if kind is dict else "an array"
    if not isinstance(value, dict) or name not in value:
        raise _problem(path, at, f"an object with {quoted(name)}, {what}", quoted(value))
    if not isinstance(value[name], kind):
        raise _problem(path, f"{at}/{name}", what, quoted(value[name]))
    return value[name]


def _list(value: Any, path: str, at: str, name: str) -> list[Any]:
    found: list[Any] = [] if value.get(name) is None else _member(value, path, at, name, list)
    return found


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _problem(path: str, pointer: str, expected: str, got: str, hint: str | None = None) -> BundleError:
    return BundleError(
        Problem(code="text.tokenizer", file=path, pointer=pointer, expected=expected, got=got, hint=hint or WHOLE)
    )
