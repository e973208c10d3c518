"""The payloads of the wire as tensors. It needs no numpy. ``spec/v1/wire.md`` has the encodings."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from splitbundle.errors import BundleError, Problem
from splitbundle.wire.encodings import EXACT, LARGEST_CODE, SCALE
from splitbundle.wire.frames import ALIGNMENT

with warnings.catch_warnings():
    # torch warns, once in a process, that memory can't be written. Nothing writes into the memory of a frame.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)
DTYPES: Final = {name: getattr(torch, name) for name in EXACT}
"""The encodings that are a dtype."""


def encode(hidden: Tensor, count: Sequence[int], encoding: str) -> list[memoryview]:
    """Return the tokens of a hidden state as the parts of a payload.

    *Shape:* (batch, sequence, width), of a floating dtype. Row i has ``count[i]`` tokens, and padding follows.

    Raises:
        BundleError: ``wire.value`` for numbers that a narrower encoding can't hold.
    """
    if not any(count):
        return []
    whole = min(count) == hidden.shape[1]
    if whole and hidden.dtype == DTYPES.get(encoding) and hidden.is_cpu and hidden.is_contiguous():
        return [_memory(hidden)]  # at once, as a decoding step waits for it
    tokens = _tokens(hidden.detach(), count)
    if encoding == "int8":
        values = tokens.float()
        largest = values.abs().amax(dim=1)
        _check_finite(largest, encoding)
        scales = largest / LARGEST_CODE
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        codes = (values / divisors[:, None]).round().clamp(-LARGEST_CODE, LARGEST_CODE)
        codes = torch.where(scales[:, None] > 0, codes, torch.zeros_like(codes))
        return [_bytes(scales), _bytes(codes.to(torch.int8))]
    rounded = tokens.to(DTYPES[encoding])
    if EXACT[encoding] <= tokens.element_size() and rounded.dtype != tokens.dtype:
        _check_finite(rounded, encoding)
    return [_bytes(rounded)]


def decode(payload: memoryview, encoding: str, count: Sequence[int], sequence: int, width: int) -> Tensor:
    """Return the hidden state of a payload, in the dtype of the encoding; in float32 for ``int8``. Padding is zero.

    It may be a view of the payload's memory.

    *Shape:* (batch, sequence, width).
    """
    dtype = DTYPES.get(encoding, torch.float32)
    if 0 < sequence == min(count) and encoding != "int8":
        # At once, as a decoding step waits for it. resize_ costs less than view, and gives the same tensor.
        return torch.frombuffer(_aligned(payload), dtype=dtype).resize_(len(count), sequence, width)
    number = sum(count)
    if number == 0:
        return torch.zeros(len(count), sequence, width, dtype=dtype)
    if encoding == "int8":
        payload = _aligned(payload)
        scales = torch.frombuffer(payload[: SCALE * number], dtype=torch.float32)
        codes = torch.frombuffer(payload[SCALE * number :], dtype=torch.int8)
        tokens = codes.view(number, width).float() * scales[:, None]
    else:
        tokens = torch.frombuffer(_aligned(payload), dtype=dtype).view(number, width)
    if all(n == sequence for n in count):
        return tokens.view(len(count), sequence, width)
    hidden = tokens.new_zeros(len(count), sequence, width)
    start = 0
    for row, n in enumerate(count):
        hidden[row, :n] = tokens[start : start + n]
        start += n
    return hidden


def _aligned(payload: memoryview) -> memoryview:
    """Return a payload, or a copy of one that begins where numbers of torch can't (SB-X-003)."""
    frame = payload.obj
    start = len(frame) - len(payload) if isinstance(frame, bytes) else 1
    return payload if start % ALIGNMENT == 0 else memoryview(bytearray(payload))


def _tokens(hidden: Tensor, count: Sequence[int]) -> Tensor:
    """Return the tokens without padding. *Shape:* (batch, sequence, width) -> (tokens, width)."""
    if all(n == hidden.shape[1] for n in count):
        return hidden.reshape(-1, hidden.shape[2])
    places = torch.arange(hidden.shape[1], device=hidden.device)[None]
    # Not torch.cat: under autocast, it joins no tensors of a 16-bit type that isn't autocast's own.
    return hidden[places < torch.tensor(count, device=hidden.device)[:, None]]


def _check_finite(values: Tensor, encoding: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise BundleError(
            Problem(
                code="wire.value",
                argument="hidden",
                expected=f"numbers that {encoding} can hold",
                got="NaN, infinity or larger ones",
                hint="The exact encoding, which is the default, carries every number",
            )
        )


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor. torch's own way is numpy, which an environment with torch alone doesn't have."""
    return _memory(tensor.cpu().contiguous())


def _memory(tensor: Tensor) -> memoryview:
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    memory.owner = tensor  # type: ignore[attr-defined]  # it keeps the tensor for as long as the view is used
    return memoryview(memory).cast("B")
