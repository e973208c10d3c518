"""The header of a weight file: safetensors in the canonical layout (``spec/v1/bundle.md``, "Weight files")."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.dtypes import SAFETENSORS_CODES, TABLE
from splitbundle.format.fields import Field, Problems, escape
from splitbundle.records import record

ALIGNMENT: Final = 4096
"""The data begins at a multiple of this, a page, so that a mapping of the data can start there."""
TENSOR_ALIGNMENT: Final = 64
MAX_HEADER: Final = 16 * 2**20
SCALE: Final = "_scale"
"""The end of the name of stored scales, which follows the name of the matrix that they belong to."""


@record(frozen=True, slots=True, kw_only=True)
class Tensor:
    """The dtype and the shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return TABLE[self.dtype].size * math.prod(self.shape)


@record(frozen=True, slots=True, kw_only=True)
class Stored:
    """The place of a tensor in a file."""

    file: str
    offset: int
    """The offset of its first byte in the file."""
    tensor: Tensor


Layout = dict[str, tuple[Tensor, int]]
"""Name -> the tensor and the offset of its first byte in the data, in the order of the data."""


def lay_out(tensors: dict[str, Tensor]) -> Layout:
    """Return the layout of some tensors.

    Tensors with a multiple of 64 bytes come first, matrices before the rest. The others follow, larger items first.
    So the former are aligned to 64 bytes and the latter to their items, without holes and padding. Scales don't count
    as matrices, and come before other vectors. So the matrices that multiply the same input lie side by side, and so
    do their scales and their biases. Within each group the order is the given one, the order of use.
    """

    def place(name: str) -> tuple[bool, int, bool]:
        tensor, is_scale = tensors[name], name.endswith(SCALE)
        if tensor.size % TENSOR_ALIGNMENT == 0:
            return False, 1 if is_scale or len(tensor.shape) < 2 else 0, not is_scale
        return True, -TABLE[tensor.dtype].size, not is_scale

    layout: Layout = {}
    offset = 0
    for name in sorted(tensors, key=place):
        layout[name] = (tensors[name], offset)
        offset += tensors[name].size
    return layout


def header(layout: Layout, data_sha256: str) -> bytes:
    """Return the bytes before the data: the length, and the JSON, padded with spaces up to the alignment."""
    entries: dict[str, Any] = {"__metadata__": {"sha256": data_sha256}}
    for name, (tensor, start) in layout.items():
        entries[name] = {
            "dtype": TABLE[tensor.dtype].safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.size],
        }
    text = strict_json.dump_compact(entries)
    length = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8
    return length.to_bytes(8, "little") + text.ljust(length, b" ")


def file_size(tensors: dict[str, Tensor]) -> int:
    """Return the size in bytes of a weight file with these tensors."""
    return len(header(lay_out(tensors), "0" * 64)) + sum(tensor.size for tensor in tensors.values())


@record(frozen=True, slots=True, kw_only=True)
class Weights:
    """The content of the header of one file."""

    start: int
    """The offset of the data in the file."""
    layout: Layout
    data_sha256: str


def parse(
    raw: bytes, path: str, size: int, expected: dict[str, Tensor], *, part: bool = False, more: bool = False
) -> Weights:
    """Check the header ``raw`` of a file of ``size`` bytes. See ``storage.weight_headers.read_header``."""
    last = not more and (bool(expected) or not part)  # then the tensors of the header are known before it is read
    if last and (canonical_weights := as_expected(raw, size, expected)) is not None:
        return canonical_weights
    problems = Problems(path)
    document = Field(strict_json.parse(raw[8:].rstrip(b" "), path), problems)
    if isinstance(document.value, dict) and len(document.value.keys() - {"__metadata__"}) > len(expected):
        most = f"at most {len(expected)} tensors, those that the architecture implies"
        problems.add("weights.tensors", "", most, f"{len(document.value) - 1}")
        problems.raise_if_any()
    metadata = document.members(["__metadata__"], open=True)["__metadata__"].members(["sha256"])
    data_sha256 = metadata["sha256"].string(names.SHA256, "64 digits of 0-9a-f")
    found = {name: _tensor(field) for name, field in document.mapping() if name != "__metadata__"}
    problems.raise_if_any()
    if more:
        expected = dict(islice(expected.items(), len(found)))
    if not expected and (part or more):
        problems.add("weights.tensors", "", "at least one tensor", "none")
    for name, tensor in expected.items():
        if name not in found:
            problems.add("weights.tensors", "", f"a tensor {quoted(name)}", "none")
        elif found[name] != tensor:
            pointer = f"/{name}"
            problems.add("weights.tensors", pointer, str(tensor), str(found[name]))
    for name in found:
        if name not in expected:
            extra = f"/{escape(name)}"
            problems.add("weights.tensors", extra, "only tensors that the architecture implies", quoted(name))
    problems.raise_if_any()
    layout = lay_out(expected)
    canonical = header(layout, data_sha256)
    if raw != canonical:
        at = next(
            (i for i, (a, b) in enumerate(zip(raw, canonical, strict=False)) if a != b),
            min(len(raw), len(canonical)),
        )
        raise BundleError(
            Problem(
                code="weights.layout",
                file=path,
                offset=at,
                expected=f"the canonical header of these tensors, {quoted(canonical[at : at + 24].decode('ascii'))}",
                got=quoted(raw[at : at + 24].decode("latin-1")),
            )
        )
    end = len(raw) + sum(tensor.size for tensor in expected.values())
    if size != end:
        raise BundleError(
            Problem(
                code="weights.layout",
                file=path,
                offset=end,
                expected=f"the file's end at {end}",
                got=f"{size} bytes",
            )
        )
    return Weights(start=len(raw), layout=layout, data_sha256=data_sha256)


def as_expected(raw: bytes, size: int, expected: dict[str, Tensor]) -> Weights | None:
    """Return the content of a header that equals the canonical one. Otherwise None: the caller parses it to explain."""
    text = raw[len(_BEGINNING) + 8 :][:64].decode("latin-1")
    if not names.SHA256.fullmatch(text):
        return None
    layout = lay_out(expected)
    good = raw == header(layout, text) and size == len(raw) + sum(tensor.size for tensor in expected.values())
    return Weights(start=len(raw), layout=layout, data_sha256=text) if good else None


_BEGINNING: Final = b'{"__metadata__":{"sha256":"'


def _tensor(field: Field) -> Tensor:
    members = field.members(["dtype", "shape", "data_offsets"])
    code = members["dtype"].choice(tuple(SAFETENSORS_CODES.values()))
    shape = tuple(item.integer() for item in members["shape"].items(maximum=8))
    for item in members["data_offsets"].items(minimum=2, maximum=2):
        item.integer()
    return Tensor(dtype=next(dtype for dtype, known in SAFETENSORS_CODES.items() if known == code), shape=shape)
