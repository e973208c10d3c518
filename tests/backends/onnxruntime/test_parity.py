"""The numbers of graphs under onnxruntime: every scenario, every dtype, any split of a prompt."""

from __future__ import annotations

import itertools
from typing import Any, Final

import numpy
import pytest
import torch
from torch import Tensor

from splitbundle import Bundle, BundleError
from splitbundle.backends.onnxruntime import graph, stage
from splitbundle.backends.onnxruntime.pipeline import Pipeline
from splitbundle.backends.onnxruntime.stage import load_stages
from tests.support.graph_bundles import bundle
from tests.support.models import (
    BY_PIECES,
    CONFIGURATIONS,
    LAYERS,
    ONE_PER_FAMILY,
    TOLERANCE,
    checkpoint,
    deviations,
    load_original,
    original_logits,
    token_rows,
)
from tests.support.scenarios import Worst, run
from tests.support.tiers import EVERY_FACT, FEW, thinned

pytestmark = pytest.mark.usefixtures("one_thread")
STEADY: Final = tuple(name for name in CONFIGURATIONS if name not in BY_PIECES)
FLOAT16: Final = (
    "gpt2",
    "llama",
    "gemma2-capped-biased",
    "bloom",
    "granite_swa-bases-biased",
    "llama4_text-tuned-biased",
    "apertus-biased",
    "cohere-normed",
    "qwen2_moe",
    "olmoe-normalised",
)
"""Both norms, most placements, caps, offsets, ALiBi, sinks, chunks, temperatures, xIELU, experts."""
ONE_EACH: Final = tuple(name for name in ONE_PER_FAMILY if name not in BY_PIECES)


class OverTensors:
    """A pipeline over numpy arrays that takes and gives tensors, so that tests can call it like torch's."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inner = pipeline

    def session(self, batch_size: int, capacity: int) -> Any:
        return self.inner.session(batch_size, capacity)

    def __call__(self, ids: Tensor, *, attention_mask: Tensor | None, **options: Any) -> Tensor:
        mask = None if attention_mask is None else attention_mask.numpy()
        return torch.from_numpy(self.inner(ids.numpy(), attention_mask=mask, **options))


def stages(whole: Bundle, *cuts: int) -> list[Any]:
    """Load stages that meet at some cuts. Each has several graphs in a row."""
    edges = (0, *cuts, LAYERS)
    selections = [
        whole.select(layers=(start, stop), embeds=i == 0, head=i == len(cuts))
        for i, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    return load_stages(whole, selections, threads=1)


@pytest.mark.rule("SB-O-004", "SB-O-005", "SB-C-001")
@pytest.mark.parametrize("name", thinned(STEADY, EVERY_FACT))
def test_scenarios_cut_everywhere(name: str) -> None:
    """Pieces, padding, rollback, reordering, last logits: results equal the original's, with a graph a layer."""
    worst = Worst(name)
    run(OverTensors(Pipeline(stages(bundle(name), 2))), worst, "cut everywhere")
    worst.check()


@pytest.mark.rule("SB-O-004", "SB-O-005")
@pytest.mark.parametrize("name", thinned(ONE_EACH, FEW))
def test_scenarios_in_one_graph_and_mixed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is one graph, and computes prompts in pieces of a token or two; every second shard is on torch."""
    monkeypatch.setattr(stage, "PIECE", 5)
    worst = Worst(name)
    run(OverTensors(bundle(name, ()).pipeline(backend="onnxruntime", threads=1)), worst, "uncut")
    cut = bundle(name, (1, 3))
    for backends in ({"bottom": "onnxruntime", "top": "onnxruntime"}, {"trunk": "onnxruntime"}):
        run(OverTensors(cut.pipeline(backend=backends, threads=1)), worst, f"{backends}")
    worst.check()


@pytest.mark.parametrize("name", sorted(BY_PIECES))
@pytest.mark.parametrize("split", [(), (1, 3)])
def test_rows_that_outgrow_a_threshold(name: str, split: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with torch, whose own test compares it with the original on the same calls. These calls stay whole."""
    monkeypatch.setattr(stage, "PIECE", 5)
    whole = bundle(name, split)
    torch_pipeline, pipeline = whole.pipeline(), whole.pipeline(backend="onnxruntime", threads=1)
    ids = torch.tensor(token_rows(21, 21, 21, seed=5))
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        sessions = torch_pipeline.session(3, 40), pipeline.session(3, 40)
        for start in range(0, 21, 7):
            piece = ids[:, start : start + 7]
            expected = torch_pipeline(piece, attention_mask=mask, session=sessions[0])
            got = pipeline(piece.numpy(), attention_mask=mask.numpy(), session=sessions[1])
            assert numpy.abs(got - expected.numpy()).max() <= TOLERANCE * expected.abs().max().item()


