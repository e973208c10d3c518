"""A unit that is stored in several files, its parts, with one fault each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conformance.case import LAYER, Case, Draft

ORDER = (
    "attention_norm.weight",
    *(f"attention.{name}.weight" for name in ("query", "key", "value", "output")),
    "mlp_norm.weight",
    *(f"mlp.{name}.weight" for name in ("gate", "up", "down")),
)
"""The tensors of the small bundle's layer, in order of use."""
PARTS = ("layer-000-part-001.safetensors", "layer-000-part-002.safetensors")


def weight_file(data: bytes, names: tuple[str, ...]) -> bytes:
    """Return a canonical weight file with some tensors of another one (SB-W-003, SB-W-006 to SB-W-010)."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = json.loads(data[8:end])
    chosen = {f"layers.0.{name}": found[f"layers.0.{name}"] for name in names}

    def rank(name: str) -> bool:
        first, last = chosen[name]["data_offsets"]
        return len(chosen[name]["shape"]) < 2 or (last - first) % 64 != 0

    entries: dict[str, Any] = {}
    numbers = b""
    for name in sorted(chosen, key=rank):
        first, last = chosen[name]["data_offsets"]
        entries[name] = chosen[name] | {"data_offsets": [len(numbers), len(numbers) + last - first]}
        numbers += data[end + first : end + last]
    header = {"__metadata__": {"sha256": hashlib.sha256(numbers).hexdigest()}} | entries
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    length = -(-(8 + len(text)) // 4096) * 4096 - 8
    return length.to_bytes(8, "little") + text.ljust(length) + numbers


def part_cases() -> Iterator[Case]:
    """Cases of rule SB-W-012. The bundle has no graphs, which would name the single file."""
    skipped = ORDER[:1] + ORDER[2:4], ORDER[1:2] + ORDER[4:]
    rows: list[tuple[str, str, tuple[tuple[str, ...], ...], bool, str | None]] = [
        ("whole", "a unit in two parts", (ORDER[:4], ORDER[4:]), False, None),
        ("one-tensor", "a part of one tensor", (ORDER[:1], ORDER[1:]), False, None),
        ("swapped", "the parts in the other order", (ORDER[:4], ORDER[4:]), True, PARTS[1]),
        ("skipped", "a tensor that belongs to the first part", skipped, False, PARTS[0]),
        ("twice", "a tensor in both parts", (ORDER[:4], ORDER[3:]), False, PARTS[1]),
        ("missing", "the last tensor is missing", (ORDER[:4], ORDER[4:-1]), False, PARTS[1]),
        ("empty-first", "a first part without a tensor", ((), ORDER), False, PARTS[0]),
        ("empty-last", "a last part without a tensor", (ORDER, ()), False, PARTS[1]),
    ]
    for name, about, contents, swapped, file in rows:

        def make(root: Path, contents: tuple[tuple[str, ...], ...] = contents, swapped: bool = swapped) -> None:
            draft = Draft()
            whole = draft.files.pop(LAYER)
            del draft.manifest["files"][LAYER]
            for shard in draft.manifest["shards"]:
                path = shard["graph"]["file"]
                del draft.files[path], draft.manifest["files"][path]
                shard["graph"] = None
            for path, names in zip(PARTS, contents, strict=True):
                draft.files[path] = weight_file(whole, names)
            draft.manifest["units"]["layer-000"]["files"] = list(reversed(PARTS) if swapped else PARTS)
            draft.seal().write(root)

        yield Case(
            name=f"parts/{name}",
            about=about,
            rules=("SB-W-012",),
            steps=("verify",),  # a backend that computes by graphs can't load it
            make=make,
            code=None if file is None else "weights.tensors",
            file=file,
        )
