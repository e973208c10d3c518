"""The vectors of the protocol: frames that a reader takes or refuses, and the bytes of encodings."""

from __future__ import annotations

import json
import struct
from types import ModuleType
from typing import Any

import jsonschema
import pytest

import splitbundle_schemas
from splitbundle.backends.onnxruntime import payloads as arrays
from splitbundle.backends.torch import payloads as tensors
from splitbundle.errors import BundleError
from splitbundle.records import as_dict
from splitbundle.wire import frames
from splitbundle.wire.messages import KINDS, PROTOCOL, Message
from tests.support.paths import TESTS

numpy = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
HERE = TESTS / "conformance" / "wire"
SCHEMA = jsonschema.Draft202012Validator(splitbundle_schemas.load("wire-header"))
BACKENDS = [pytest.param(tensors, id="torch"), pytest.param(arrays, id="onnxruntime")]
NOT_IN_SCHEMA = {"count-other-length", "rows-other-length", "sequence-short", "sequence-padding", "count-fraction"}
"""Refused vectors whose fault a schema can't say: fields that don't fit each other, and 1.0, which is its integer."""


def vectors(kind: str) -> list[Any]:
    found = sorted((HERE / kind).glob("*.json"))
    assert found
    return [pytest.param(json.loads(path.read_text("utf-8")), id=path.stem) for path in found]


def frame_of(vector: dict[str, Any]) -> bytes:
    """Return the frame of a vector, which has it as it is, or in its parts."""
    if "frame" in vector:
        return bytes.fromhex(vector["frame"])
    header = vector["header"].encode("utf-8") + b" " * vector["padding"]
    return b"SBW1" + struct.pack("<I", len(header)) + header + bytes.fromhex(vector["payload"])


def header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[4:8], "little")])


def parsed(message: Message) -> Any:
    """Return a message as its header says it, which has lists in place of tuples."""
    return json.loads(json.dumps({"op": message.op, **as_dict(message)}))


def decoded(module: ModuleType, payload: bytes, encoding: str, count: int, width: int) -> bytes:
    """Return the numbers of a payload as bytes of float32."""
    found = module.decode(memoryview(payload), encoding, (count,), max(count, 1), width)
    found = found.float().numpy() if module is tensors else found
    assert found.shape == (1, max(count, 1), width)
    return found[0, :count].astype("<f4").tobytes()  # type: ignore[no-any-return]


@pytest.mark.parametrize("vector", vectors("accept"))
def test_a_reader_takes_a_frame(vector: dict[str, Any]) -> None:
    data, expect = frame_of(vector), vector["expect"]
    message, payload = frames.unpack(data)
    found = parsed(message)
    if found.get("protocol", PROTOCOL) != PROTOCOL:  # of another protocol, only the number is known
        found = {name: found[name] for name in ("op", "protocol")}
    assert found == expect["header"]
    SCHEMA.validate(header_of(data))
    if vector.get("canonical"):
        assert frames.pack(message, [payload]) == data
        assert (len(data) - len(payload)) % 16 == 0
        assert list(header_of(data)) == list(parsed(message))
    assert frames.payload_size(message) == len(payload)
    assert ("numbers" in expect) == hasattr(message, "encoding")
    if "numbers" in expect:
        encoding, width = message.encoding, message.width  # type: ignore[union-attr]
        tokens = sum(message.count) if hasattr(message, "count") else message.tokens  # type: ignore[union-attr]
        for module in (tensors, arrays):
            assert decoded(module, bytes(payload), encoding, tokens, width).hex() == expect["numbers"]


@pytest.mark.parametrize("vector", vectors("reject"))
def test_a_reader_refuses_a_frame(vector: dict[str, Any], request: pytest.FixtureRequest) -> None:
    data, expect = frame_of(vector), vector["expect"]
    with pytest.raises(BundleError) as raised:
        frames.unpack(data, vector.get("limit", frames.MAX_FRAME))
    first = raised.value.problems[0]
    assert first.code == expect["code"]
    if "argument" in expect:
        assert first.argument == expect["argument"]
    else:
        assert (first.file, first.pointer) == ("header", expect["pointer"])
        if not expect["code"].startswith("json."):
            fits = request.node.callspec.id in NOT_IN_SCHEMA
            assert SCHEMA.is_valid(header_of(data)) == fits


def test_every_kind_has_a_vector_of_its_canonical_frame() -> None:
    canonical = {v.values[0]["expect"]["header"]["op"] for v in vectors("accept") if v.values[0].get("canonical")}
    assert canonical == KINDS.keys()


def test_no_vector_is_named_that_there_is_not() -> None:
    assert {param.id for param in vectors("reject")} >= NOT_IN_SCHEMA


