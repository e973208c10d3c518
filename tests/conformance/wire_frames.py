"""Frames of the protocol, and the bytes of encodings, from the files in ``wire/``."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import HERE, Case

WIRE = HERE / "wire"
LIMIT = 64 * 2**20


def wire_cases() -> Iterator[Case]:
    """Yield a case for each file, and one for each direction of an encoding."""
    for verdict in ("accept", "reject"):
        for path in sorted((WIRE / verdict).glob("*.json")):
            yield _frame_case(f"wire/{verdict}/{path.stem}", json.loads(path.read_text("utf-8")))
    for path in sorted((WIRE / "encodings").glob("*.json")):
        yield from _encoding_cases(f"wire/encodings/{path.stem}", json.loads(path.read_text("utf-8")))


def frame_of(vector: dict[str, Any]) -> bytes:
    """Return the frame of a vector, which has it as it is, or in its parts."""
    if "frame" in vector:
        return bytes.fromhex(vector["frame"])
    header = vector["header"].encode("utf-8") + b" " * vector["padding"]
    return b"SBW1" + struct.pack("<I", len(header)) + header + bytes.fromhex(vector["payload"])


def _writer(**files: bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        root.mkdir()
        for name, data in files.items():
            (root / name).write_bytes(data)

    return make


def _frame_case(name: str, vector: dict[str, Any]) -> Case:
    expect = vector["expect"]
    code = expect.get("code")
    refused = code is not None

    def compare(answer: Any) -> str | None:
        if not isinstance(answer, dict) or answer.get("verdict") != "accepted":
            return f"expected accepted, got {answer}"
        if answer.get("header") != expect["header"]:
            return f"expected the header {expect['header']}, got {answer.get('header')}"
        if "numbers" in expect and answer.get("numbers") != expect["numbers"]:
            return f"expected the numbers {expect['numbers']}, got {answer.get('numbers')}"
        return None

    return Case(
        name=name,
        about=vector["about"],
        rules=tuple(vector["rules"]),
        steps=("frame",),
        make=_writer(frame=frame_of(vector), limit=str(vector.get("limit", LIMIT)).encode("ascii")),
        code=code,
        file="header" if refused and "argument" not in expect else None,
        pointer=expect.get("pointer"),
        points=refused and "argument" not in expect,
        argument=expect.get("argument"),
        compare=None if refused else compare,
    )


def _encoding_cases(name: str, vector: dict[str, Any]) -> Iterator[Case]:
    expect, files = vector["expect"], {"encoding": vector["encoding"].encode(), "width": str(vector["width"]).encode()}

    def case(step: str, about: str, given: bytes, member: str, wanted: str | None) -> Case:
        def compare(answer: Any) -> str | None:
            got = answer.get(member) if isinstance(answer, dict) else answer
            return None if got == wanted else f"expected the {member} {wanted}, got {got}"

        return Case(
            name=f"{name}-{step}",
            about=about,
            rules=tuple(vector["rules"]),
            steps=(step,),
            make=_writer(**files, **{"numbers" if step == "encode" else "payload": given}),
            code=expect.get("code"),
            compare=compare if wanted is not None else None,
        )

    if "numbers" in vector:
        given = b"".join(bytes.fromhex(bits)[::-1] for bits in vector["numbers"])
        yield case("encode", vector["about"], given, "payload", expect.get("payload"))
    if "code" not in expect:
        wanted = "".join(bytes.fromhex(bits)[::-1].hex() for bits in expect["numbers"])
        yield case("decode", vector["about"], bytes.fromhex(expect["payload"]), "numbers", wanted)
