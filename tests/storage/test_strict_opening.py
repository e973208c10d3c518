"""The promises of strict opening and of mapped opening, when files change after they were opened."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.cli import main
from tests.support.models import checkpoint
from tests.support.paths import TESTS

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
IDS = numpy.array([[5, 6, 7, 8]])
BACKENDS = ("torch", "onnxruntime")
CHILD = """
import os, shutil, sys
from pathlib import Path
import splitbundle

golden, place, backend, verify, *hows = sys.argv[1:]
if backend == "torch":
    import torch
    torch.set_num_threads(1)
    ids, options = torch.tensor([[5, 6, 7, 8]]), {}
else:
    import numpy
    ids, options = numpy.array([[5, 6, 7, 8]]), {"threads": 1}
known = splitbundle.open(golden).pipeline(backend=backend, **options)(ids).tolist()
for how in hows:
    path = Path(place, how)
    shutil.copytree(golden, path)
    bundle = splitbundle.open(path, verify=verify)
    pipeline = bundle.pipeline(backend=backend, **options)
    # Nothing was computed yet: whatever of a mapping is needed has to be read after the files have changed.
    for file in [path / file for file in bundle.manifest.files if file.endswith((".safetensors", ".onnx"))]:
        if how == "truncate":
            os.truncate(file, 0)
        elif how == "overwrite":
            with file.open("r+b") as open_file:
                open_file.seek(4096)
                open_file.write(bytes(file.stat().st_size - 4096))
        elif how == "replace":
            other = file.with_name("other")
            other.write_bytes(bytes(file.stat().st_size))
            other.replace(file)
    if how == "remove":
        shutil.rmtree(path)
    print(how, "same" if pipeline(ids).tolist() == known else "other", flush=True)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the golden GPT-2 with graphs, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "gpt2.splitbundle"))


def in_a_child(place: Path, backend: str, verify: str, *hows: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-c", CHILD, str(GOLDEN), str(place), backend, verify, *hows]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.rule("SB-D-011")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_happens_to_a_file_changes_what_strict_stages_compute(tmp_path: Path, backend: str) -> None:
    found = in_a_child(tmp_path, backend, "always", "replace", "remove", "overwrite", "truncate")
    assert found == (0, ["replace same", "remove same", "overwrite same", "truncate same"])


@pytest.mark.skipif(os.name == "nt", reason="what is mapped can't be changed there")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_said_of_mapped_stages(tmp_path: Path, backend: str) -> None:
    """Replacing or removing a file changes nothing, overwriting it changes numbers, truncating it ends the process."""
    found = in_a_child(tmp_path, backend, "never", "replace", "remove", "overwrite", "truncate")
    assert found == (-signal.SIGBUS, ["replace same", "remove same", "overwrite other"])


def spoil(path: Path) -> None:
    """Change the last byte of a file, where no digest of a header sees it."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.rule("SB-D-011")
@pytest.mark.parametrize("backend", BACKENDS)
def test_strict_stages_refuse_what_is_not_the_listed_file(copy: Path, backend: str) -> None:
    spoil(copy / "layer-001.safetensors")
    splitbundle.open(copy).pipeline(backend=backend)  # a mapped opening can't know
    strict = splitbundle.open(copy, verify="always")
    strict.stage("bottom", backend=backend)
    with pytest.raises(BundleError) as caught:
        strict.pipeline(backend=backend)
    assert [(p.code, p.file) for p in caught.value.problems] == [("file.digest", "layer-001.safetensors")]
    spoil(copy / "layer-001.safetensors")
    spoil(copy / "vectors.safetensors")
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copy, verify="always").run_vectors(backend=backend)
    assert [(p.code, p.file) for p in caught.value.problems] == [("file.digest", "vectors.safetensors")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onnxruntime_opens_no_weight_file_of_a_strict_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Their bytes are gone when it begins. Weights that are widened are freed as it loads, too."""
    source = checkpoint("llama", dtype)
    whole = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", split=[2], check=False, onnx=True)
    expected = whole.pipeline(backend="onnxruntime", threads=1)(IDS)
    make = onnxruntime.InferenceSession

    def without_files(*arguments: Any, **named: Any) -> Any:
        whole.path.rename(tmp_path / "away")
        try:
            return make(*arguments, **named)
        finally:
            (tmp_path / "away").rename(whole.path)

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_files)
    strict = splitbundle.open(whole.path, verify="always")
    assert numpy.array_equal(strict.pipeline(backend="onnxruntime", threads=1)(IDS), expected)


@pytest.mark.rule("SB-D-012")
def test_a_bundle_that_is_replaced_as_onnxruntime_opens_its_weights(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime opens them by their paths, after their headers were checked."""
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    changed = other / "layer-001.safetensors"
    digest = hashlib.sha256(b"of other data").hexdigest().encode()
    changed.write_bytes(re.sub(rb'(?<="sha256":")[0-9a-f]{64}', digest, changed.read_bytes()))
    make = onnxruntime.InferenceSession

    def replaced(*arguments: Any, **named: Any) -> Any:
        if other.exists():
            copy.rename(tmp_path / "away")
            other.rename(copy)
        return make(*arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", replaced)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copy).pipeline(backend="onnxruntime", threads=1)
    assert [(p.code, p.file) for p in caught.value.problems] == [("file.header-digest", "layer-001.safetensors")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork there")
def test_training_and_forking_strict_stages(copy: Path) -> None:
    """A child's writes to weights are its own, as over a mapping, and the file stays."""
    strict = splitbundle.open(copy, verify="always")
    stage = strict.stage("bottom", trainable=True)
    ids = torch.from_numpy(IDS)
    before = stage(ids).detach()
    child = os.fork()
    if child == 0:  # no assertion, no cleaning up by a test runner: only the write
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.zero_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(stage(ids), before)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    stage(ids).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert not torch.equal(stage(ids), before)
    strict.verify(exact=True)


def test_the_id_comes_before_everything(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known: Bundle = splitbundle.open(copy)
    assert splitbundle.open(copy, id=known.id).id == known.id
    assert main.main(["verify", str(copy), "--id", known.id, "--run", "--strict", "--backend", "all"]) == 0
    (copy / "manifest.json").write_bytes(b"not even JSON")
    with pytest.raises(BundleError, match=r"\[file.digest\] manifest.json: expected the bundle id"):
        splitbundle.open(copy, id=known.id)
    capsys.readouterr()
    assert main.main(["verify", str(copy), "--id", known.id]) == 3
    assert "file.digest" in capsys.readouterr().err


def test_generating_strictly(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for backend in BACKENDS:
        assert main.main(["generate", str(copy), "--ids", "5,6", "-n", "3", "--strict", "--backend", backend]) == 0
    spoil(copy / "layer-002.safetensors")
    capsys.readouterr()
    assert main.main(["generate", str(copy), "--ids", "5,6", "-n", "3", "--strict"]) != 0
    assert "layer-002.safetensors" in capsys.readouterr().err


def test_an_unknown_way_of_opening(copy: Path) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] verify: expected never or always, got 'sometimes'"):
        splitbundle.open(copy, verify="sometimes")  # type: ignore[arg-type]
