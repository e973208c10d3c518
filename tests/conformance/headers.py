"""Weight files with one fault each. The manifest lists the faulty file, so that only its header is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import LAYER, Case, Draft

RULES = {
    "field": ("SB-W-006", "SB-W-007"),
    "json": ("SB-W-005", "SB-J-011"),
    "weights.header": ("SB-W-001", "SB-W-002", "SB-W-003"),
    "weights.layout": ("SB-W-008", "SB-W-009", "SB-W-010"),
    "weights.tensors": ("SB-W-007", "SB-W-012"),
}
"""The rules that a case of each code holds."""


def _header_case(name: str, about: str, edit: Callable[[bytes], bytes], code: str, limited: bool = False) -> Case:
    def make(root: Path) -> None:
        draft = Draft()
        draft.files[LAYER] = edit(draft.files[LAYER])
        draft.seal().write(root)

    steps = ("stage", "verify")
    return Case(
        name=f"header/{name}",
        about=about,
        rules=RULES[code.partition(".")[0] if not code.startswith("weights.") else code],
        steps=steps,
        make=make,
        code=code,
        file=LAYER,
        limited=limited,
    )


def header_cases() -> Iterator[Case]:
    """One case for each way in which a weight file can be wrong."""

    def entries(edit: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            value = json.loads(_text(data))
            changed = edit(value)
            return _pack(json.dumps(changed or value, separators=(",", ":")).encode("ascii"), data)

        return change

    def text(edit: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        return lambda data: _pack(edit(_text(data)), data)

    def of(name: str, **values: object) -> Callable[[bytes], bytes]:
        return entries(lambda value: value[name].update(values))

    def length(number: int) -> Callable[[bytes], bytes]:
        return lambda data: number.to_bytes(8, "little") + data[8:]

    q, k, v = (f"layers.0.attention.{name}.weight" for name in ("query", "key", "value"))
    fields: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
        ("too-short", "under 8 bytes", lambda data: data[:7], "weights.header"),
        ("past-the-end", "a header past the end", length(4096 * 3 - 8), "weights.header"),
        ("length-2-64", "a length of 2^64 - 8", length(2**64 - 8), "weights.header"),
        ("length-0", "a length of 0", length(0), "weights.header"),
        ("unaligned", "data that doesn't begin at a page", length(4096), "weights.header"),
        ("not-utf8", "not UTF-8", text(lambda raw: b"\xff" + raw[1:]), "json.encoding"),
        ("bom", "a byte order mark", text(lambda raw: b"\xef\xbb\xbf" + raw), "json.encoding"),
        ("not-json", "not JSON", text(lambda raw: b"not json"), "json.syntax"),
        ("truncated", "truncated JSON", text(lambda raw: raw[:-1]), "json.syntax"),
        ("two", "two documents", text(lambda raw: raw + raw), "json.syntax"),
        ("array", "an array", text(lambda raw: b"[]"), "field.type"),
        ("nan", "NaN", text(lambda raw: raw.replace(b"[0,", b"[NaN,", 1)), "json.number"),
        ("duplicate", "a tensor twice", text(lambda raw: raw.replace(k.encode(), q.encode())), "json.duplicate-key"),
        ("leading-space", "a leading space", text(lambda raw: b" " + raw), "weights.layout"),
        ("line-feed", "a line feed at the end", text(lambda raw: raw + b"\n"), "weights.layout"),
        ("spaces", "spaces between", text(lambda raw: raw.replace(b",", b", ")), "weights.layout"),
        ("escape", "an escape", text(lambda raw: raw.replace(b"query", b"\\u0071uery")), "weights.layout"),
        ("dtype-unknown", "an unknown dtype", of(q, dtype="F8_E4M3"), "field.value"),
        ("dtype-other", "another dtype", of(q, dtype="I64"), "weights.tensors"),
        ("shape-other", "another shape of as many elements", of(q, shape=[4, 16]), "weights.tensors"),
        ("shape-swapped", "another number of dimensions", of(q, shape=[64]), "weights.tensors"),
        ("shape-negative", "two negative dimensions", of(q, shape=[-8, -8]), "field.value"),
        ("shape-fraction", "8.0", of(q, shape=[8.0, 8]), "field.type"),
        ("shape-overflow", "a product past 2^64", of(q, shape=[2**40] * 8), "weights.tensors"),
        ("shape-zero-times-2-62", "[0, 2^62]", of(q, shape=[0, 2**62]), "json.number"),
        ("shape-zero-times-2-52", "[0, 2^52]", of(q, shape=[0, 2**52]), "weights.tensors"),
        ("rank-100000", "100,000 dimensions", of(q, shape=[1] * 100_000), "field.value"),
        ("offset-negative", "a negative offset", of(q, data_offsets=[-256, 0]), "field.value"),
        ("offset-fraction", "a fractional offset", of(q, data_offsets=[0.5, 256.5]), "field.type"),
        ("offset-2-63", "an offset of 2^63", of(q, data_offsets=[2**63, 2**63 + 256]), "json.number"),
        ("offset-beyond", "an offset past the end", of(q, data_offsets=[2**52, 2**52 + 256]), "weights.layout"),
        ("offset-one", "one offset", of(q, data_offsets=[0]), "field.value"),
        ("overlap", "two tensors in one place", entries(_same_place(k, v)), "weights.layout"),
        ("hole", "a hole", entries(_shifted), "weights.layout"),
        ("backwards", "offsets backwards", entries(_backwards(q)), "weights.layout"),
        ("swapped", "two tensors of one shape change places", entries(_swapped(k, v)), "weights.layout"),
        ("order", "entries in another order", entries(_reversed), "weights.layout"),
        ("name-empty", "a tensor without a name", entries(lambda x: x.update({"": x[q]})), "weights.tensors"),
        ("name-dots", "a tensor ../x", entries(_renamed(q, "../x")), "weights.tensors"),
        ("missing", "a tensor is missing", entries(lambda x: x.pop(q) and None), "weights.tensors"),
        ("extra", "a tensor more", entries(lambda x: x.update(extra=x[q])), "weights.tensors"),
        ("proto-more", "a tensor __proto__ more", entries(lambda x: x.update(__proto__=x[q])), "weights.tensors"),
        ("proto", "a tensor __proto__", entries(_renamed(q, "__proto__")), "weights.tensors"),
        (
            "proto-metadata",
            "a member __proto__ that has the digest",
            entries(lambda x: x.update(__metadata__={"__proto__": x["__metadata__"]})),
            "field.missing",
        ),
        (
            "other-layer",
            "the tensors of layer 1",
            text(lambda raw: raw.replace(b"layers.0.", b"layers.1.")),
            "weights.tensors",
        ),
        ("no-metadata", "no __metadata__", entries(lambda x: x.pop("__metadata__") and None), "field.missing"),
        ("metadata", "another member of __metadata__", of("__metadata__", format="pt"), "field.unknown"),
        ("metadata-short", "a digest of 63", of("__metadata__", sha256="0" * 63), "field.value"),
        ("metadata-newline", "a digest and a line feed", of("__metadata__", sha256="0" * 64 + "\n"), "field.value"),
        ("null", "null for a tensor", entries(lambda x: x.update({q: None})), "field.type"),
        ("appended", "appended bytes", lambda data: data + b"\0", "weights.layout"),
        ("byte-short", "one byte short", lambda data: data[:-1], "weights.layout"),
        ("no-data", "no data", lambda data: data[:4096], "weights.layout"),
        ("padding", "a page of padding too many", _padded, "weights.layout"),
        ("padding-tab", "a tab in the padding", lambda data: data[:4000] + b"\t" + data[4001:], "weights.layout"),
    ]
    for name, about, edit, code in fields:
        yield _header_case(name, about, edit, code, limited=name == "rank-100000")
    over = 2**24 + 4096 - 8

    def huge(data: bytes) -> bytes:
        return over.to_bytes(8, "little") + b" " * over + data[4096:]

    def nested(data: bytes) -> bytes:
        return _pack(b"[" * 4_000_000, data)

    def many(data: bytes) -> bytes:
        value = json.loads(_text(data))
        entry = next(entry for name, entry in value.items() if name != "__metadata__")
        value |= {f"t{i}": entry for i in range(80_000)}
        return _pack(json.dumps(value, separators=(",", ":")).encode("ascii"), data)

    yield _header_case("over-16-mib", "a header over 16 MiB", huge, "weights.header", limited=True)
    yield _header_case("nested", "4,000,000-fold nesting", nested, "json.size", limited=True)
    yield _header_case(
        "nested-less", "100,000-fold nesting", text(lambda _: b"[" * 100_000), "json.depth", limited=True
    )
    yield _header_case("many", "80,000 tensors more", many, "weights.tensors", limited=True)


def _text(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" ")


def _pack(text: bytes, data: bytes) -> bytes:
    """Make a file of this header, with the right padding, and another file's data."""
    length = -(-(8 + len(text)) // 4096) * 4096 - 8
    return length.to_bytes(8, "little") + text.ljust(length) + data[8 + int.from_bytes(data[:8], "little") :]


def _padded(data: bytes) -> bytes:
    text = _text(data)
    return (8192 - 8).to_bytes(8, "little") + text.ljust(8192 - 8) + data[4096:]


Edit = Callable[[dict[str, Any]], object]


def _same_place(one: str, other: str) -> Edit:
    return lambda value: value[one].update(data_offsets=value[other]["data_offsets"])


def _swapped(one: str, other: str) -> Edit:
    def edit(value: dict[str, Any]) -> None:
        a, b = value[one], value[other]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

    return edit


def _backwards(name: str) -> Edit:
    return lambda value: value[name]["data_offsets"].reverse()


def _shifted(value: dict[str, Any]) -> None:
    last = [entry for name, entry in value.items() if name != "__metadata__"][-1]
    last["data_offsets"] = [offset + 64 for offset in last["data_offsets"]]


def _reversed(value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in ("__metadata__", *reversed([n for n in value if n != "__metadata__"]))}


def _renamed(name: str, new: str) -> Edit:
    def edit(value: dict[str, Any]) -> dict[str, Any]:
        return {new if each == name else each: entry for each, entry in value.items()}

    return edit
