"""Weight files: the one form that the reader accepts, and each way to be wrong."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from splitbundle.backends.torch.weight_files import write_weights
from splitbundle.errors import BundleError
from splitbundle.format import dtypes, weight_layout
from splitbundle.format.manifest.document import File
from splitbundle.format.weight_layout import Tensor
from splitbundle.storage import weight_headers
from tests.support.yardsticks import at_most, parsing

LARGEST = 2**24
"""Bytes of the largest header. A small one with a huge number in it must not cost more than a large one does."""
PATH = "layer-000.safetensors"
# In order of use: 96 bytes, 64 bytes, 6 bytes, 128 bytes, 40 bytes. So the file has "wide" and "even" first.
TENSORS = {
    "odd": Tensor(dtype="float32", shape=(4, 6)),
    "even": Tensor(dtype="bfloat16", shape=(32,)),
    "tiny": Tensor(dtype="float16", shape=(3,)),
    "wide": Tensor(dtype="float32", shape=(2, 16)),
    "last": Tensor(dtype="float32", shape=(10,)),
}
ORDER = ("wide", "even", "odd", "last", "tiny")
DATA = random.Random(7).randbytes(sum(tensor.size for tensor in TENSORS.values()))


def entries() -> dict[str, Any]:
    """The canonical header's JSON."""
    value: dict[str, Any] = {"__metadata__": {"sha256": hashlib.sha256(DATA).hexdigest()}}
    offset = 0
    for name in ORDER:
        tensor = TENSORS[name]
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[tensor.dtype]
        value[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    return value


def pack(header: str | bytes | dict[str, Any], data: bytes = DATA, length: int | None = None) -> bytes:
    """Make a file from its header, with the right padding unless ``length`` says otherwise."""
    text = json.dumps(header, separators=(",", ":")) if isinstance(header, dict) else header
    raw = text.encode("ascii") if isinstance(text, str) else text
    if length is None:
        raw = raw.ljust(-(-(8 + len(raw)) // 4096) * 4096 - 8)
        length = len(raw)
    return struct.pack("<Q", length) + raw + data


def listed(file: bytes) -> File:
    """List a file in the manifest's form, whatever its contents, so that only the header's own faults count."""
    length = int.from_bytes(file[:8], "little")
    return File(
        size=len(file),
        sha256=hashlib.sha256(file).hexdigest(),
        header_sha256=hashlib.sha256(file[: 8 + length]).hexdigest(),
    )


def read(
    file: bytes, expected: dict[str, Tensor] | None = None, *, more: bool = False, of: File | None = None
) -> weight_layout.Weights:
    return weight_headers.read_header(
        io.BytesIO(file), PATH, of or listed(file), TENSORS if expected is None else expected, more=more
    )


def refused(file: bytes, expected: dict[str, Tensor] | None = None, *, more: bool = False) -> list[tuple[str, Any]]:
    """Return the codes, each with its pointer or offset."""
    with pytest.raises(BundleError) as raised:
        read(file, expected, more=more)
    assert {problem.file for problem in raised.value.problems} == {PATH}
    return [(p.code, p.offset if p.pointer is None else p.pointer) for p in raised.value.problems]


@pytest.mark.rule("SB-W-001", "SB-W-003", "SB-W-006", "SB-W-008", "SB-W-009", "SB-W-010")
def test_the_canonical_file_is_read() -> None:
    file = pack(entries())
    found = read(file)
    assert found.start == 4096
    assert [(name, offset) for name, (_, offset) in found.layout.items()] == [
        ("wide", 0),
        ("even", 128),
        ("odd", 192),
        ("last", 288),
        ("tiny", 328),
    ]
    assert {name: tensor for name, (tensor, _) in found.layout.items()} == TENSORS
    assert found.data_sha256 == hashlib.sha256(DATA).hexdigest()
    assert weight_layout.header(found.layout, found.data_sha256) + DATA == file


@pytest.mark.rule("SB-W-008")
def test_tensors_are_aligned() -> None:
    generator = random.Random(3)
    names = ("float32", "float16", "bfloat16", "int64")
    for _ in range(200):
        tensors = {
            f"t{i}": Tensor(dtype=generator.choice(names), shape=(generator.choice([1, 3, 8, 32, 33, 64]),))
            for i in range(generator.randrange(1, 12))
        }
        layout = weight_layout.lay_out(tensors)
        end = 0
        for tensor, offset in layout.values():
            assert offset == end
            assert offset % (64 if tensor.size % 64 == 0 else dtypes.ITEM_SIZES[tensor.dtype]) == 0
            end += tensor.size
        assert layout.keys() == tensors.keys()


@pytest.mark.rule("SB-W-001", "SB-W-011")
def test_what_is_written_is_what_other_readers_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    values = {
        name: torch.randn(tensor.shape, generator=generator).to(getattr(torch, tensor.dtype))
        for name, tensor in TENSORS.items()
    }
    path = tmp_path / PATH
    file = write_weights(path, TENSORS, values.__getitem__)()
    data = path.read_bytes()
    assert file == listed(data)
    assert read(data).data_sha256 == hashlib.sha256(data[4096:]).hexdigest()
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == set(TENSORS)
        for name, value in values.items():
            assert torch.equal(opened.get_tensor(name), value)
    odd = data[4096 + 192 : 4096 + 288]
    assert list(struct.unpack("<24f", odd)) == values["odd"].reshape(-1).tolist()


@pytest.mark.rule("SB-W-003")
@pytest.mark.parametrize(
    ("name", "start"), [(3000, 4096), (4096 - 8 - 148, 4096), (4096 - 8 - 147, 8192), (5000, 8192)]
)
def test_the_padding_is_as_short_as_it_can_be(name: int, start: int) -> None:
    # Without the name, this header's JSON has 148 characters.
    tensors = {"n" * name: Tensor(dtype="float32", shape=(10,))}
    header = weight_layout.header(weight_layout.lay_out(tensors), "0" * 64)
    assert len(header.rstrip(b" ")) == 8 + 148 + name
    assert len(header) == start


def change(edit: Callable[[dict[str, Any]], object]) -> bytes:
    value = entries()
    edit(value)
    return pack(value)


def reorder(*names: str) -> bytes:
    """The file with its tensors in another order, without holes."""
    value, offset = entries(), 0
    result = {"__metadata__": value["__metadata__"]}
    for name in names:
        size = TENSORS[name].size
        result[name] = value[name] | {"data_offsets": [offset, offset + size]}
        offset += size
    return pack(result)


@pytest.mark.rule("SB-W-008", "SB-W-009")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(change(lambda v: v["tiny"].update(data_offsets=[330, 336])), id="hole"),
        pytest.param(change(lambda v: v["wide"].update(data_offsets=[32, 160])), id="overlap"),
        pytest.param(change(lambda v: v["even"].update(data_offsets=[0, 64])), id="same place"),
        pytest.param(change(lambda v: v["tiny"].update(data_offsets=[328, 335])), id="a length that isn't the shape's"),
        pytest.param(change(lambda v: v["tiny"].update(data_offsets=[334, 328])), id="backwards"),
        pytest.param(change(lambda v: v["tiny"].update(data_offsets=[2**52, 2**52 + 6])), id="past the end"),
        pytest.param(reorder("even", "wide", "odd", "last", "tiny"), id="order of aligned tensors"),
        pytest.param(reorder("odd", "even", "tiny", "wide", "last"), id="order of use"),
        pytest.param(reorder("wide", "even", "tiny", "odd", "last"), id="rising item size"),
        pytest.param(pack({name: entries()[name] for name in (*ORDER, "__metadata__")}), id="metadata last"),
        pytest.param(
            change(lambda v: v.update(odd={key: v["odd"][key] for key in ("shape", "dtype", "data_offsets")})),
            id="order of keys",
        ),
        pytest.param(pack(" " + json.dumps(entries(), separators=(",", ":"))), id="leading space"),
        pytest.param(pack(json.dumps(entries())), id="spaces between"),
        pytest.param(pack(json.dumps(entries(), separators=(",", ":")) + "\n"), id="line feed at the end"),
        pytest.param(pack(json.dumps(entries(), separators=(",", ":")).replace("odd", "\\u006fdd")), id="escapes"),
        pytest.param(
            pack(json.dumps(entries(), separators=(",", ":")).ljust(8192 - 8), length=8192 - 8), id="too much padding"
        ),
    ],
)
def test_another_layout_is_refused(file: bytes) -> None:
    (problem,) = refused(file)
    assert problem[0] == "weights.layout"
    # The offset is where the header leaves the canonical one.
    canonical = pack(entries())
    assert problem[1] == next(i for i, (a, b) in enumerate(zip(file, canonical, strict=False)) if a != b)


@pytest.mark.rule("SB-W-007")
def test_tensors_are_those_of_the_model() -> None:
    file = pack(entries())
    more = TENSORS | {"new": Tensor(dtype="float32", shape=(1,))}
    assert refused(file, more) == [("weights.tensors", "")]
    fewer = {name: tensor for name, tensor in TENSORS.items() if name != "tiny"}
    assert refused(file, fewer) == [("weights.tensors", "")]
    for name, tensor in (
        ("odd", Tensor(dtype="float32", shape=(6, 4))),
        ("odd", Tensor(dtype="float32", shape=(24,))),
        ("last", Tensor(dtype="int64", shape=(5,))),
        ("even", Tensor(dtype="float16", shape=(32,))),
    ):
        assert refused(file, TENSORS | {name: tensor}) == [("weights.tensors", f"/{name}")]


@pytest.mark.rule("SB-W-007")
def test_the_message_says_what_was_expected_and_what_came() -> None:
    with pytest.raises(BundleError) as raised:
        read(pack(entries()), TENSORS | {"odd": Tensor(dtype="float32", shape=(6, 4))})
    assert str(raised.value) == f"[weights.tensors] {PATH} /odd: expected float32 [6, 4], got float32 [4, 6]"


@pytest.mark.rule("SB-W-006", "SB-W-007")
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda v: v.pop("__metadata__"), ("field.missing", "")),
        (lambda v: v["__metadata__"].pop("sha256"), ("field.missing", "/__metadata__")),
        (lambda v: v["__metadata__"].update(format="pt"), ("field.unknown", "/__metadata__/format")),
        (lambda v: v["__metadata__"].update(sha256="0" * 63), ("field.value", "/__metadata__/sha256")),
        (lambda v: v["__metadata__"].update(sha256="0" * 64 + "\n"), ("field.value", "/__metadata__/sha256")),
        (lambda v: v["odd"].pop("shape"), ("field.missing", "/odd")),
        (lambda v: v["odd"].update(name="x"), ("field.unknown", "/odd/name")),
        (lambda v: v["odd"].update(dtype="F8_E4M3"), ("field.value", "/odd/dtype")),
        (lambda v: v["odd"].update(dtype="float32"), ("field.value", "/odd/dtype")),
        (lambda v: v["odd"].update(shape=[4.0, 6]), ("field.type", "/odd/shape/0")),
        (lambda v: v["odd"].update(shape=[-4, -6]), ("field.value", "/odd/shape/0")),
        (lambda v: v["odd"].update(shape=24), ("field.type", "/odd/shape")),
        (lambda v: v["odd"].update(shape=[1] * 100_000), ("field.value", "/odd/shape")),
        (lambda v: v["odd"].update(shape=[0, 2**62]), ("json.number", None)),
        (lambda v: v["odd"].update(shape=[2**40] * 8), ("weights.tensors", "/odd")),
        (lambda v: v["odd"].update(shape=[0, 2**52]), ("weights.tensors", "/odd")),
        (lambda v: v["odd"].update(data_offsets=[-1, 95]), ("field.value", "/odd/data_offsets/0")),
        (lambda v: v["odd"].update(data_offsets=[0.5, 96]), ("field.type", "/odd/data_offsets/0")),
        (lambda v: v["odd"].update(data_offsets=[0]), ("field.value", "/odd/data_offsets")),
        (lambda v: v["odd"].update(data_offsets=[2**63, 2**63 + 96]), ("json.number", None)),
        (lambda v: v.update({"": v["odd"]}), ("weights.tensors", "")),
        (lambda v: v.update({"../x": v["odd"]}), ("weights.tensors", "")),
        (lambda v: v.update(odd=None), ("field.type", "/odd")),
    ],
)
def test_a_wrong_field_of_the_header_is_refused(edit: Callable[[dict[str, Any]], object], problem: Any) -> None:
    file = change(edit)
    with at_most(10, parsing, LARGEST):
        assert refused(file)[0] == problem


