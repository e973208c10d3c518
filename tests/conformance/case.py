"""The record of a case, and the small bundle that most cases change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = HERE / "bundles" / "tiny.splitbundle"
QUANTIZED = HERE / "bundles" / "quantized.splitbundle"
LAYER, VECTORS, TOKENIZER = "layer-000.safetensors", "vectors.safetensors", "tokenizer/tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A directory, and the verdict that a reader must give."""

    name: str
    about: str
    rules: tuple[str, ...]
    """The ids of the rules that it holds."""
    steps: tuple[str, ...]
    """The steps at which the reader is asked, each by itself. It must give the same verdict at all of them."""
    make: Callable[[Path], None]
    """Writes the bundle to a directory that doesn't exist yet.

    OSError and similar errors mean that this system can't have it.
    """
    code: str | None = None
    """The code of the first problem; None if the reader must accept the bundle."""
    file: str | None = None
    pointer: str | None = None
    """The pointer of the first problem, if ``points`` is true."""
    points: bool = False
    schema: str = "silent"
    """A JSON Schema validator's verdict on the two documents: accept, reject, silent (either)."""
    limited: bool = False
    """Whether a reader must judge it soon, and within 256 MiB."""
    argument: str | None = None
    """What the first problem names in place of a file, if anything."""
    compare: Callable[[Any], str | None] | None = None
    """Returns why an accepted answer is unexpected, or None: for steps that give more than a verdict."""


def dump(value: object) -> bytes:
    """Canonical JSON (SB-J-009)."""
    return (json.dumps(value, indent=2) + "\n").encode("ascii")


class Draft:
    """A small bundle, to be changed. ``seal`` lists the changed files, so that only the change itself is wrong."""

    def __init__(self, base: Path = TINY) -> None:
        places = sorted(path for path in base.rglob("*") if path.is_file())
        self.files = {path.relative_to(base).as_posix(): path.read_bytes() for path in places}
        del self.files["SHA256SUMS"]
        self.manifest = json.loads(self.files.pop("manifest.json"))

    def seal(self) -> Draft:
        """List each file's size and digests, and the values that depend on them."""
        for path, data in self.files.items():
            self.manifest["files"][path] = listed(path, data)
        for shard in self.manifest["shards"]:
            paths = [path for unit in shard["units"] for path in self.manifest["units"][unit]["files"]]
            shard["bytes"] = sum(self.manifest["files"][path]["size"] for path in paths)
        identify(self.manifest)
        return self

    def write(self, root: Path) -> None:
        """Write all files, and SHA256SUMS for the manifest's list."""
        manifest = dump(self.manifest)
        for path, data in {**self.files, "manifest.json": manifest, "SHA256SUMS": self.sums(manifest)}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)

    def sums(self, manifest: bytes) -> bytes:
        lines = {path: entry["sha256"] for path, entry in self.manifest["files"].items()}
        lines["manifest.json"] = hashlib.sha256(manifest).hexdigest()
        return "".join(f"{lines[path]}  {path}\n" for path in sorted(lines)).encode("ascii")


def listed(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if path.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        entry["header_sha256"] = hashlib.sha256(data[:end]).hexdigest()
    return entry


def identify(manifest: dict[str, Any]) -> None:
    """Set the architecture id and the fingerprint by the listed digests (SB-I-002, SB-I-003)."""
    files = manifest["files"]
    manifest["model"]["architecture"] = f"sha256:{files['architecture.json']['sha256']}"
    model = sorted(["architecture.json", *(path for unit in manifest["units"].values() for path in unit["files"])])
    lines = "".join(f"{files[path]['sha256']}  {path}\n" for path in model)
    manifest["model"]["fingerprint"] = f"sha256:{hashlib.sha256(lines.encode('ascii')).hexdigest()}"
