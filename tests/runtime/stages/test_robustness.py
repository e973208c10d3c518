"""Unusual uses of stages and sessions: hooks, wrappers, other dtypes, workers, mistakes."""

from __future__ import annotations

import copy
import errno
import io
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch.pipeline import Pipeline
from splitbundle.backends.torch.sampling import draw
from splitbundle.stages.sampling import Sampling
from splitbundle.storage import files
from tests.support.paths import TESTS

IDS = torch.tensor([[5, 6, 7, 8]])
GOLDEN = TESTS / "golden" / "v1.0"


@pytest.fixture
def copy_of(tmp_path: Path) -> Path:
    """A copy of the golden GPT-2, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "gpt2.splitbundle", tmp_path / "gpt2.splitbundle"))


def test_hooks_of_stages_run_in_a_pipeline(gpt2: splitbundle.Bundle) -> None:
    pipeline = gpt2.pipeline()
    plain = pipeline(IDS)
    seen: list[str] = []
    for stage in pipeline.stages:
        stage.register_forward_hook(lambda module, inputs, output: seen.append(module.name))
    assert torch.equal(pipeline(IDS), plain)
    assert seen == ["bottom", "trunk", "top"]
    # A hook may change the tensors at a boundary: some split learning adds noise to activations.
    pipeline.stages[0].register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.equal(pipeline(IDS), plain)


class Wrapped(nn.Module):
    """A wrapper that passes a stage's attributes on, as compilers and adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, *arguments: object, **named: object) -> object:
        return self.inner(*arguments, **named)


def test_a_wrapped_stage_runs_in_a_pipeline(gpt2: splitbundle.Bundle) -> None:
    pipeline = gpt2.pipeline()
    plain = pipeline(IDS)
    pipeline.stages[1] = Wrapped(pipeline.stages[1])
    assert torch.equal(pipeline(IDS), plain)
    assert len(list(pipeline.generate(IDS, max_new_tokens=3))) == 3


def test_a_frozen_stage_can_be_written(gpt2: splitbundle.Bundle) -> None:
    """And neither the process nor the file is harmed."""
    stage = gpt2.stage("bottom")
    state = {name: torch.zeros_like(value) for name, value in stage.state_dict().items()}
    stage.load_state_dict(state)
    assert not stage(IDS).any()
    assert gpt2.stage("bottom")(IDS).any()
    gpt2.verify()