@pytest.mark.rule("SB-W-005")
@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "json.syntax"),
        (b"not json", "json.syntax"),
        (b'{"__metadata__":{}', "json.syntax"),
        (b"{}{}", "json.syntax"),
        (b'{"a":1,"a":1}', "json.duplicate-key"),
        (json.dumps(entries()).replace('"wide"', '"odd"').encode(), "json.duplicate-key"),
        (b"\xff\xfe{}", "json.encoding"),
        (b"\xef\xbb\xbf{}", "json.encoding"),
        (b'{"a":NaN}', "json.number"),
        (b"[" * 100_000, "json.depth"),
        (b"[]", "field.type"),
    ],
)
def test_the_header_is_strict_json(text: bytes, code: str) -> None:
    assert refused(pack(text))[0][0] == code


@pytest.mark.rule("SB-W-002", "SB-W-003")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x00" * 7, id="under 8 bytes"),
        pytest.param(pack("{}", b"", length=2**64 - 8), id="2^64 - 8"),
        pytest.param(pack("{}", b"", length=4096 * 3 - 8), id="past the end"),
        pytest.param(struct.pack("<Q", 16 * 2**20 + 4096 - 8) + bytes(16 * 2**20 + 4096), id="over 16 MiB"),
        pytest.param(pack("{}", DATA, length=2), id="data at 10"),
        pytest.param(pack("{}".ljust(4096), DATA, length=4096), id="data at 4104"),
        pytest.param(pack("", DATA, length=0), id="length 0"),
    ],
)
def test_a_wrong_length_is_refused_before_anything_is_read(file: bytes) -> None:
    with at_most(10, parsing, LARGEST):
        assert refused(file) == [("weights.header", 0)]


