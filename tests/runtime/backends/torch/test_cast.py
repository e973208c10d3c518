"""Cast: all weights in another dtype. A wider one changes no value, a narrower one rounds once."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

import splitbundle
from splitbundle import Bundle, BundleError
from splitbundle.backends.torch.weights import DTYPES, map_tensors
from splitbundle.writing import atomic_directory
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"


@pytest.fixture
def bundle() -> Bundle:
    return splitbundle.open(GOLDEN / "llama.splitbundle")


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: tensor for unit in bundle.manifest.units for name, tensor in map_tensors(bundle, unit).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_narrower_dtype_rounds_once(bundle: Bundle, tmp_path: Path, dtype: str) -> None:
    made = bundle.cast(tmp_path / "cast", dtype, notes=lambda text: None)
    before, after = weights(bundle), weights(made)
    assert all(torch.equal(after[name], tensor.to(DTYPES[dtype])) for name, tensor in before.items())
    assert (made.manifest.storage.dtype, made.manifest.storage.exceptions) == (dtype, {})
    assert (made.manifest.model.parent, made.manifest.vectors is not None) == (bundle.fingerprint, True)
    assert made.manifest.vectors is not None
    assert made.manifest.vectors.of_itself
    made.verify(exact=True)
    made.run_vectors(backend="torch")


def test_a_wider_dtype_keeps_every_value_and_the_original_vectors(tmp_path: Path) -> None:
    narrow = splitbundle.open(GOLDEN / "mistral-bfloat16.splitbundle")
    made = narrow.cast(tmp_path / "cast", "float32", notes=lambda text: None)
    after = weights(made)
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in weights(narrow).items())
    assert made.manifest.vectors == narrow.manifest.vectors
    assert made.manifest.vectors is not None
    assert not made.manifest.vectors.of_itself
    made.verify(exact=True)
    made.run_vectors(backend="torch", require_original=True)
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = narrow.pipeline(dtype="float32", kernels="torch")(ids)
    assert torch.equal(made.pipeline(kernels="torch")(ids), expected)


def test_the_same_dtype_is_a_copy(bundle: Bundle, tmp_path: Path) -> None:
    made = bundle.cast(tmp_path / "cast", "float32")
    assert (made.fingerprint, made.manifest.model.parent) == (bundle.fingerprint, bundle.manifest.model.parent)
    assert made.manifest.vectors == bundle.manifest.vectors


def test_damage_gets_no_new_digest(bundle: Bundle, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle.path, tmp_path / "damaged"))
    path = bundle.manifest.units["layer-000"][0]
    data = bytearray((damaged / path).read_bytes())
    data[-1] ^= 1
    (damaged / path).write_bytes(data)
    with pytest.raises(BundleError, match=r"\[file\.digest\]"):
        splitbundle.open(damaged).cast(tmp_path / "cast", "bfloat16")
    assert not (tmp_path / "cast").exists()


def test_what_cannot_be_cast(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"\[input\.value\] dtype: expected one of float32, float16, bfloat16"):
        bundle.cast(tmp_path / "cast", "int8")
    stage = bundle.stage(bundle.shards[0].name, trainable=True)
    with torch.no_grad():
        next(stage.parameters()).fill_(1e5)
    large = bundle.save_as(tmp_path / "large", stage, vectors=False)
    with pytest.raises(BundleError, match=r"\[input\.overflow\]"):
        large.cast(tmp_path / "cast", "float16")
    part = large.extract(tmp_path / "part", bundle.shards[-1].name)
    with pytest.raises(BundleError, match=r"\[file\.missing\]"):
        part.cast(tmp_path / "cast", "bfloat16")
    assert not (tmp_path / "cast").exists()


def test_an_error_after_a_bundle_replaced_itself_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message isn't that another writer replaced the bundle."""
    old = splitbundle.open(shutil.copytree(GOLDEN / "llama.splitbundle", tmp_path / "x.splitbundle"))
    flush = atomic_directory.flush

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "the disk failed")
        flush(path)

    monkeypatch.setattr(atomic_directory, "flush", fail)
    with pytest.raises(BundleError, match=r"\[output\.failed\] .*the disk failed.*The bundle is in place"):
        old.cast(old.path, "bfloat16", vectors=False, force=True)
    assert splitbundle.open(old.path).manifest.storage.dtype == "bfloat16"
