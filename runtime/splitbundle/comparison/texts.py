"""Compare the text documents of two bundles: which template, which default, which golden text differs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, Final

from splitbundle.comparison.fields import field_changes
from splitbundle.comparison.records import FieldChange
from splitbundle.errors import BundleError, quoted
from splitbundle.format.text_document import FILE, MAX_BYTES, TextDocument, parse_text
from splitbundle.records import as_dict, replace
from splitbundle.storage.files import read_listed
from splitbundle.storage.reader import BundleReader

_SHOWN: Final = 40
"""The characters of a golden text that stand for it."""


def text_changes(a: BundleReader, b: BundleReader) -> Iterator[FieldChange]:
    """Yield what differs in ``text.json``. See ``records.Tokenizer``.

    A bundle without one has an empty document. Nothing is yielded if a file isn't here, or can't be read: its digest
    tells that it differs.
    """
    listed = [bundle.manifest.files.get(FILE) for bundle in (a, b)]
    if listed[0] is not None and listed[1] is not None and listed[0].sha256 == listed[1].sha256:
        return
    try:
        one, other = _read(a), _read(b)
    except BundleError:
        return
    for change in field_changes(one, other):
        yield _first_lines(change) if change.pointer.startswith("/templates/") else change


def _read(bundle: BundleReader) -> dict[str, Any]:
    """Return a text document as an object whose members are named by what they are about."""
    if bundle.manifest.model.text_file is None:
        return {}
    data = read_listed(bundle.path, FILE, bundle.manifest.files[FILE], MAX_BYTES)
    document: TextDocument = parse_text(data, bundle.architecture.vocab_size)
    return {
        "variables": document.variables,
        "templates": document.templates,
        "defaults": as_dict(document.defaults),
        "cases": {quoted(case.text, _SHOWN): as_dict(case) for case in document.cases},
        "chats": {
            f"{len(chat.messages)} messages, {quoted(chat.messages[-1][1], _SHOWN)}": as_dict(chat)
            for chat in document.chats
        },
    }


def _first_lines(change: FieldChange) -> FieldChange:
    """Return the change of a template, with the first line that differs in place of the whole texts."""
    if change.only_in is not None:
        return change
    lines = zip_longest(str(change.a).splitlines(), str(change.b).splitlines())
    for number, (one, other) in enumerate(lines, 1):
        if one != other:
            return replace(change, a=_line(number, one), b=_line(number, other))
    return change  # only its line ends


def _line(number: int, text: str | None) -> str:
    return f"line {number}: {text.strip()}" if text is not None else f"no line {number}"
