"""Quantized weight files with one fault each, in a bundle whose manifest lists them as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import LAYER, QUANTIZED, Case, Draft

MATRIX = "layers.0.attention.query.weight"
SCALE = f"{MATRIX}_scale"


def encoding_cases() -> Iterator[Case]:
    """One bundle that a reader must accept, and one for each way in which codes and scales can be wrong."""
    faults: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
        ("scale-nan", "a scale that is NaN", _scale(b"\xc0\x7f"), "weights.scale"),
        ("scale-nan-negative", "a scale that is NaN, with a sign", _scale(b"\xc1\xff"), "weights.scale"),
        ("scale-infinite", "a scale that is infinite", _scale(b"\x80\x7f"), "weights.scale"),
        ("scale-infinite-negative", "a scale that is minus infinity", _scale(b"\x80\xff"), "weights.scale"),
        ("scale-shape", "scales for half as many blocks", _header(SCALE, shape=[16, 2]), "weights.tensors"),
        ("scale-dtype", "scales in float16", _header(SCALE, dtype="F16"), "weights.tensors"),
        ("scale-missing", "codes without scales", _without(SCALE), "weights.tensors"),
        ("codes-missing", "scales without codes", _without(MATRIX), "weights.tensors"),
        ("codes-dtype", "codes of blocks with a sign", _header(MATRIX, dtype="I8"), "weights.tensors"),
        ("codes-shape", "codes of a plain matrix", _header(MATRIX, shape=[32, 16]), "weights.tensors"),
        (
            "codes-plain",
            "a plain matrix in place of codes",
            _header(MATRIX, dtype="BF16", shape=[16, 16]),
            "weights.tensors",
        ),
    ]

    def case(name: str, about: str, edit: Callable[[bytes], bytes], code: str | None) -> Case:
        def make(root: Path) -> None:
            draft = Draft(QUANTIZED)
            draft.files[LAYER] = edit(draft.files[LAYER])
            draft.seal().write(root)

        file = LAYER if code else None
        rules = ("SB-W-015",) if code == "weights.scale" else ("SB-W-014",)
        steps = ("stage", "verify")
        return Case(name=f"encoding/{name}", about=about, rules=rules, steps=steps, make=make, code=code, file=file)

    yield case("whole", "a quantized bundle", lambda data: data, None)
    yield from (case(*fault) for fault in faults)


def _scale(value: bytes) -> Callable[[bytes], bytes]:
    """Change the third scale of a matrix."""

    def change(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        at = end + json.loads(data[8:end])[SCALE]["data_offsets"][0] + 4
        return data[:at] + value + data[at + 2 :]

    return change


def _header(name: str, **values: Any) -> Callable[[bytes], bytes]:
    """Change what the header says of a tensor, and keep the header's length."""

    def change(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:end])
        entries[name].update(values)
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        return data[:8] + text.ljust(end - 8) + data[end:]

    return change


def _without(name: str) -> Callable[[bytes], bytes]:
    """Leave a tensor out of the header, and keep the header's length."""

    def change(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:end])
        del entries[name]
        text = json.dumps(entries, separators=(",", ":")).encode("ascii")
        return data[:8] + text.ljust(end - 8) + data[end:]

    return change
