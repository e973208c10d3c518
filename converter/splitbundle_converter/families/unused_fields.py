"""Describe the fields of a source configuration that nothing uses: in a note, and in the manifest."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, quoted
from splitbundle.format import strict_json
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.errors import refusal
from splitbundle_converter.families.config_reader import UNSUPPORTED
from splitbundle_converter.families.configuration import evidence_of
from splitbundle_converter.families.inert_fields import is_inert, is_meaningful

EXTENSION: Final = "configuration"
"""The key in the manifest's ``extensions`` that has these fields."""
_NAMED: Final = 12
"""The largest number of fields that a note names."""
_LARGEST: Final = 4096
"""The largest number of bytes of a value in the manifest."""


def note(not_used: Mapping[str, Any], file: str) -> str:
    """Return one sentence about all fields that nothing uses."""
    names = ", ".join(quoted(name, 60)[1:-1] for name in list(not_used)[:_NAMED])
    more = f" and {len(not_used) - _NAMED} more" if len(not_used) > _NAMED else ""
    many = "field" if len(not_used) == 1 else "fields"
    return (
        f"{file} has {len(not_used)} {many} that transformers does not use for the logits: {names}{more}. "
        "The bundle's manifest keeps them as a description."
    )


def extension(not_used: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's entry; see ``spec/v1/bundle.md``, section "Versions and extensions"."""
    return {EXTENSION: {"not_used": {name: _kept(value) for name, value in not_used.items()}}} if not_used else {}


def _kept(value: Any) -> Any:
    """Return a value, or a description of a value that is too large or too deep for the manifest."""
    data = json.dumps({"extensions": {EXTENSION: {"not_used": {"name": value}}}}).encode()
    try:
        strict_json.parse(data, EXTENSION, max_bytes=_LARGEST)
    except BundleError:
        return f"(a value of {len(json.dumps(value))} bytes)"
    return value


def check_not_asked(not_used: Mapping[str, Any], asked: Collection[str], found: Configuration) -> None:
    """Check that the original class did not ask for a field that seemed to be unused.

    Raises:
        BundleError: ``source.config``.
    """
    known = evidence_of(found)
    for name, value in not_used.items():
        if name in asked and is_meaningful(value) and not is_inert(name) and not known.knows(name):
            expected = "no such field, as the original class asked for it while it computed"
            raise refusal("source.config", found.file, expected, quoted(value), UNSUPPORTED, f"{found.pointer}/{name}")
