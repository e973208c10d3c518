"""An onnxruntime stage's refusals and options."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch

import splitbundle
from splitbundle import Bundle, BundleError
from tests.support.graph_bundles import bundle
from tests.support.models import TOLERANCE, VOCAB, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def whole() -> Bundle:
    return bundle("llama")


@pytest.mark.rule("SB-O-007")
@pytest.mark.parametrize("path", ["trunk-2.onnx", "layer-001.safetensors"])
def test_changed_files_are_refused(whole: Bundle, tmp_path: Path, path: str) -> None:

    copied = Path(shutil.copytree(whole.path, tmp_path / "copy"))
    data = bytearray((copied / path).read_bytes())
    data[40] ^= 1
    (copied / path).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copied).stage("trunk-2", backend="onnxruntime")
    assert caught.value.problems[0].file == path
    assert caught.value.codes[0] in ("file.digest", "file.header-digest")


def test_ranges_that_no_graph_computes(tmp_path: Path) -> None:
    cut = bundle("llama", (1, 3))
    assert cut.stage(layers=(1, 4), backend="onnxruntime").layer_range == (1, 4)
    for layers in ((1, 2), (0, 2), (2, 4)):
        with pytest.raises(BundleError) as caught:
            cut.stage(layers=layers, backend="onnxruntime")
        (problem,) = caught.value.problems
        assert problem.code == "stage.graph"
        assert problem.expected == "layers that shards' graphs compute: bottom [0, 1), trunk [1, 3), top [3, 4)"
        assert "splitbundle_converter.resplit makes them" in (problem.hint or "")
    with pytest.raises(BundleError, match=r"\[stage.graph\]"):  # the bottom's graph embeds
        cut.stage(layers=(0, 1), embeds=False, backend="onnxruntime")


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"backend": "onnx"}, "backend"),
        ({"backend": "onnxruntime", "trainable": True}, "trainable"),
        ({"backend": "onnxruntime", "device": "cuda"}, "device"),
        ({"backend": "torch", "prepack": True}, "prepack"),
    ],
)
def test_options_of_another_backend(whole: Bundle, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(BundleError) as caught:
        whole.pipeline(**options)
    assert (caught.value.codes, caught.value.problems[0].argument) == (("stage.backend",), argument)


@pytest.mark.parametrize(
    ("version", "policy", "expected"),
    [
        ("1.32.0", None, {"session.intra_op.spin_duration_us": "50"}),
        ("1.26.1", "active", {"session.intra_op.spin_duration_us": "50"}),
        ("2.0.0+dev", None, {"session.intra_op.spin_duration_us": "50"}),
        ("1.32.0", "passive", {"session.intra_op.allow_spinning": "0"}),
        ("1.25.1", None, {"session.intra_op.allow_spinning": "0"}),
        ("unknown", None, {"session.intra_op.allow_spinning": "0"}),
    ],
)
def test_threads_spin_for_a_bounded_time_or_not_at_all(
    whole: Bundle, monkeypatch: pytest.MonkeyPatch, version: str, policy: str | None, expected: dict[str, str]
) -> None:
    given: dict[str, str] = {}

    class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, name: str, value: str) -> None:
            given[name] = value
            super().add_session_config_entry(name, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    if policy is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    whole.pipeline(backend="onnxruntime", threads=1)
    assert {name: value for name, value in given.items() if "spin" in name} == expected


@pytest.mark.parametrize(("variant", "other"), [("standard", "bfloat16"), ("float16", "float32")])
def test_graphs_compute_in_their_own_dtype(variant: str, other: str) -> None:
    whole = bundle("llama", (2,), "float16", variant)
    own = "float16" if variant == "float16" else "float32"
    assert len(whole.pipeline(backend="onnxruntime", dtype=own, threads=1).stages) == 2
    with pytest.raises(BundleError, match=rf"\[input.dtype\] dtype: expected {own}, in which the graph of shard"):
        whole.pipeline(backend="onnxruntime", dtype=other, threads=1)
    mixed = whole.pipeline(backend={"bottom": "onnxruntime"}, dtype=other, threads=1)  # torch's there
    assert str(mixed.stages[1].inner.dtype) == f"torch.{other}"


def test_a_provider_that_cannot_start_is_said(whole: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """onnxruntime would go on with another provider, and say so on stdout."""
    known = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(BundleError) as caught:
        whole.pipeline(backend="onnxruntime", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert caught.value.codes == ("input.device",)
    assert "CPUExecutionProvider alone: it couldn't be started here" in str(caught.value)
    with pytest.raises(BundleError, match=r"\[stage.graph\] .*'providers' values must be"):
        whole.pipeline(backend="onnxruntime", providers=[("CPUExecutionProvider",)])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": "2"}, {"threads": 2**40}, {"threads": True}])
def test_thread_counts(whole: Bundle, options: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] threads: expected 1 to 1024"):
        whole.pipeline(backend="onnxruntime", **options)


def test_arrays_of_every_kind_for_mixed_pipelines() -> None:
    """Arrays that numpy can hold and torch can't, and objects that aren't arrays of numbers at all."""
    cut = bundle("llama", (2,))
    ids = numpy.array(token_rows(6, 6))
    mixed, plain = (
        cut.pipeline(backend={"top": "onnxruntime"}, threads=1),
        cut.pipeline(backend="onnxruntime", threads=1),
    )
    frozen = ids.copy()
    frozen.flags.writeable = False
    for given in (
        ids[:, ::-1],
        ids.astype(">i8"),
        numpy.asfortranarray(ids),
        frozen,
        numpy.broadcast_to(ids[:1], (2, 6)),
    ):
        expected = plain(numpy.ascontiguousarray(given, numpy.int64))
        assert numpy.abs(mixed(given) - expected).max() <= TOLERANCE * numpy.abs(expected).max()
    for wrong in (numpy.array([["a"]]), numpy.array([[None]]), numpy.int64(3), [[1]]):
        with pytest.raises(BundleError, match=r"\[input.type\] token ids: expected a numpy.ndarray of numbers"):
            mixed(wrong)


def test_whole_numbers_of_numpy(whole: Bundle) -> None:
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(numpy.int64(2), numpy.int32(20))
    pipeline(numpy.array(token_rows(4, 4)), session=session, logits=numpy.int64(2))
    session.rollback(numpy.int64(1))
    assert session.past == [3, 3]
    assert len(list(pipeline.generate(numpy.array(token_rows(4)), max_new_tokens=numpy.int64(3)))) == 3
    assert whole.select(layers=(numpy.int64(0), numpy.int64(1))) == whole.select(layers=(0, 1))
    with pytest.raises(BundleError, match=r"\[input.cache\] session: expected a session from session\(\), got str"):
        pipeline(numpy.array(token_rows(4)), session="x")


def test_a_graph_that_fails_as_it_runs_is_named(whole: Bundle) -> None:
    class Failing:
        def io_binding(self) -> Any:
            return onnxruntime.IOBinding(real)

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("shapes differ")

    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    graph = pipeline.stages[0].graphs[0]
    real, graph.session = graph.session, Failing()
    with pytest.raises(BundleError, match=rf"\[stage.graph\] {graph.file}: .* RuntimeError: shapes differ"):
        pipeline(numpy.array(token_rows(4)))


def test_unknown_providers(whole: Bundle) -> None:
    for nothing in ([], "CPUExecutionProvider"):
        with pytest.raises(BundleError, match=r"\[input.device\] providers: expected a list of some of"):
            whole.pipeline(backend="onnxruntime", providers=nothing)
    with pytest.raises(BundleError, match=r"\[input.device\] providers: expected some of .*CPUExecutionProvider"):
        whole.pipeline(backend="onnxruntime", providers=["NoSuchProvider"])
    assert whole.pipeline(backend="onnxruntime", providers=["CPUExecutionProvider"])


def test_boundary_checks_are_those_of_torch(whole: Bundle) -> None:
    """The messages are the same, except for the name of arrays."""
    ours = {"torch": whole.stage("trunk-2"), "onnxruntime": whole.stage("trunk-2", backend="onnxruntime")}
    embeds = {"torch": whole.stage("bottom"), "onnxruntime": whole.stage("bottom", backend="onnxruntime")}
    width = whole.architecture.hidden_size

    def said(stage: Any, given: Any, **options: Any) -> tuple[str, ...]:
        with pytest.raises(BundleError) as caught:
            stage(given, **options)
        (problem,) = caught.value.problems
        words = (problem.code, problem.argument, problem.expected, problem.got)
        return tuple((word or "").replace("torch.", "") for word in words)

    hidden = torch.zeros(1, 3, width)
    ids = torch.tensor([[1, 2, VOCAB]])
    for stage, given, options in (
        (ours, torch.zeros(1, 3, width + 1), {}),
        (ours, torch.zeros(3, width), {}),
        (ours, hidden.double(), {}),
        (ours, hidden, {"past": [1]}),
        (ours, hidden, {"count": [4]}),
        (ours, hidden, {"count": [1, 2]}),
        (embeds, ids, {}),
        (embeds, ids.float(), {}),
        (embeds, ids[0], {}),
    ):
        assert said(stage["torch"], given, **options) == said(stage["onnxruntime"], given.numpy(), **options)
    assert said(ours["onnxruntime"], [[0.0]])[0] == "input.type"
    caches = {backend: stage.cache(1, 8) for backend, stage in ours.items()}
    assert said(ours["torch"], hidden, cache=caches["onnxruntime"])[0] == "input.cache"
    assert said(ours["onnxruntime"], hidden.numpy(), cache=caches["torch"])[0] == "input.cache"


def test_a_copy_shares_the_graphs_and_a_pickle_is_refused(whole: Bundle) -> None:
    pipeline = whole.pipeline(backend="onnxruntime")
    stage, prompt = pipeline.stages[0], numpy.array([[1, 2, 3]])
    for other in (copy.copy(stage), copy.deepcopy(stage)):
        assert other is not stage
        cache = other.cache(1, 8)
        assert numpy.array_equal(other(prompt, cache=cache), stage(prompt))
        assert numpy.array_equal(
            stage(prompt[:, :1], past=[3], cache=copy.deepcopy(cache)), other(prompt[:, :1], past=[3], cache=cache)
        )
    assert numpy.array_equal(copy.deepcopy(pipeline)(prompt), pipeline(prompt))
    for each in (stage, pipeline):
        with pytest.raises(
            BundleError, match=r"\[stage.copy\] stage bottom: expected a stage that stays in its process"
        ):
            pickle.dumps(each)
