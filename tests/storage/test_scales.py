"""Scales of quantized weights: every reader refuses those that aren't finite."""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import splitbundle
from splitbundle import Bundle, BundleError
from splitbundle.format.manifest.document import fingerprint
from splitbundle.format.weight_layout import SCALE
from splitbundle.opening import open_bundle
from splitbundle.records import replace
from splitbundle.storage.scales import check_scales, first_not_finite
from splitbundle.writing.documents import write_documents
from tests.support.quantized_bundles import quantized
from tests.support.yardsticks import at_most, parsing

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "layers.0.mlp.down.weight"
FILE = "layer-000.safetensors"
READERS: dict[str, Callable[[Bundle], object]] = {
    "verify": lambda bundle: bundle.verify(),
    "verify-a-shard": lambda bundle: bundle.verify("bottom"),
    "torch": lambda bundle: bundle.stage("bottom", backend="torch"),
    "onnxruntime": lambda bundle: bundle.stage("bottom", backend="onnxruntime", threads=1),
    "a-unit": lambda bundle: check_scales(bundle, "layer-000"),
}


def spoilt(bundle: Bundle, root: Path, index: int, bits: int) -> Path:
    """Copy a bundle, change one scale of a matrix, and list the file anew."""
    shutil.copytree(bundle.path, root)
    place = bundle.locate_tensors(bundle.shard("bottom"))[f"{NAME}{SCALE}"]
    assert place.file == FILE
    data = bytearray((root / FILE).read_bytes())
    data[place.offset + 2 * index : place.offset + 2 * index + 2] = struct.pack("<H", bits)
    (root / FILE).write_bytes(data)
    listed = dict(bundle.manifest.files)
    listed[FILE] = replace(listed[FILE], sha256=hashlib.sha256(data).hexdigest())
    model = replace(bundle.manifest.model, fingerprint=fingerprint(listed, bundle.manifest.weight_files()))
    write_documents(root, replace(bundle.manifest, files=listed, model=model), bundle.architecture)
    return root


@pytest.mark.rule("SB-W-015")
@pytest.mark.parametrize(
    ("form", "index", "bits", "got"),
    [
        ("rows8", 3, 0x7FC0, "NaN at [3]"),
        ("blocks4_64", 9, 0xFF80, "-infinity at [2, 1]"),
        ("blocks4_128", 127, 0x7F80, "infinity at [63, 1]"),
    ],
)
def test_every_reader_refuses_alike(form: str, index: int, bits: int, got: str, tmp_path: Path) -> None:
    root = spoilt(quantized("tied", form), tmp_path / "spoilt", index, bits)
    for strict in (False, True):
        bundle = open_bundle(root, verify="always") if strict else splitbundle.open(root)
        for name, read in READERS.items():
            with pytest.raises(BundleError) as caught:
                read(bundle)
            found = [(each.code, each.file, each.pointer, each.got) for each in caught.value.problems]
            assert found == [("weights.scale", FILE, f"/{NAME}{SCALE}", got)], name
        bundle.stage("top", backend="onnxruntime", threads=1)


def test_large_scales_are_scales(tmp_path: Path) -> None:
    """The largest finite number has the same high byte as infinity."""
    bundle = splitbundle.open(spoilt(quantized("tied", "rows8"), tmp_path / "large", 3, 0x7F7F))
    for read in READERS.values():
        read(bundle)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
def test_the_first_one_is_found(bits: int) -> None:
    finite = [0x7F7F, 0x0000, 0xFF7F, 0x8000, 0x3F80, 0x0080, 0x80FF, 0x7F00]
    assert first_not_finite(struct.pack("<8H", *finite)) is None
    for at in range(9):
        numbers = [*finite[:at], bits, *finite[at:], bits]
        assert first_not_finite(struct.pack("<10H", *numbers)) == at
    assert first_not_finite(b"") is None


def test_many_scales_are_read_soon() -> None:
    """The worst case has the high byte of infinity everywhere."""
    data = struct.pack("<H", 0x7F7F) * 2**22
    with at_most(3, parsing, len(data)):
        assert first_not_finite(data) is None