@pytest.mark.rule("SB-W-002")
def test_a_file_that_ends_within_its_header_is_refused() -> None:
    file = pack(entries())
    with pytest.raises(BundleError, match="a file that ends after 1000"):
        read(file[:1000], of=listed(file))


@pytest.mark.rule("SB-W-010")
@pytest.mark.parametrize("data", [DATA + b"\0", DATA[:-1], DATA + bytes(4096), b""])
def test_the_file_ends_with_its_last_tensor(data: bytes) -> None:
    assert refused(pack(entries(), data)) == [("weights.layout", 4096 + len(DATA))]


@pytest.mark.rule("SB-W-004")
def test_the_digest_comes_before_the_parser() -> None:
    whole, broken = pack(entries()), pack("not json")
    with pytest.raises(BundleError) as raised:
        read(broken, of=File(size=len(broken), sha256="0" * 64, header_sha256=listed(whole).header_sha256))
    assert raised.value.codes == ("file.header-digest",)
    # The digest covers the length and the padding, too.
    other = bytearray(whole)
    other[4000] = ord("\t")
    with pytest.raises(BundleError) as raised:
        read(bytes(other), of=listed(whole))
    assert raised.value.codes == ("file.header-digest",)


def part(names: tuple[str, ...]) -> bytes:
    tensors = {name: TENSORS[name] for name in names}
    data = bytes(sum(tensor.size for tensor in tensors.values()))
    return weight_layout.header(weight_layout.lay_out(tensors), hashlib.sha256(data).hexdigest()) + data


