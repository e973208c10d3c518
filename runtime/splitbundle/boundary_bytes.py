"""A boundary as bytes: a hidden state and the positions of its tokens, to be stored or sent on any way.

The form is that of ``spec/v1/wire.md``, section "A boundary as bytes". It is exact in every dtype, and needs torch
alone, or numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from splitbundle.backends import registry
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integers
from splitbundle.records import record
from splitbundle.wire import frames
from splitbundle.wire.encodings import ENCODINGS, EXACT
from splitbundle.wire.messages import Boundary
from splitbundle.wire.step_headers import MAX_POSITION, MAX_ROWS


@record(frozen=True, slots=True, kw_only=True)
class PackedBoundary:
    """What ``unpack_boundary`` returns: the arguments of the next stage's call."""

    hidden: Any
    """The hidden state, of shape (batch, sequence, hidden). Padding is zero."""
    past: tuple[int, ...]
    """For each row, the number of positions before its first token."""
    count: tuple[int, ...]
    """For each row, the number of its tokens."""


def pack_boundary(
    hidden: Any,
    *,
    past: Sequence[int] | None = None,
    count: Sequence[int] | None = None,
    encoding: str | None = None,
) -> bytes:
    """Return a hidden state as bytes.

    *Shape:* (batch, sequence, hidden), as a stage returns it: a tensor of torch, or a numpy array.

    Args:
        hidden: in float32, float16 or bfloat16.
        past: for each row, the number of earlier positions; by default 0.
        count: for each row, the number of its tokens; by default the whole sequence. Padding isn't packed.
        encoding: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"int8"``; by default the dtype of ``hidden``,
            which is exact.

    Raises:
        BundleError: ``input.type``, ``input.dtype`` and ``input.shape`` for another kind of array; ``input.value`` for
            wrong numbers; ``wire.value`` for numbers that a narrower encoding can't hold.
    """
    backend = _backend_of(hidden)
    dtype, shape = str(hidden.dtype).removeprefix("torch."), tuple(hidden.shape)
    if dtype not in EXACT:
        _refuse("input.dtype", f"one of {', '.join(EXACT)}", dtype)
    if len(shape) != 3 or 0 in shape or shape[0] > MAX_ROWS:
        _refuse("input.shape", f"(batch, sequence, hidden), all above 0, at most {MAX_ROWS} rows", str(shape))
    chosen = dtype if encoding is None else encoding
    if chosen not in ENCODINGS:
        raise wrong_argument("encoding", f"one of {', '.join(ENCODINGS)}", quoted(encoding))
    before = _numbers("past", past, shape[0], 0, MAX_POSITION)
    brought = _numbers("count", count, shape[0], shape[1], shape[1])
    header = Boundary(past=before, count=brought, sequence=shape[1], width=shape[2], encoding=chosen)
    return frames.pack(header, registry.module(backend, "payloads").encode(hidden, brought, chosen))


def unpack_boundary(data: bytes | bytearray | memoryview, *, backend: str | None = None) -> PackedBoundary:
    """Return the hidden state and the positions of some bytes.

    Args:
        data: the bytes, from anywhere: they are checked.
        backend: ``"torch"`` for a tensor in the dtype of the encoding (float32 for ``int8``); ``"onnxruntime"`` for a
            numpy array in float32, which holds the numbers of every encoding. By default torch if it is installed.

    Raises:
        BundleError: ``wire.*``, ``json.*`` and ``field.*`` for bytes that aren't a boundary.
    """
    chosen = registry.installed_backend() if backend is None else backend
    if chosen not in registry.BACKENDS:
        raise wrong_argument("backend", " or ".join(registry.BACKENDS), quoted(backend))
    if not isinstance(data, bytes | bytearray | memoryview):
        raise wrong_argument("data", "bytes", type(data).__name__)
    whole = bytes(bytearray(data))  # a copy: the hidden state may be a view of it, and can be changed
    message, payload = frames.unpack(whole, max(len(whole), 1))
    if not isinstance(message, Boundary):
        raise BundleError(
            Problem(
                code="wire.header", argument="frame", expected="a boundary", got=f"a frame of the kind {message.op}"
            )
        )
    decode = registry.module(chosen, "payloads").decode
    hidden = decode(payload, message.encoding, message.count, message.sequence, message.width)
    return PackedBoundary(hidden=hidden, past=message.past, count=message.count)


def _backend_of(hidden: object) -> str:
    for base in type(hidden).__mro__:
        if (base.__module__, base.__name__) == ("numpy", "ndarray"):
            return "onnxruntime"
        if (base.__module__, base.__name__) == ("torch", "Tensor"):
            return "torch"
    _refuse("input.type", "a torch.Tensor or a numpy.ndarray", type(hidden).__name__)
    raise RuntimeError("a refusal raises")


def _refuse(code: str, expected: str, got: str) -> None:
    raise BundleError(Problem(code=code, argument="hidden", expected=expected, got=got))


def _numbers(name: str, given: Sequence[int] | None, rows: int, default: int, most: int) -> tuple[int, ...]:
    values = [default] * rows if given is None else as_integers(given, name)
    if len(values) != rows or not all(0 <= value <= most for value in values):
        raise wrong_argument(name, f"{rows} integers from 0 to {most}", quoted(values))
    return tuple(values)
