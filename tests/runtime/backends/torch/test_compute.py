"""Results of the golden bundles, compared with the results of their original models."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.stages.golden import TOLERANCE
from splitbundle.storage.reader import VECTORS
from tests.runtime.conftest import ALL, GOLDEN


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Assert that results are within the design's tolerance, and have no NaN."""
    return bool((got - expected).abs().max() <= TOLERANCE * expected.abs().max())


@pytest.mark.rule("SB-G-001")
@pytest.mark.parametrize("name", ALL)
def test_golden_vectors_hold(name: str) -> None:
    golden = splitbundle.open(GOLDEN / name)
    assert TOLERANCE == 1e-5
    differences = golden.run_vectors()
    places = [f"hidden.{cut}" for cut in golden.manifest.cuts] + ["logits"]
    assert [difference.where for difference in differences] == places
    for shard in golden.shards:
        golden.run_vectors(shard.name)


def test_every_cut_gives_the_golden_values(golden: splitbundle.Bundle) -> None:
    vectors = map_tensors(golden, VECTORS)
    layers = len(golden.architecture.layers)
    for start, stop in itertools.combinations(range(layers + 1), 2):
        stage = golden.stage(layers=(start, stop), embeds=False, head=False, dtype="float32")
        for case in range(len(golden.manifest.vectors.lengths)):  # type: ignore[union-attr]
            got = stage(vectors[f"case.{case}.hidden.{start}"][None])[0]
            assert close(got, vectors[f"case.{case}.hidden.{stop}"]), (start, stop, case)


def test_padded_rows_with_a_cache_give_the_golden_logits(golden: splitbundle.Bundle) -> None:
    vectors = map_tensors(golden, VECTORS)
    lengths = golden.manifest.vectors.lengths  # type: ignore[union-attr]
    pipeline = golden.pipeline(dtype="float32")
    width = max(lengths) + 2
    for left in (0, 1, 2):
        ids = torch.zeros(len(lengths), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            start = min(left * 11, width - length)
            ids[row, start : start + length] = vectors[f"case.{row}.ids"]
            mask[row, start : start + length] = 1
        session = pipeline.session(batch_size=len(lengths), capacity=40)
        got = pipeline(ids, attention_mask=mask, session=session)
        assert bool((got[mask == 0] == 0).all())
        assert session.past == list(lengths)
        last = pipeline(ids, attention_mask=mask, logits="last")
        for row in range(len(lengths)):
            end = int(mask[row].nonzero().max())
            assert close(got[row, end], vectors[f"case.{row}.logits"])
            assert close(last[row, 0], vectors[f"case.{row}.logits"])


def test_pieces_give_what_the_whole_gives(golden: splitbundle.Bundle) -> None:
    vectors = map_tensors(golden, VECTORS)
    pipeline = golden.pipeline(dtype="float32")
    ids = vectors["case.2.ids"][None]
    session = pipeline.session(capacity=ids.shape[1])
    for piece in ids.split([5, 1, 9, 9], dim=1):
        got = pipeline(piece, session=session, logits="last")
    assert close(got[0, 0], vectors["case.2.logits"])
    session.rollback(6)
    for token in ids[:, -6:].split(1, dim=1):
        got = pipeline(token, session=session)
    assert close(got[0, 0], vectors["case.2.logits"])
    with pytest.raises(BundleError, match=r"session.capacity.*expected at least 25 slots, got 24"):
        pipeline(ids[:, :1], session=session)


def test_generation_is_the_argmax_of_calls(gpt2: splitbundle.Bundle) -> None:
    pipeline = gpt2.pipeline()
    ids = pipeline.token_ids([[5, 6, 7]])
    tokens = [int(token[0]) for token in pipeline.generate(ids, max_new_tokens=6)]
    for token in tokens:
        assert token == int(pipeline(ids)[0, -1].argmax())
        ids = torch.cat((ids, pipeline.token_ids([[token]])), dim=1)
    drawn = [
        [int(token[0]) for token in pipeline.generate(ids, max_new_tokens=6, temperature=2.0, seed=seed)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_weights_are_mapped_and_never_written(copy: Path) -> None:
    def digests() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in copy.glob("*.safetensors")}

    before = digests()
    bundle = splitbundle.open(copy)
    assert not any(parameter.requires_grad for parameter in bundle.pipeline().parameters())
    pipeline = bundle.pipeline(trainable=True)
    tables = {id(p) for name, p in pipeline.named_parameters(remove_duplicate=False) if name.endswith("token.weight")}
    assert len(tables) == 1  # the bottom's table and the tied head are one parameter
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    ids = pipeline.token_ids([[1, 2, 3, 4]])
    first = pipeline(ids)
    first.logsumexp(-1).mean().backward()
    optimizer.step()
    assert not close(pipeline(ids), first.detach())
    assert close(bundle.pipeline()(ids), first.detach())
    assert digests() == before


def test_state_dict_bears_canonical_names(golden: splitbundle.Bundle) -> None:
    names = {name for tensors in golden.architecture.unit_tensors().values() for name in tensors}
    stages = [golden.stage(shard.name) for shard in golden.shards]
    assert set().union(*(stage.state_dict() for stage in stages)) == names


@pytest.mark.rule("SB-B-001")
def test_what_crosses_a_boundary_is_checked(gpt2: splitbundle.Bundle) -> None:
    trunk = gpt2.stage("trunk")
    for hidden, text in (
        (
            torch.zeros(1, 2, 47),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 48), got (1, 2, 47). "
            "It must be the output of the stage before, of the same model",
        ),
        (
            torch.zeros(1, 2, 48, dtype=torch.float64),
            "[input.dtype] stage trunk, hidden at layer 1: expected torch.float32, as this stage computes, "
            "got torch.float64. Convert it with .to(stage.dtype), or open the stage with dtype=",
        ),
    ):
        with pytest.raises(BundleError) as caught:
            trunk(hidden)
        assert str(caught.value) == text
