"""Source tensors that are constants of the decoder. A bundle doesn't store them, and its manifest describes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from splitbundle.errors import quoted
from splitbundle.format.dtypes import WEIGHTS
from splitbundle.format.manifest.document import FILE, Manifest
from splitbundle_converter.errors import refusal

EXTENSION: Final = "constants"
"""The key in the manifest's ``extensions``."""
_MAX_NUMBERS: Final = 4096
"""The most numbers of a constant. Each one known has a single number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A source tensor in which every number is the same."""

    name: str
    value: float
    dtype: str
    shape: tuple[int, ...]


def extension(constants: Sequence[Constant]) -> dict[str, Any]:
    """Return the member for the manifest's ``extensions``; an empty dict without constants."""
    entries = [
        {"source": own.name, "value": own.value, "dtype": own.dtype, "shape": list(own.shape)} for own in constants
    ]
    return {EXTENSION: entries} if entries else {}


def read_constants(manifest: Manifest) -> list[Constant]:
    """Return the constants that a manifest describes.

    Raises:
        BundleError: ``field.value`` for an entry that can't be followed.
    """
    entries = manifest.extensions.get(EXTENSION, [])
    if not isinstance(entries, list):
        raise refusal("field.value", FILE, "an array", quoted(entries), pointer=f"/extensions/{EXTENSION}")
    found = []
    taken = {entry.source for entry in manifest.source_names}
    for i, entry in enumerate(entries):
        if not _is_constant(entry) or entry["source"] in taken:
            expected = "a constant with source (a new name), value, dtype and shape"
            raise refusal("field.value", FILE, expected, quoted(entry), pointer=f"/extensions/{EXTENSION}/{i}")
        taken.add(entry["source"])
        found.append(
            Constant(
                name=entry["source"], value=float(entry["value"]), dtype=entry["dtype"], shape=tuple(entry["shape"])
            )
        )
    return found


def _is_constant(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"source", "value", "dtype", "shape"}:
        return False
    shape, value = entry["shape"], entry["value"]
    whole = isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int and size >= 0 for size in shape)
    return (
        whole
        and math.prod(shape) <= _MAX_NUMBERS
        and type(value) in (int, float)
        and math.isfinite(value)
        and entry["dtype"] in WEIGHTS
        and isinstance(entry["source"], str)
    )