@pytest.mark.parametrize("name", ["llama", "gpt2-by-layer", "gemma2-capped-biased", "apertus-biased", "qwen2_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_widened(name: str, dtype: str) -> None:
    """The graph computes in float32 on the stored weights, as torch does when it is asked for float32."""
    whole = bundle(name, (2,), dtype)
    assert whole.manifest.storage.dtype == dtype
    ids = torch.tensor(token_rows(12, 12, seed=6))
    with torch.no_grad():
        expected = whole.pipeline(dtype="float32")(ids).numpy()
    got = whole.pipeline(backend="onnxruntime", threads=1)(ids.numpy())
    assert numpy.abs(got - expected).max() <= TOLERANCE * numpy.abs(expected).max()


@pytest.mark.rule("SB-O-004", "SB-O-005")
@pytest.mark.parametrize("name", FLOAT16)
def test_computing_in_float16(name: str) -> None:
    """The deviation from the float32 answer is like transformers' in float16: in one call, in pieces, and padded."""
    pipeline = bundle(name, (2,), "float16", "float16").pipeline(backend="onnxruntime", threads=1)
    rows = token_rows(*[13] * 6, seed=1)
    ids, session = numpy.array(rows), pipeline.session(len(rows), 13)
    pieces = [pipeline(piece, session=session) for piece in numpy.split(ids, range(4, 13), axis=1)]
    assert {array.dtype for cache in session.caches for array in cache.arrays.values()} == {numpy.dtype("float16")}
    padded, mask = numpy.zeros((6, 18), numpy.int64), numpy.zeros((6, 18), numpy.int64)
    for i in range(6):
        padded[i, i : i + 13], mask[i, i : i + 13] = ids[i], 1
    among = pipeline(padded, attention_mask=mask)
    computed = {
        "prefill": pipeline(ids),
        "pieces": numpy.concatenate(pieces, axis=1),
        "padded": numpy.stack([among[i, i : i + 13] for i in range(6)]),
    }
    path = checkpoint(name, "float16")
    known, other = (
        torch.stack([original_logits(model, row) for row in rows])
        for model in (load_original(path), load_original(path, torch.float16))
    )
    allowed = deviations(other, known)
    for what, got in computed.items():
        assert got.dtype == numpy.float32
        ratio = float((deviations(torch.from_numpy(got), known) / allowed).log().mean().exp())
        assert 0.1 < ratio <= 1.25, what  # a value far below would mean that the graph doesn't compute in float16


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}])
def test_both_backends_draw_alike(sampling: dict[str, Any]) -> None:
    whole = bundle("llama")
    ids = torch.tensor(token_rows(5, 5, seed=7))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    drawn = [
        [
            token.tolist()
            for token in pipeline.generate(given, attention_mask=own, max_new_tokens=12, seed=4, **sampling)
        ]
        for pipeline, given, own in (
            (whole.pipeline(), ids, mask),
            (whole.pipeline(backend="onnxruntime"), ids.numpy(), mask.numpy()),
        )
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12


@pytest.mark.parametrize("options", [{"prepack": True}, {"threads": 2}])
def test_options_change_no_number(options: dict[str, Any]) -> None:
    whole, ids = bundle("qwen2-mixed", (2,)), numpy.array(token_rows(9, 9))
    plain = whole.pipeline(backend="onnxruntime", threads=1)(ids)
    assert (
        numpy.abs(whole.pipeline(backend="onnxruntime", **options)(ids) - plain).max() <= TOLERANCE * abs(plain).max()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_caches_are_extended_where_they_lie(dtype: str) -> None:
    """The session uses the graphs' memory: only a call that needs more slots makes another array."""
    whole = bundle("llama", (2,), dtype, "float16" if dtype == "float16" else "standard")
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(2, 50)
    pipeline(numpy.array(token_rows(5, 5)), session=session)
    cache = session.caches[1]
    assert {array.dtype.name for array in cache.arrays.values()} == {dtype}
    (name, *_), before = cache.arrays, {name: id(array) for name, array in cache.arrays.items()}
    row = cache.arrays[name][:, :, 5].copy()
    assert not row.any()
    pipeline(numpy.array(token_rows(1, 1)), session=session)
    assert {name: id(array) for name, array in cache.arrays.items()} == before
    assert cache.arrays[name][:, :, 5].all()


@pytest.mark.parametrize("logits", ["all", "last", 4])
def test_a_prompt_in_pieces_is_the_prompt(logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have other lengths and pasts."""
    whole = bundle("llama", (2,))
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    rows, mask = numpy.array(token_rows(11, 11)), numpy.array([[1] * 11, [0] * 7 + [1] * 4])
    lengths: list[int] = []
    compute = graph.LoadedGraph.run

    def watched(graph: Any, x: Any, *rest: Any) -> Any:
        lengths.append(x.shape[1])
        return compute(graph, x, *rest)

    monkeypatch.setattr(graph.LoadedGraph, "run", watched)
    results = []
    for size, expected in ((1000, [11]), (6, [3, 3, 3, 2])):
        monkeypatch.setattr(stage, "PIECE", size)
        session = pipeline.session(2, 40)
        pipeline(rows[:, :3], attention_mask=numpy.array([[1, 0, 0], [1, 1, 1]]), session=session)
        lengths.clear()
        results.append(pipeline(rows, attention_mask=mask, session=session, logits=logits))
        assert lengths == expected * 2  # two shards
    assert numpy.abs(results[0] - results[1]).max() <= TOLERANCE * numpy.abs(results[0]).max()


def test_a_session_that_memory_cannot_hold_is_refused_at_once() -> None:
    whole = bundle("llama", (2,))
    for backend in ("torch", "onnxruntime"):
        with pytest.raises(BundleError, match=r"\[session.capacity\] capacity: expected slots that memory can hold"):
            whole.pipeline(backend=backend).session(10**12, 40)
