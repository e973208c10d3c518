"""Check the scales of quantized weights: none is NaN or infinite (``spec/v1/bundle.md``, SB-W-015)."""

from __future__ import annotations

import mmap
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format import weight_layout
from splitbundle.format.weight_layout import SCALE
from splitbundle.storage import files
from splitbundle.storage.reader import BundleReader

_CHUNK: Final = 2**24
_ONES: Final = b"\x7f", b"\xff"
"""The high bytes of a bfloat16 with seven ones at the top of its exponent. The eighth one is in the low byte."""
_HIGH: Final = bytes(byte & 0x7F == 0x7F for byte in range(256))
_LOW: Final = bytes(byte >> 7 for byte in range(256))


def check_scales(bundle: BundleReader, unit: str) -> None:
    """Check the scales in the files of a unit.

    Raises:
        BundleError: ``weights.scale`` for the first scale that isn't finite; ``file.*`` and ``weights.*`` of the files.
    """
    if bundle.manifest.storage.encodings:
        for path, (file, found) in zip(bundle.weight_groups()[unit], bundle.open_weights(unit), strict=True):
            check_scales_in(bundle, path, file, found)


def check_scales_in(bundle: BundleReader, path: str, data: BinaryIO | mmap.mmap, found: weight_layout.Weights) -> None:
    """Check the scales in a file that is open or mapped, whose header is ``found``.

    Raises:
        BundleError: ``weights.scale``.
    """
    encodings = bundle.manifest.storage.encodings
    for name, (tensor, offset) in found.layout.items() if encodings else ():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in encodings:
            for start in range(0, tensor.size, _CHUNK):
                try:
                    data.seek(found.start + offset + start)
                    raw = data.read(min(_CHUNK, tensor.size - start))
                except OSError as error:
                    raise BundleError(files.unreadable(path, error)) from error
                at = first_not_finite(raw)
                if at is not None:
                    bits = int.from_bytes(raw[2 * at : 2 * at + 2], "little")
                    raise BundleError(_problem(path, name, tensor, start // 2 + at, bits))


def first_not_finite(raw: bytes) -> int | None:
    """Return the index of the first bfloat16 that is NaN or infinite, or None."""
    high = raw[1::2]
    if all(high.find(byte) < 0 for byte in _ONES):
        return None
    # The bits of these two numbers are where the top seven bits of an exponent are ones, and where the last one is.
    ones, last = (int.from_bytes(part.translate(table), "little") for part, table in ((high, _HIGH), (raw[::2], _LOW)))
    both = ones & last
    return None if not both else ((both & -both).bit_length() - 1) // 8


def _problem(path: str, name: str, tensor: weight_layout.Tensor, at: int, bits: int) -> Problem:
    index: list[int] = []
    left = at
    for size in reversed(tensor.shape):
        left, place = divmod(left, size)
        index.insert(0, place)
    value = "NaN" if bits & 0x7F else "-infinity" if bits >> 15 else "infinity"
    return Problem(
        code="weights.scale",
        file=path,
        pointer=f"/{name}",
        expected="finite scales",
        got=f"{value} at {index}",
        hint="Quantize the model again, from weights that are finite",
    )
