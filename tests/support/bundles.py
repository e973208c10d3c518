"""Whole bundles made from the documents of the conformance kit. Their weights are zeros."""

from __future__ import annotations

import hashlib
from pathlib import Path

from conformance.documents import base
from splitbundle.format import weight_layout
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.manifest.parser import parse_manifest


def write_llama3(root: Path) -> Path:
    """The bundle of the base ``llama3``."""
    root.mkdir()
    for kind in ("architecture", "manifest"):
        (root / f"{kind}.json").write_bytes(base("llama3", kind))
    manifest, architecture = (
        parse_manifest(base("llama3", "manifest")),
        parse_architecture(base("llama3", "architecture")),
    )
    for unit, shapes in architecture.unit_tensors().items():
        left = [
            (name, weight_layout.Tensor(dtype=manifest.storage.dtype_of(name), shape=s)) for name, s in shapes.items()
        ]
        paths = manifest.units[unit]
        # layer-003 has two parts; the first holds the attention's norm, queries and keys.
        parts = [left] if len(paths) == 1 else [left[:5], left[5:]]
        for path, part in zip(paths, parts, strict=True):
            data = bytes(sum(tensor.size for _, tensor in part))
            header = weight_layout.header(weight_layout.lay_out(dict(part)), hashlib.sha256(data).hexdigest())
            (root / path).write_bytes(header + data)
    lines = {path: file.sha256 for path, file in manifest.files.items()}
    lines["manifest.json"] = hashlib.sha256(base("llama3", "manifest")).hexdigest()
    (root / "SHA256SUMS").write_text("".join(f"{lines[path]}  {path}\n" for path in sorted(lines)), "ascii")
    return root
