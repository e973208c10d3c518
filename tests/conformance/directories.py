"""Whole directories: the small bundle with missing files, extra files, other things than files, or other files."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from conformance.case import LAYER, TOKENIZER, VECTORS, Case, Draft

Spoil = Callable[[Path], object]
EVERY = ("open", "stage", "verify")
RULES: dict[str | None, tuple[str, ...]] = {
    None: ("SB-D-001", "SB-D-006", "SB-D-008", "SB-D-013", "SB-D-014"),
    "file.digest": ("SB-D-007",),
    "file.header-digest": ("SB-D-012", "SB-W-004"),
    "file.kind": ("SB-D-004", "SB-D-005"),
    "file.missing": ("SB-D-001", "SB-D-008", "SB-D-013"),
    "file.size": ("SB-D-007", "SB-D-010"),
    "file.unlisted": ("SB-D-006",),
    "sums.mismatch": ("SB-D-010",),
    "weights.tensors": ("SB-W-012",),
}
"""The rules that a case of each code holds."""


def _spoilt(name: str, about: str, steps: tuple[str, ...], spoil: Spoil, code: str | None, file: str | None) -> Case:
    """The bundle, written whole and then changed."""

    def make(root: Path) -> None:
        Draft().write(root)
        spoil(root)

    return Case(name=f"directory/{name}", about=about, rules=RULES[code], steps=steps, make=make, code=code, file=file)


def directory_cases() -> Iterator[Case]:
    """Cases with missing files, extra files, other things than files, or other files."""
    yield _spoilt("whole", "nothing is wrong", (*EVERY, "exact"), lambda root: None, None, None)
    sealed = Case(
        name="directory/sealed",
        about="the small bundle, listed anew: what the other cases start from is right",
        rules=RULES[None],
        steps=(*EVERY, "exact"),
        make=lambda root: Draft().seal().write(root),
    )
    yield sealed
    about = "a signature, which no manifest lists"
    sign = _at("signatures/a.sigstore.json", lambda place: place.write_text("not opened"))
    yield _spoilt("signature", about, (*EVERY, "exact"), sign, None, None)
    yield from _signature_cases()
    yield from _missing_cases()
    yield from _kind_cases()
    yield from _other_content_cases()
    for name, make in _UNLISTED.items():
        path = f"more/{name}" if name.startswith("deep") else name
        about = f"a file that isn't listed: {name}"
        yield _spoilt(f"unlisted-{name}", f"{about} is reported", EVERY, _at(path, make), None, None)
        yield _spoilt(f"unlisted-{name}-exact", about, ("exact",), _at(path, make), "file.unlisted", path)


def _signature_cases() -> Iterator[Case]:
    """Of many signatures, the first 64 by their names are signatures (SB-D-014)."""

    def sign(count: int) -> Spoil:
        def spoil(root: Path) -> None:
            (root / "signatures").mkdir()
            for i in range(count):
                (root / "signatures" / f"{i:03}.sigstore.json").write_text("not opened")

        return spoil

    yield _spoilt("signatures-64", "64 signatures", ("verify", "exact"), sign(64), None, None)
    about, last = "65 signatures", "signatures/064.sigstore.json"
    yield _spoilt("signatures-65", about, ("verify",), sign(65), None, None)
    yield _spoilt("signatures-65-exact", about, ("exact",), sign(65), "file.unlisted", last)


def _missing_cases() -> Iterator[Case]:
    def remove(path: str) -> Spoil:
        return lambda root: (root / path).unlink()

    def remove_all(*paths: str) -> Spoil:
        def spoil(root: Path) -> None:
            for path in paths:
                (root / path).unlink()

        return spoil

    yield _spoilt("no-manifest", "no manifest", EVERY, remove("manifest.json"), "file.missing", None)
    yield _spoilt("no-directory", "nothing at all", EVERY, lambda root: shutil.rmtree(root), "file.missing", None)
    about = "no architecture"
    yield _spoilt("no-architecture", about, EVERY, remove("architecture.json"), "file.missing", "architecture.json")
    yield _spoilt("no-sums", "no SHA256SUMS", ("verify",), remove("SHA256SUMS"), "file.missing", "SHA256SUMS")
    yield _spoilt("no-layer-open", "a partial bundle opens", ("open",), remove(LAYER), None, None)
    yield _spoilt("no-layer", "a layer's file is missing", ("stage", "verify"), remove(LAYER), "file.missing", LAYER)
    top = (LAYER, "head.safetensors", "top.onnx")
    about = "the first shard alone"
    yield _spoilt("part", about, ("open", "verify", "exact"), remove_all(*top), None, None)
    beside = (VECTORS, TOKENIZER, "README.md", "SHA256SUMS", "tokenizer/generation_config.json")
    about = "the first shard alone, with nothing beside it"
    yield _spoilt("part-alone", about, ("open", "verify", "exact"), remove_all(*top, *beside), None, None)
    for left in top:
        about = f"the first shard, and {left} of the other one"
        lost = [path for path in top if path != left]
        yield _spoilt(f"part-and-{Path(left).stem}", about, ("verify",), remove_all(*lost), "file.missing", min(lost))
    about = "no shard is whole"
    gone = (*top, "embedding.safetensors")
    yield _spoilt("no-shard", about, ("verify",), remove_all(*gone), "file.missing", "embedding.safetensors")
    about = "the first shard alone, with another byte"

    def damaged(root: Path) -> None:
        remove_all(*top)(root)
        data = bytearray((root / "embedding.safetensors").read_bytes())
        data[-1] ^= 1
        (root / "embedding.safetensors").write_bytes(data)

    yield _spoilt("part-damaged", about, ("verify",), damaged, "file.digest", "embedding.safetensors")
    for path in (VECTORS, TOKENIZER, "README.md"):
        stem = Path(path).stem.lower()
        yield _spoilt(f"no-{stem}", f"{path} is missing", ("verify",), remove(path), "file.missing", path)


def _kind_cases() -> Iterator[Case]:
    for path, steps in (("manifest.json", EVERY), ("architecture.json", EVERY), (LAYER, ("stage", "verify"))):
        for kind, make in _KINDS.items():
            name = f"{kind}-{Path(path).name.partition('.')[0]}"
            about = f"{path} is a {kind}"
            yield _spoilt(name, about, steps, _at(path, make), "file.kind", path)
    for kind in ("link", "pipe"):
        about = f"SHA256SUMS is a {kind}"
        spoil = _at("SHA256SUMS", _KINDS[kind])
        yield _spoilt(f"{kind}-sums", about, ("verify",), spoil, "file.kind", "SHA256SUMS")

    def link_directory(root: Path) -> None:
        (root / "tokenizer").rename(root.parent / f"{root.name}-tokenizer")
        (root / "tokenizer").symlink_to(f"../{root.name}-tokenizer")

    about = "a directory on the way to a file is a link"
    yield _spoilt(
        "link-on-the-way", about, ("verify",), link_directory, "file.kind", "tokenizer/generation_config.json"
    )


def _at(path: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(root: Path) -> None:
        place = root / path
        if place.exists():
            place.rename(root.parent / f"{root.name}-moved")
        place.parent.mkdir(exist_ok=True)
        make(place)

    return spoil


def _link(place: Path) -> None:
    place.symlink_to(f"../{place.parent.name}-moved")


_KINDS: dict[str, Callable[[Path], object]] = {
    "link": _link,
    "hanging-link": lambda place: place.symlink_to("../nowhere"),
    "directory": lambda place: place.mkdir(),
    "pipe": lambda place: os.mkfifo(place),
    "socket": lambda place: os.mknod(place, stat.S_IFSOCK | 0o600),
    "device": lambda place: os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}
_UNLISTED: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda place: place.write_text("mine"),
    "hanging-link": lambda place: place.symlink_to("nowhere"),
    "pipe": lambda place: os.mkfifo(place),
    "deep.safetensors": lambda place: place.write_bytes(b"\0" * 9),
}


def _other_content_cases() -> Iterator[Case]:
    def change(path: str, edit: Callable[[bytes], bytes]) -> Spoil:
        return lambda root: (root / path).write_bytes(edit((root / path).read_bytes()))

    def last(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    def first_of_header(data: bytes) -> bytes:
        return data[:40] + bytes([data[40] ^ 1]) + data[41:]

    later = ("stage", "verify")
    yield _spoilt("layer-shorter", "a byte short", later, change(LAYER, lambda data: data[:-1]), "file.size", LAYER)
    yield _spoilt("layer-longer", "a byte more", later, change(LAYER, lambda data: data + b"\0"), "file.size", LAYER)
    yield _spoilt("layer-empty", "no byte", later, change(LAYER, lambda data: b""), "file.size", LAYER)
    yield _spoilt("layer-digest", "a byte of the data", ("verify",), change(LAYER, last), "file.digest", LAYER)
    about = "a byte of a header"
    yield _spoilt("layer-header", about, ("stage",), change(LAYER, first_of_header), "file.header-digest", LAYER)
    yield _spoilt("layer-header-verify", about, ("verify",), change(LAYER, first_of_header), "file.digest", LAYER)
    for path in (VECTORS, TOKENIZER, "README.md", "top.onnx"):
        name, about = f"{Path(path).name.lower()}-digest", f"a byte of {path}"
        yield _spoilt(name, about, ("verify",), change(path, last), "file.digest", path)
    spoil = change("architecture.json", lambda data: b"x" * len(data))
    yield _spoilt("architecture-digest", "hashed before it is parsed", EVERY, spoil, "file.digest", "architecture.json")
    spoil = change("architecture.json", lambda data: data + b" ")
    yield _spoilt("architecture-longer", "a byte more", EVERY, spoil, "file.size", "architecture.json")

    def of_another_model(root: Path) -> None:
        """The same names and shapes with other numbers: only digests can tell."""
        data = (root / LAYER).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        numbers = bytes(len(data) - end)
        old = hashlib.sha256(data[end:]).hexdigest().encode("ascii")
        header = data[:end].replace(old, hashlib.sha256(numbers).hexdigest().encode("ascii"))
        (root / LAYER).write_bytes(header + numbers)

    about = "the layer of another model of this architecture"
    yield _spoilt("mixed", about, ("stage",), of_another_model, "file.header-digest", LAYER)
    yield _spoilt("mixed-verify", about, ("verify",), of_another_model, "file.digest", LAYER)

    def sparse(root: Path) -> None:
        os.truncate(root / LAYER, 2**43)

    about = "a sparse file of 8 TiB in place of a layer"
    yield _limited(_spoilt("sparse", about, later, sparse, "file.size", LAYER))
    for path in (LAYER, VECTORS, "README.md"):
        yield _listed_sparse(path)
    edits: dict[str, tuple[Callable[[bytes], bytes], str]] = {
        "blank-line": (lambda data: data + b"\n", "SHA256SUMS"),
        "star": (lambda data: data.replace(b"  ", b" *", 1), "SHA256SUMS"),
        "order": (lambda data: b"".join(reversed(data.splitlines(keepends=True))), "SHA256SUMS"),
        "line-less": (lambda data: b"".join(data.splitlines(keepends=True)[1:]), "SHA256SUMS"),
        "line-more": (lambda data: data + b"0" * 64 + b"  extra\n", "SHA256SUMS"),
        "line-feeds": (lambda data: data.replace(b"\n", b"\r\n"), "SHA256SUMS"),
        "cut": (lambda data: data[:-1], "SHA256SUMS"),
        "empty": (lambda data: b"", "SHA256SUMS"),
        "manifest": (lambda data: _redigest(data, b"manifest.json"), "manifest.json"),
        "manifest-half": (lambda data: _redigest(data, b"manifest.json", digits=32), "SHA256SUMS"),
        "manifest-over-half": (lambda data: _redigest(data, b"manifest.json", digits=33), "manifest.json"),
        "layer": (lambda data: _redigest(data, LAYER.encode("ascii")), "SHA256SUMS"),
        "too-large": (lambda data: data + b"\n" * 2**24, "SHA256SUMS"),
    }
    for name, (edit, culprit) in edits.items():
        code = "file.size" if name == "too-large" else "sums.mismatch"
        yield _spoilt(f"sums-{name}", f"SHA256SUMS: {name}", ("verify",), change("SHA256SUMS", edit), code, culprit)


def _redigest(data: bytes, path: bytes, digits: int = 64) -> bytes:
    """Change some of the digits of a path's line."""

    def other(line: bytes) -> bytes:
        if not line.endswith(b"  " + path + b"\n"):
            return line
        return bytes(b"10"[digit == b"1"[0]] for digit in line[:digits]) + line[digits:]

    return b"".join(map(other, data.splitlines(keepends=True)))


def _limited(case: Case) -> Case:
    return replace(case, limited=True)


def _listed_sparse(path: str) -> Case:
    """The manifest lists 8 TiB. Hashing them would take hours, so a reader must refuse the size (SB-M-053)."""

    def make(root: Path) -> None:
        draft = Draft()
        draft.manifest["files"][path]["size"] = 2**43
        for shard in draft.manifest["shards"]:
            listed = [each for unit in shard["units"] for each in draft.manifest["units"][unit]["files"]]
            shard["bytes"] = sum(draft.manifest["files"][each]["size"] for each in listed)
        draft.write(root)
        os.truncate(root / path, 2**43)

    return Case(
        name=f"directory/listed-sparse-{Path(path).stem.lower()}",
        about=f"a sparse {path} of 8 TiB that the manifest lists",
        rules=("SB-M-053",),
        steps=("open", "verify"),
        make=make,
        code="manifest.files",
        file="manifest.json",
        pointer=f"/files/{path}/size",
        points=True,
        limited=True,
    )
