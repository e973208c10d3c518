"""Each number of a plan beside the real thing: the manifest's shards, and stages of torch, their caches and results."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import splitbundle
from splitbundle.backends.torch.stage import Stage
from splitbundle.format.dtypes import ITEM_SIZES
from splitbundle.planning.costs import RangeCosts, bundle_costs
from splitbundle.writing.shards import make_shards
from tests.support.models import CONFIGURATIONS, LAYERS, bundle
from tests.support.paths import TESTS
from tests.support.tiers import FEW, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = sorted((TESTS / "golden" / "v1.0").glob("*.splitbundle"))
COUNTED = (*FEW, "opt-post-narrow", "cohere-normed")
"""The second has a token table that is narrower than its hidden states, so there are two more projections. The third
has a norm with a weight for each head, which is no matrix of a linear layer."""
CACHED = ("gpt2", "llama", "mistral-window")
"""A key head for each query head, fewer key heads, and a window."""
assert set(COUNTED) | set(CACHED) <= set(CONFIGURATIONS)
RANGES = ((0, 0), (0, 2), (1, 3), (2, LAYERS), (LAYERS, LAYERS), (0, LAYERS))
ROWS, LENGTH = 3, 5


def own_costs(name: str, layers: tuple[int, int], dtype: str | None = None) -> RangeCosts:
    """Return the costs of a range with the ends that a stage of this range has by default."""
    opened = bundle(name)
    selected = opened.select(layers=layers)
    costs = bundle_costs(opened.manifest, opened.architecture, dtype)
    return costs.of_range(layers, embeds=selected.embeds, head=selected.head)


def inputs(stage: Stage, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if stage.embeds:
        return torch.randint(stage.architecture.vocab_size, (rows, length), generator=generator)
    return torch.randn(rows, length, stage.architecture.hidden_size, generator=generator).to(stage.dtype)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_bytes_and_parameters_are_those_of_the_manifest(path: Path) -> None:
    opened = splitbundle.open(path)
    costs = bundle_costs(opened.manifest, opened.architecture)
    for shard, own in zip(opened.shards, costs.of_shards(opened.manifest.cuts), strict=True):
        assert (own.bytes, own.parameters) == (shard.bytes, shard.parameters)
    for number in range(4):
        for cuts in itertools.combinations(range(len(opened.architecture.layers) + 1), number):
            made = make_shards(opened.architecture, cuts, None, opened.manifest.units, opened.manifest.files)
            assert [(own.layers, own.embeds, own.head, own.bytes, own.parameters) for own in costs.of_shards(cuts)] == [
                (shard.layers, shard.embeds, shard.head, shard.bytes, shard.parameters) for shard in made
            ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CACHED)
def test_the_cache_of_a_stage_has_the_planned_size(name: str, dtype: str) -> None:
    for layers in RANGES:
        cache = bundle(name).stage(layers=layers, dtype=dtype).cache(ROWS, LENGTH)
        held = sum(tensor.nbytes for part in (cache.keys, cache.values) for tensor in part.values())
        assert held == ROWS * LENGTH * own_costs(name, layers, dtype).cache_bytes_per_token
    assert own_costs(name, (0, 2)).cache_bytes_per_token == own_costs(name, (0, 2), "float32").cache_bytes_per_token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_the_weights_of_a_stage_have_the_planned_size(name: str, dtype: str) -> None:
    """These models aren't tied. A tied head's stage holds only the table of the embedding's unit."""
    for layers in RANGES:
        stage = bundle(name).stage(layers=layers, dtype=dtype)
        costs = own_costs(name, layers, dtype)
        assert costs.weight_bytes == sum(parameter.nbytes for parameter in stage.parameters())
        assert costs.memory_bytes(LENGTH, ROWS) == costs.weight_bytes + sum(
            tensor.nbytes
            for cache in [stage.cache(ROWS, LENGTH)]
            for part in (cache.keys, cache.values)
            for tensor in part.values()
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gpt2", "opt-post-narrow"])
def test_a_boundary_has_the_planned_size(name: str, dtype: str) -> None:
    for layers in RANGES:
        stage = bundle(name).stage(layers=layers, dtype=dtype)
        costs = own_costs(name, layers, dtype)
        if stage.has_head:
            assert (costs.boundary_bytes_per_token, costs.boundary_bytes_per_row) == (0, 0)
            continue
        with torch.no_grad():
            hidden = stage(inputs(stage, ROWS, LENGTH))
        assert hidden.nbytes == ROWS * LENGTH * costs.boundary_bytes_per_token
        (boundary, *_) = json.loads(bundle(name).manifest.to_bytes())["boundaries"]
        per_row = [tensor["dtype"] for tensor in boundary["tensors"].values() if tensor["shape"] == ["batch"]]
        assert costs.boundary_bytes_per_row == sum(ITEM_SIZES[each] for each in per_row)


@pytest.mark.parametrize("name", thinned(CONFIGURATIONS, COUNTED))
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """One token is computed after a cache of two lengths, so attention's share shows.

    With this kernel, torch counts the products of attention too. The longer context is longer than every window, and
    ends with a chunk.
    """
    opened = bundle(name)
    chunks = {kind.attention.chunk or 1 for kind in opened.architecture.layer_kinds.values()}
    assert len(chunks - {1}) <= 1
    short, long = 2, 2 * max(chunks) if max(chunks) > 1 else 9
    for layers in RANGES:
        stage = opened.stage(layers=layers, kernels="torch")
        costs = own_costs(name, layers)
        counted = []
        for context in (short, long):
            given, cache = inputs(stage, 1, context), stage.cache(1, context)
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                stage(given[:, :-1], cache=cache, logits="last")
                with FlopCounterMode(display=False) as counter:
                    stage(given[:, -1:], past=[context - 1], cache=cache)
            counted.append(counter.get_total_flops())
            assert costs.flops_per_token_at(context) == counted[-1], (layers, context)
        grown = sum(each.flops_per_token(long) - each.flops_per_token(short) for each in costs.attention)
        assert grown == counted[1] - counted[0]
        assert sum(each.layers for each in costs.attention) == layers[1] - layers[0]


def test_a_window_and_a_chunk_bound_the_positions() -> None:
    for name, bound in (("mistral-window", 5), ("llama4_text", 5), ("llama", None)):
        costs = own_costs(name, (0, LAYERS))
        assert bound in {each.most_positions for each in costs.attention}
    window = own_costs("mistral-window", (0, LAYERS))
    assert window.flops_per_token_at(5) == window.flops_per_token_at(500) > window.flops_per_token_at(4)
