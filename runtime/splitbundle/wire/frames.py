"""Frames: the bytes of a message. ``spec/v1/wire.md`` has the rules; nothing here opens a connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.wire import headers
from splitbundle.wire.encodings import payload_bytes
from splitbundle.wire.messages import Backward, Backwarded, Boundary, Forward, Forwarded, Message, Ran, Run

MAGIC: Final = b"SBW1"
PREFIX: Final = 8
"""The bytes before the header."""
ALIGNMENT: Final = 16
MAX_FRAME: Final = 64 * 2**20


def pack(message: Message, payload: Sequence[bytes | bytearray | memoryview] = ()) -> bytes:
    """Return the frame of a message. The parts of the payload are joined in order."""
    header = headers.dump(message)
    padding = -(PREFIX + len(header)) % ALIGNMENT
    if len(header) + padding > headers.MAX_BYTES:
        raise _wrong("wire.header", f"at most {headers.MAX_BYTES} bytes of header", f"{len(header) + padding} bytes")
    length = (len(header) + padding).to_bytes(4, "little")
    return b"".join((MAGIC, length, header, b" " * padding, *payload))


def unpack(data: bytes, limit: int = MAX_FRAME) -> tuple[Message, memoryview]:
    """Return the message of a frame, and its payload, which is a view of ``data``.

    Raises:
        BundleError: ``wire.size`` for a longer frame; ``wire.frame`` for bytes that aren't a frame; ``wire.header`` for
            a header that is too long; ``wire.payload`` for a payload of another size than the header implies;
            ``json.*``, ``field.*``.
    """
    if len(data) > limit:
        raise _wrong("wire.size", f"a frame of at most {limit} bytes", f"{len(data)} bytes")
    if len(data) < PREFIX or data[:4] != MAGIC:
        raise _wrong("wire.frame", "a frame, which begins with SBW1", f"{len(data)} bytes that don't")
    length = int.from_bytes(data[4:PREFIX], "little")
    if length > headers.MAX_BYTES:
        raise _wrong("wire.header", f"at most {headers.MAX_BYTES} bytes of header", f"{length} bytes")
    if PREFIX + length > len(data):
        raise _wrong("wire.frame", f"a header of {length} bytes", f"{len(data) - PREFIX} bytes")
    message = headers.parse(data[PREFIX : PREFIX + length])
    payload = memoryview(data)[PREFIX + length :]
    if (size := payload_size(message)) != len(payload):
        raise _wrong("wire.payload", f"a payload of {size} bytes, as the header says", f"{len(payload)} bytes")
    return message, payload


def payload_size(message: Message) -> int:
    """Return the size in bytes that the payload of a message must have."""
    if isinstance(message, (Run, Boundary, Forward)):  # to make a union takes more time than the rest
        return payload_bytes(message.encoding, sum(message.count), message.width)
    if isinstance(message, (Ran, Forwarded, Backward, Backwarded)):
        return payload_bytes(message.encoding, message.tokens, message.width)
    return 0


def _wrong(code: str, expected: str, got: str) -> BundleError:
    return BundleError(Problem(code=code, argument="frame", expected=expected, got=got))