@pytest.mark.rule("SB-W-012")
def test_parts_hold_the_first_and_then_the_rest() -> None:
    first, second = part(("odd", "even", "tiny")), part(("wide", "last"))
    found = read(first, more=True)
    # Each part has its own layout: here "even" comes first.
    assert list(found.layout) == ["even", "odd", "tiny"]
    left = {name: tensor for name, tensor in TENSORS.items() if name not in found.layout}
    assert list(read(second, left).layout) == ["wide", "last"]


@pytest.mark.rule("SB-W-012")
def test_parts_that_dont_add_up_are_refused() -> None:
    rest = {"wide": TENSORS["wide"], "last": TENSORS["last"]}
    # The first part skips a tensor, or holds another's; the last one lacks one; a part holds nothing.
    assert {code for code, _ in refused(part(("odd", "tiny")), more=True)} == {"weights.tensors"}
    assert {code for code, _ in refused(part(("wide", "last")), more=True)} == {"weights.tensors"}
    assert {code for code, _ in refused(part(("wide",)), rest)} == {"weights.tensors"}
    assert {code for code, _ in refused(part(("odd",)), rest)} == {"weights.tensors"}
    assert refused(part(()), more=True) == [("weights.tensors", "")]
    with pytest.raises(BundleError, match=r"weights\.tensors.*at least one tensor"):
        weight_headers.read_header(io.BytesIO(part(())), PATH, listed(part(())), {}, part=True)


@pytest.mark.rule("SB-W-012")
def test_a_unit_without_tensors_has_a_file_without_data(tmp_path: Path) -> None:
    # A tied head without a norm is such a unit.
    file = write_weights(tmp_path / PATH, {}, lambda name: torch.empty(0))()
    data = (tmp_path / PATH).read_bytes()
    assert file == listed(data) == listed(part(()))
    assert len(data) == 4096
    assert read(data, {}).layout == {}
    with safe_open(tmp_path / PATH, framework="pt") as opened:
        assert list(opened.keys()) == []
    assert refused(data, {"odd": TENSORS["odd"]}) == [("weights.tensors", "")]
    assert refused(part(("odd",)), {}) == [("weights.tensors", "")]


@pytest.mark.rule("SB-W-005", "SB-W-007")
def test_many_tensors_are_judged_soon() -> None:
    value = entries() | {f"t{i}": entries()["tiny"] for i in range(120_000)}
    file = pack(value)
    assert len(file) < 16 * 2**20
    # It takes about five times as long as the standard library, which checks nothing, takes to parse as many bytes. The
    # square of the number of tensors would take minutes.
    with at_most(30, parsing, len(file)):
        assert refused(file) == [("weights.tensors", "")]