def test_what_the_disk_refuses_is_said_of_the_file(copy_of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = splitbundle.open(copy_of)

    def fail(*arguments: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    for name, use in (("sha256", bundle.verify), ("read_fully", lambda: bundle.stage("bottom"))):
        with monkeypatch.context() as patched:
            patched.setattr(files, name, fail)
            with pytest.raises(BundleError) as caught:
                use()
            problem = caught.value.problems[-1]
            assert (problem.code, problem.got) == ("file.unreadable", "Input/output error")


def test_a_file_system_that_gives_less_than_was_asked(copy_of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sparing(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size, 100) if size and size > 0 else 100)

    real = files.open_file

    def open_file(root: Path, path: str, expected: Any = None) -> Any:
        real(root, path, expected).close()
        return Sparing(root / path)

    monkeypatch.setattr(files, "open_file", open_file)
    splitbundle.open(copy_of).verify()
    assert splitbundle.open(copy_of).stage("bottom")(IDS).shape[1] == 4


@pytest.mark.skipif(os.name == "nt", reason="files that are open can't be replaced there")
def test_a_file_that_is_exchanged_while_it_is_opened(copy_of: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def exchange(place: Any, *arguments: Any, **named: Any) -> int:
        if str(place).endswith("manifest.json"):
            os.replace(other, place)
        return real(place, *arguments, **named)

    for make in (lambda path: path.write_bytes(b"{}"), os.mkfifo):
        other = copy_of.with_name("other")
        make(other)
        with monkeypatch.context() as patched:
            patched.setattr(files.os, "open", exchange)
            with pytest.raises(
                BundleError, match=r"\[file.unreadable\] manifest.json.*the file was replaced while it was opened"
            ):
                splitbundle.open(copy_of)


def test_stages_are_copied_saved_and_sent(golden: splitbundle.Bundle) -> None:
    stage = golden.stage(golden.shards[0].name)
    plain = stage(IDS)
    assert torch.equal(copy.deepcopy(stage)(IDS), plain)
    assert torch.equal(pickle.loads(pickle.dumps(stage))(IDS), plain)
    file = io.BytesIO()
    torch.save(stage.state_dict(), file)


def test_stages_of_several_dtypes_chain(gpt2: splitbundle.Bundle) -> None:
    stages = [gpt2.stage("bottom"), gpt2.stage("trunk", dtype="bfloat16"), gpt2.stage("top")]
    mixed, plain = Pipeline(stages)(IDS), gpt2.pipeline()(IDS)
    assert mixed.dtype == torch.float32
    assert (mixed - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.rule("SB-B-013")
def test_stages_of_two_models_are_refused(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    other = splitbundle.open(shutil.copytree(gpt2.path, tmp_path / "other.splitbundle"))
    trunk = other.stage("trunk")
    assert Pipeline([gpt2.stage("bottom"), trunk, gpt2.stage("top")])  # a copy is the same model
    trunk.fingerprint = "sha256:" + "0" * 64
    stages = [gpt2.stage("bottom"), trunk, gpt2.stage("top")]
    with pytest.raises(BundleError) as caught:
        Pipeline(stages)
    assert str(caught.value) == (
        f"[pipeline.fingerprint] stages[1]: expected the fingerprint of the first stage, {gpt2.fingerprint}, "
        f"got {trunk.fingerprint}. same_weights=False mixes the weights of models on purpose"
    )
    assert Pipeline(stages, same_weights=False)(IDS).shape == (1, 4, 97)


def test_a_session_of_another_pipeline_is_refused(gpt2: splitbundle.Bundle) -> None:
    whole = Pipeline([gpt2.stage(layers=(0, 3))])
    with pytest.raises(BundleError, match=r"\[input.cache\] session: expected the session of a pipeline of 1 stages"):
        whole(IDS, session=gpt2.pipeline().session())
    three = gpt2.pipeline()
    session = three.session()
    three.to(torch.bfloat16)
    with pytest.raises(BundleError, match=r"\[input.cache\] stage bottom, cache: expected a cache of layers \(0, 1\)"):
        three(IDS, session=session)


def test_more_slots_than_memory(golden: splitbundle.Bundle) -> None:
    with pytest.raises(BundleError, match=r"\[session.capacity\]"):
        golden.pipeline().session(capacity=10**13)


def test_numbers_of_other_libraries_are_numbers(gpt2: splitbundle.Bundle) -> None:
    pipeline = gpt2.pipeline()
    session = pipeline.session(2, 8)
    pipeline(IDS.repeat(2, 1), session=session)
    session.rollback(torch.tensor([1, 2]))  # type: ignore[arg-type]
    assert session.past == [3, 2]
    session.reorder(torch.tensor([1, 0]))  # type: ignore[arg-type]
    assert session.past == [2, 3]
    for wrong in ([0.5, 0], ["1", 0]):
        with pytest.raises(BundleError, match=r"\[input.value\] tokens: expected integers"):
            session.rollback(wrong)  # type: ignore[arg-type]
    first = int(next(pipeline.generate(IDS, max_new_tokens=1))[0])
    assert len(list(pipeline.generate(IDS, max_new_tokens=5, stop_ids=torch.tensor([first])))) == 1  # type: ignore[arg-type]


def test_padding_needs_no_slots(gpt2: splitbundle.Bundle) -> None:
    stage = gpt2.stage("bottom")
    cache = stage.cache(2, 3)
    ids = torch.tensor([[5, 6, 0, 0, 0], [5, 6, 7, 0, 0]])
    got = stage(ids, count=[2, 3], cache=cache)
    assert got.shape == (2, 5, 48)
    assert torch.equal(got[:, 3:], torch.zeros(2, 2, 48))
    pipeline = gpt2.pipeline()
    session = pipeline.session(1, 4)
    pipeline(IDS, session=session)
    nothing = pipeline(IDS, attention_mask=torch.zeros_like(IDS), session=session)
    assert nothing.shape == (1, 4, 97)
    assert not nothing.any()
    assert session.past == [4]
    wide = torch.zeros(1, 70, dtype=torch.int64)
    mask = torch.zeros_like(wide)
    mask[0, -4:] = 1
    wide[0, -4:] = IDS
    padded = [int(token[0]) for token in pipeline.generate(wide, attention_mask=mask, max_new_tokens=5)]
    assert padded == [int(token[0]) for token in pipeline.generate(IDS, max_new_tokens=5)]


def test_values_that_a_dtype_cannot_hold_are_refused(gpt2: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitbundle.backends.torch import stage
    from splitbundle.backends.torch.weights import MappedTensors

    original = stage.map_tensors

    def large(bundle: splitbundle.Bundle, unit: str) -> MappedTensors:
        tensors = original(bundle, unit)
        tensors.update({name: tensor * 1e6 for name, tensor in tensors.items()})
        return tensors

    monkeypatch.setattr(stage, "map_tensors", large)
    with pytest.raises(BundleError, match=r"\[input.overflow\] /embedding.token.weight: expected values that float16"):
        gpt2.stage("bottom", dtype="float16")
    gpt2.stage("bottom", dtype="bfloat16")


def test_a_draw_hides_no_nan() -> None:
    generator = random.Random(0)
    for bad in (float("nan"), float("inf")):
        logits = torch.tensor([[1.0, bad, 2.0]])
        for temperature in (0.0, 1.0):
            with pytest.raises(BundleError, match=r"\[input.value\] logits: expected numbers, got NaN or infinity"):
                draw(logits, Sampling(temperature=temperature), generator)
    logits = torch.tensor([[1.0, 3.0, 2.0, float("-inf")]])
    assert int(draw(logits, Sampling(temperature=1e-310), generator)) == 1
    for wrong in ({"temperature": "1"}, {"top_k": 2.5}, {"top_p": "x"}, {"temperature": float("nan")}):
        with pytest.raises(BundleError, match=r"\[input.value\]"):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_a_relative_path_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(GOLDEN)
    bundle = splitbundle.open("gpt2.splitbundle")
    monkeypatch.chdir(tmp_path)
    bundle.verify()
    with pytest.raises(BundleError, match=r"\[file.missing\]"):
        splitbundle.open("a" * 5000)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted on Linux")
def test_descriptors_that_run_out_are_said(gpt2: splitbundle.Bundle) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(len(taken) + 8) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[2], before[1]))
    try:
        with pytest.raises(BundleError, match=r"\[file.unreadable\] .*Too many open files"):
            gpt2.pipeline()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