@pytest.mark.parametrize("module", BACKENDS)
@pytest.mark.parametrize("vector", vectors("encodings"))
def test_the_bytes_of_an_encoding(vector: dict[str, Any], module: ModuleType) -> None:
    encoding, width, expect = vector["encoding"], vector["width"], vector["expect"]
    if "numbers" in vector:
        bits = numpy.array([int(number, 16) for number in vector["numbers"]], "<u4")
        values = bits.view("<f4").reshape(1, -1, width)
        given = torch.frombuffer(bytearray(bits.tobytes()), dtype=torch.float32).view(values.shape)
        hidden, count = (given if module is tensors else values), (values.shape[1],)
        if "code" in expect:
            with pytest.raises(BundleError) as raised:
                module.encode(hidden, count, encoding)
            assert raised.value.codes == (expect["code"],)
            assert not any(letter.isdigit() for letter in raised.value.problems[0].got)
            return
        assert b"".join(module.encode(hidden, count, encoding)).hex() == expect["payload"]
    payload = bytes.fromhex(expect["payload"])
    found = decoded(module, payload, encoding, len(expect["numbers"]) // width, width)
    assert [f"{bits:08x}" for (bits,) in struct.iter_unpack("<I", found)] == expect["numbers"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_autocast_changes_no_payload(dtype: str) -> None:
    """torch.cat, for one, takes no float16 there."""
    hidden = torch.arange(24).view(2, 3, 4).to(getattr(torch, dtype))
    made = [b"".join(tensors.encode(hidden, (1, 3), dtype))]
    with torch.autocast("cpu", torch.bfloat16):
        made.append(b"".join(tensors.encode(hidden, (1, 3), dtype)))
    assert made[0] == made[1] == hidden.view(6, 4)[[0, 3, 4, 5]].view(torch.uint8).numpy().tobytes()


@pytest.mark.rule("SB-X-005")
@pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("count", [(3, 3), (1, 3), (0, 2), (0, 0), (2, 1)])
def test_payloads_have_no_padding_and_both_backends_agree(count: tuple[int, ...], encoding: str) -> None:
    """The tokens of each row come first in a hidden state. Its padding may hold anything, also what is no number."""
    generator = numpy.random.default_rng(sum(count))
    values = generator.normal(size=(2, 3, 5)).astype("f4") * 100
    for row, tokens in enumerate(count):
        values[row, tokens:] = numpy.nan
    made = [
        b"".join(tensors.encode(torch.from_numpy(values), count, encoding)),
        b"".join(arrays.encode(values, count, encoding)),
        b"".join(arrays.encode(numpy.repeat(values, 2, axis=2)[:, :, ::2], count, encoding)),
        b"".join(tensors.encode(torch.from_numpy(numpy.repeat(values, 2, axis=2))[:, :, ::2], count, encoding)),
    ]
    assert len(set(made)) == 1
    assert len(made[0]) == frames.payload_bytes(encoding, sum(count), 5)
    back = tensors.decode(memoryview(made[0]), encoding, count, 3, 5).float().numpy()
    assert (back == arrays.decode(memoryview(made[0]), encoding, count, 3, 5)).all()
    for row, tokens in enumerate(count):
        assert (back[row, tokens:] == 0).all()
        if encoding == "float32":
            assert (back[row, :tokens] == values[row, :tokens]).all()


@pytest.mark.rule("SB-X-007", "SB-X-008")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_exact_encoding_carries_every_pattern(dtype: str) -> None:
    size = 4 if dtype == "float32" else 2
    bits = bytes(range(256)) * 4 + b"\xff" * 8 + b"\x00\x00\xc0\x7f\x01\x00\x80\x7f"
    hidden = torch.frombuffer(bytearray(bits), dtype=getattr(torch, dtype)).view(1, -1, 8 // size)
    count = (hidden.shape[1],)
    assert b"".join(tensors.encode(hidden, count, dtype)) == bits
    again = tensors.decode(memoryview(bits), dtype, count, count[0], 8 // size)
    assert b"".join(tensors.encode(again, count, dtype)) == bits
    if dtype == "float32":
        assert b"".join(arrays.encode(hidden.numpy(), count, dtype)) == bits


def test_vectors_have_the_members_that_their_readme_names() -> None:
    text = (HERE.parent / "README.md").read_text("utf-8").partition("\n## The protocol\n")[2].partition("\n## ")[0]
    known = {row.split("`")[1] for row in text.splitlines() if row.startswith("| `")}
    for kind in ("accept", "reject", "encodings", "dialogues"):
        for param in vectors(kind):
            vector = param.values[0]
            assert {"about", "rules"} <= vector.keys() <= known, param.id
            assert vector["rules"], param.id
            assert vector.get("expect", {}).keys() <= known, param.id
            for step in vector.get("steps", ()):
                assert step.keys() <= known, param.id


def test_a_boundary_that_was_unpacked_is_a_copy() -> None:
    import torch

    import splitbundle

    data = splitbundle.pack_boundary(torch.ones(1, 2, 96))
    splitbundle.unpack_boundary(data, backend="torch").hidden.mul_(5)
    assert float(splitbundle.unpack_boundary(data, backend="torch").hidden.max()) == 1
    with pytest.raises(BundleError, match=r"\[input.value\] data"):
        splitbundle.unpack_boundary("abc")  # type: ignore[arg-type]
