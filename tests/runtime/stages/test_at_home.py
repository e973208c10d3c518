"""Stages and sessions at home in any process: modes of torch, copies, ids of every width, wrappers, export."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch.pipeline import Pipeline
from tests.runtime.conftest import ALL, GOLDEN

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def tokens(pipeline: Pipeline, **options: object) -> list[int]:
    return [int(token[0]) for token in pipeline.generate(IDS, max_new_tokens=4, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_padded_batch_with_a_cache_under_autocast(gpt2: splitbundle.Bundle, dtype: torch.dtype) -> None:
    pipeline = gpt2.pipeline()
    ids, mask = torch.tensor([[0, 0, 3, 1], [3, 1, 4, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.autocast("cpu", dtype=dtype):
        session = pipeline.session(2, 8)
        padded = pipeline(ids, attention_mask=mask, session=session)
        assert len(list(pipeline.generate(ids, attention_mask=mask, max_new_tokens=3))) == 3
    exact = pipeline(ids, attention_mask=mask)
    assert (padded.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", torch.float16), ("float16", torch.bfloat16)])
def test_weights_of_one_short_dtype_under_autocast_of_another(stored: str, dtype: torch.dtype, name: str) -> None:
    """transformers computes Llama so, and fails for GPT-2: torch's layer norm refuses the mixture."""
    bundle = splitbundle.open(GOLDEN / name)
    exact = bundle.pipeline(dtype="float32")(IDS)
    pipeline = bundle.pipeline(dtype=stored)
    ids, mask = torch.tensor([[0, 0, 3, 1], [3, 1, 4, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.autocast("cpu", dtype=dtype):
        found = pipeline(IDS)
        assert len(list(pipeline.generate(ids, attention_mask=mask, max_new_tokens=3))) == 3
    assert (found.float() - exact).abs().max() <= 0.05 * exact.abs().max()


def test_a_session_that_begins_in_inference_mode_goes_on_outside(gpt2: splitbundle.Bundle) -> None:
    pipeline = gpt2.pipeline()
    expected = tokens(pipeline)
    with torch.inference_mode():
        session = pipeline.session(1, 16)
        pipeline(IDS[:, :3], session=session)
        stream = pipeline.generate(IDS, max_new_tokens=4)
        first = int(next(stream)[0])
        session.reorder([0])
    with torch.no_grad():
        pipeline(IDS[:, 3:], session=session)
    session.rollback(5)
    assert tokens(pipeline, session=session) == expected
    assert [first, *(int(token[0]) for token in stream)] == expected


def test_a_stage_that_is_loaded_in_inference_mode_can_be_trained(gpt2: splitbundle.Bundle) -> None:
    with torch.inference_mode():
        stage = gpt2.stage(gpt2.shards[0].name, trainable=True)
    stage(IDS).sum().backward()
    assert all(parameter.grad is not None for parameter in stage.parameters())


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_a_session_can_be_copied(gpt2: splitbundle.Bundle, how: str) -> None:
    pipeline = gpt2.pipeline()
    session = pipeline.session(1, 16)
    with torch.no_grad():
        pipeline(IDS[:, :3], session=session)
    other = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda session: pickle.loads(pickle.dumps(session)),
    }[how](session)
    with torch.no_grad():
        one = pipeline(IDS[:, 3:], session=session)
        pipeline(torch.tensor([[9, 9, 9]]), session=session)  # the copy must not see this
        assert torch.equal(pipeline(IDS[:, 3:], session=other), one)
    assert (session.past, other.past) == ([8], [5])


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_a_copy_that_is_made_in_inference_mode_goes_on_outside(gpt2: splitbundle.Bundle, how: str) -> None:
    pipeline = gpt2.pipeline()
    session = pipeline.session(1, 16)
    with torch.inference_mode():
        pipeline(IDS[:, :3], session=session)
        other = {
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": lambda session: pickle.loads(pickle.dumps(session)),
        }[how](session)
    with torch.no_grad():
        assert torch.equal(pipeline(IDS[:, 3:], session=other), pipeline(IDS[:, 3:], session=session))


def test_a_session_can_be_saved(gpt2: splitbundle.Bundle) -> None:
    file = io.BytesIO()
    torch.save(gpt2.pipeline().session(1, 8), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).capacity == 8


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("sign", ["", "u"])
def test_ids_of_every_width(gpt2: splitbundle.Bundle, sign: str, bits: int) -> None:
    dtype = getattr(torch, f"{sign}int{bits}")
    stage = gpt2.stage(gpt2.shards[0].name)
    assert torch.equal(stage(IDS.to(dtype)), stage(IDS))
    counts = torch.tensor([3]).to(dtype)
    assert torch.equal(stage(IDS.to(dtype), count=counts), stage(IDS, count=[3]))


@pytest.mark.parametrize("wrong", [2**63, 2**64 - 1, 600])
def test_wide_ids_that_are_too_large(gpt2: splitbundle.Bundle, wrong: int) -> None:
    ids = torch.tensor([[1, wrong - 2**64 if wrong >= 2**63 else wrong]]).view(torch.uint64)
    with pytest.raises(BundleError, match=r"\[input.value\]"):
        gpt2.stage(gpt2.shards[0].name)(ids)


@pytest.mark.parametrize("number", [torch.tensor(2), torch.tensor(2, dtype=torch.int16)])
def test_numbers_of_torch(gpt2: splitbundle.Bundle, number: Tensor) -> None:
    pipeline = gpt2.pipeline()
    drawn = list(
        pipeline.generate(
            IDS,
            max_new_tokens=number,  # type: ignore[arg-type]
            temperature=torch.tensor(0.5),  # type: ignore[arg-type]
            top_k=number,  # type: ignore[arg-type]
            top_p=torch.tensor(0.9),  # type: ignore[arg-type]
            seed=number,  # type: ignore[arg-type]
            stop_ids=[number],  # type: ignore[list-item]
            session=pipeline.session(torch.tensor(1), torch.tensor(16)),  # type: ignore[arg-type]
        )
    )
    plain = pipeline.generate(IDS, max_new_tokens=2, temperature=0.5, top_k=2, top_p=float(torch.tensor(0.9)), seed=2)
    assert [int(token[0]) for token in drawn] == [int(token[0]) for token in plain]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_stage_can_be_exported(gpt2: splitbundle.Bundle, which: int, dynamic: bool) -> None:
    stage = gpt2.stage(gpt2.shards[which].name)
    width = gpt2.architecture.hidden_size
    generator = torch.Generator().manual_seed(0)

    def example(length: int) -> Tensor:
        if stage.embeds:
            return torch.randint(0, gpt2.architecture.vocab_size, (1, length), generator=generator)
        return torch.randn(1, length, width, generator=generator)

    shapes = {"inputs": {1: Dim("sequence", min=2, max=32)}} if dynamic else None
    exported = export(stage, (example(4),), dynamic_shapes=shapes).module()
    for length in (4, 9) if dynamic else (4,):
        x = example(length)
        with torch.no_grad():
            assert torch.allclose(exported(x), stage(x), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("experts.splitbundle", "int4.splitbundle")])
def test_a_program_for_any_batch_and_length(name: str) -> None:
    """Experts choose their tokens by the numbers themselves, which no program can."""
    bundle = splitbundle.open(GOLDEN / name)
    for shard in bundle.shards:
        stage = bundle.stage(shard.name, dtype="float32")

        def example(rows: int, length: int, stage: Any = stage) -> Tensor:
            if stage.embeds:
                return torch.arange(rows * length).reshape(rows, length) % bundle.architecture.vocab_size
            return torch.linspace(-1, 1, rows * length * bundle.architecture.hidden_size).reshape(rows, length, -1)

        shapes = {"inputs": {0: Dim("batch", min=1, max=8), 1: Dim("sequence", min=2, max=16)}}
        program = export(stage, (example(3, 4),), dynamic_shapes=shapes).module()
        with torch.no_grad():
            for rows, length in ((1, 5), (5, 7), (8, 16)):
                x = example(rows, length)
                assert torch.allclose(program(x), stage(x), atol=1e-4), (shard.name, rows, length)


class Wrapper(nn.Module):
    """A wrapper like DistributedDataParallel: it has the stage as ``module``, and none of its attributes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        self.calls += 1
        return self.module(*args, **kwargs)  # type: ignore[no-any-return]


def test_wrapped_stages_in_a_pipeline(gpt2: splitbundle.Bundle) -> None:
    stages = [gpt2.stage(shard.name) for shard in gpt2.shards]
    wrapped = [Wrapper(stages[0]), Wrapper(Wrapper(stages[1])), stages[2]]
    pipeline = Pipeline(wrapped)  # type: ignore[arg-type]
    assert tokens(pipeline) == tokens(gpt2.pipeline())
    assert wrapped[0].calls == wrapped[1].calls == 4  # type: ignore[union-attr]
    with pytest.raises(BundleError, match=r"\[pipeline.tiling\]"):
        Pipeline(wrapped[1:])  # type: ignore[arg-type]


def test_what_is_no_stage_is_refused(gpt2: splitbundle.Bundle) -> None:
    with pytest.raises(
        BundleError, match=r"\[pipeline.stage\] stages\[0\]: expected a stage, or an object that keeps the contract"
    ):
        Pipeline([nn.Linear(2, 2)])  # type: ignore[list-item]


def test_compiled_stages_in_a_pipeline(gpt2: splitbundle.Bundle) -> None:
    stages = [gpt2.stage(shard.name) for shard in gpt2.shards]
    compiled = [
        stages[0],
        torch.compile(stages[1], backend="eager"),
        Wrapper(torch.compile(stages[2], backend="eager")),
    ]
    with torch.no_grad():
        assert torch.allclose(Pipeline(compiled)(IDS), gpt2.pipeline()(IDS), atol=1e-5)  # type: ignore[arg-type]


def test_a_compiled_stage_computes_some_rows(gpt2: splitbundle.Bundle) -> None:
    stages = [gpt2.stage(shard.name) for shard in gpt2.shards]
    compiled = Pipeline([stages[0], torch.compile(stages[1], backend="eager"), stages[2]])  # type: ignore[list-item]
    plain, ids = gpt2.pipeline(), IDS.repeat(2, 1)
    session, expected = compiled.session(4, 20), plain.session(4, 20)
    with torch.no_grad():
        for rows in ([3, 1], [1, 3], [0, 3]):
            got = compiled(ids, session=session, rows=rows)
            assert torch.allclose(got, plain(ids, session=expected, rows=rows), atol=1e-5)


def test_what_adapters_look_for(gpt2: splitbundle.Bundle) -> None:
    """PEFT puts LoRA on ``nn.Embedding`` and ``nn.Linear``; a tied head has no weight of its own."""
    bottom = gpt2.stage(gpt2.shards[0].name)
    assert isinstance(bottom.get_submodule("embedding.token"), nn.Embedding)
    assert all(
        isinstance(bottom.get_submodule(f"layers.0.{name}"), nn.Linear) for name in ("mlp.up", "attention.query")
    )
