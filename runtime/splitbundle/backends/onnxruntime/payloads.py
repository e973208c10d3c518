"""The payloads of the wire as numpy arrays. ``spec/v1/wire.md`` has the encodings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy

from splitbundle.errors import BundleError, Problem
from splitbundle.wire.encodings import LARGEST_CODE, SCALE

_INFINITE: Final = 0x7F80
"""The exponent of infinities and NaN in bfloat16."""


def encode(hidden: numpy.ndarray, count: Sequence[int], encoding: str) -> list[memoryview]:
    """Return the tokens of a hidden state as the parts of a payload.

    *Shape:* (batch, sequence, width), of a floating dtype. Row i has ``count[i]`` tokens, and padding follows.

    Raises:
        BundleError: ``wire.value`` for numbers that a narrower encoding can't hold.
    """
    if not any(count):
        return []
    if str(hidden.dtype) == encoding:
        return [_bytes(_tokens(hidden, count))]
    tokens = numpy.ascontiguousarray(_tokens(hidden, count), dtype="<f4")
    if encoding == "int8":
        largest = numpy.abs(tokens).max(axis=1, initial=0)
        _check(bool(numpy.isfinite(largest).all()), encoding)
        scales = largest / numpy.float32(LARGEST_CODE)
        divisors = numpy.where(scales > 0, scales, numpy.float32(1))
        codes = numpy.rint(tokens / divisors[:, None]).clip(-LARGEST_CODE, LARGEST_CODE)
        codes[scales == 0] = 0
        return [_bytes(scales.astype("<f4")), _bytes(codes.astype(numpy.int8))]
    if encoding == "bfloat16":
        _check(bool(numpy.isfinite(tokens).all()), encoding)  # the sum below would carry some NaN over to zero
        bits = tokens.view("<u4")
        rounded = ((bits.astype(numpy.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        _check(not bool(((rounded & _INFINITE) == _INFINITE).any()), encoding)
        return [_bytes(rounded)]
    if encoding == "float16":
        with numpy.errstate(over="ignore"):
            halves = tokens.astype("<f2")
        _check(bool(numpy.isfinite(halves).all()), encoding)
        return [_bytes(halves)]
    return [_bytes(tokens)]


def decode(payload: memoryview, encoding: str, count: Sequence[int], sequence: int, width: int) -> numpy.ndarray:
    """Return the hidden state of a payload in float32, which holds the numbers of every encoding. Padding is zero.

    *Shape:* (batch, sequence, width).
    """
    number = sum(count)
    tokens: numpy.ndarray
    if encoding == "int8":
        scales = numpy.frombuffer(payload[: SCALE * number], "<f4")
        tokens = numpy.frombuffer(payload[SCALE * number :], numpy.int8).reshape(number, width) * scales[:, None]
    elif encoding == "bfloat16":
        tokens = (numpy.frombuffer(payload, "<u2").astype("<u4") << 16).view("<f4").reshape(number, width)
    else:
        kind = "<f2" if encoding == "float16" else "<f4"
        tokens = numpy.frombuffer(payload, kind).astype(numpy.float32).reshape(number, width)
    if all(n == sequence for n in count):
        return tokens.reshape(len(count), sequence, width)
    hidden = numpy.zeros((len(count), sequence, width), numpy.float32)
    start = 0
    for row, n in enumerate(count):
        hidden[row, :n] = tokens[start : start + n]
        start += n
    return hidden


def _tokens(hidden: numpy.ndarray, count: Sequence[int]) -> numpy.ndarray:
    """Return the tokens without padding. *Shape:* (batch, sequence, width) -> (tokens, width)."""
    if all(n == hidden.shape[1] for n in count):
        return hidden.reshape(-1, hidden.shape[2])
    return numpy.concatenate([hidden[row, :n] for row, n in enumerate(count)])


def _bytes(array: Any) -> memoryview:
    array = numpy.ascontiguousarray(array)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return memoryview(little.reshape(-1).view(numpy.uint8))


def _check(holds: bool, encoding: str) -> None:
    if not holds:
        raise BundleError(
            Problem(
                code="wire.value",
                argument="hidden",
                expected=f"numbers that {encoding} can hold",
                got="NaN, infinity or larger ones",
                hint="The exact encoding, which is the default, carries every number",
            )
        )
