"""Parts trained across a cut: boundaries by hand, micro-batches, activation checkpointing and tied tables, against the
unsplit model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import splitbundle
from splitbundle import Bundle
from splitbundle.training import boundary, label_count, next_labels, sum_tied_gradients, token_loss
from tests.backends.torch.test_training import source_gradients
from tests.support import models
from tests.support.models import LAYERS, ONE_PER_FAMILY, bundle, checkpoint, load_original, token_rows
from tests.support.tiers import FEW, USUAL, thinned

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = ((9, 9), (5,), (2, 2, 2))
"""The lengths of the rows of each micro-batch."""


def batches() -> list[Tensor]:
    return [torch.tensor(token_rows(*lengths)) for lengths in BATCHES]


def original_gradients(name: str) -> dict[str, Tensor]:
    """Return the gradients of the mean over all tokens of all batches, from the unsplit model in one pass each."""
    model = load_original(checkpoint(name))
    total = sum(ids.shape[0] * (ids.shape[1] - 1) for ids in batches())
    for ids in batches():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        (functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / total).backward()
    return models.source_gradients(model)


def gradients_over_a_cut(whole: Bundle, cut: int, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of two stages that were loaded apart, under canonical names."""
    layers = len(whole.architecture.layers)
    bottom = whole.stage(layers=(0, cut), embeds=True, head=False, trainable=True, **options)
    top = whole.stage(layers=(cut, layers), embeds=False, head=True, trainable=True, **options)
    labels = [next_labels(ids) for ids in batches()]
    for ids, own in zip(batches(), labels, strict=True):
        handed = boundary(bottom(ids))
        token_loss(top(handed.hidden), own, label_count(labels)).backward()
        handed.backward()
    if whole.architecture.head.tied:
        sum_tied_gradients(bottom, top)
        assert torch.equal(bottom.embedding.token.weight.grad, top.embedding.token.weight.grad)
    found: dict[str, Tensor] = {}
    for stage in (bottom, top):
        for key, parameter in stage.named_parameters():
            assert (parameter.grad is not None) is (not key.endswith("router.correction")), key
            found[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found


def assert_equal(whole: Bundle, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare every gradient. The largest gradient of the model is the scale."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    own = source_gradients(whole, got)
    assert expected.keys() <= own.keys()
    for name, gradient in expected.items():
        assert (own[name] - gradient).abs().max() <= 1e-5 * largest, name


@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, FEW))
def test_gradients_over_a_cut(name: str) -> None:
    """One cut and all options together; the long tests have the others."""
    cut = 1 + ONE_PER_FAMILY.index(name) % (LAYERS - 1)
    whole = bundle(name)
    assert_equal(whole, gradients_over_a_cut(whole, cut, checkpoint_activations=True), original_gradients(name))


@pytest.mark.long
@pytest.mark.parametrize("name", [*thinned(ONE_PER_FAMILY, USUAL), "gpt2", "llama"])
def test_gradients_over_every_cut(name: str, tally: Callable[[str, int], None]) -> None:
    whole, expected = bundle(name), original_gradients(name)
    for cut in range(LAYERS + 1):
        for options in ({}, {"checkpoint_activations": True}):
            assert_equal(whole, gradients_over_a_cut(whole, cut, **options), expected)
            tally("gradients of a whole model over a cut", 1)


def test_checkpointing_changes_no_bit() -> None:
    whole = bundle("gpt2")
    plain, saving = (gradients_over_a_cut(whole, 2, checkpoint_activations=on) for on in (False, True))
    assert all(torch.equal(plain[name], saving[name]) for name in plain)
    dropped = []
    for on in (False, True):
        torch.manual_seed(3)
        dropped.append(
            gradients_over_a_cut(whole, 2, checkpoint_activations=on, dropout={"mlp_output": 0.1, "attention": 0.1})
        )
    assert all(torch.equal(dropped[0][name], dropped[1][name]) for name in plain)
    assert not torch.equal(dropped[0]["layers.0.mlp.up.weight"], plain["layers.0.mlp.up.weight"])


def losses(pipelines: Sequence[Any], optimizers: Sequence[torch.optim.Optimizer], ids: Tensor) -> float:
    x: Any = ids
    for part in pipelines:
        x = part(x)
    loss = token_loss(x, next_labels(ids), label_count(next_labels(ids)))
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return float(loss)


@pytest.mark.parametrize("steps", [12, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_the_loss_curve_of_the_trained_example(kind: str, steps: int, tmp_path: Any) -> None:
    """Three stages with an optimizer each follow the unsplit model of transformers, step by step."""
    from transformers import AutoModelForCausalLM

    import splitbundle_converter
    from tests.support.paths import ROOT

    source = ROOT / "examples" / "license-gpt2"
    whole = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", split=[2, 4], check=False)
    pipeline = whole.pipeline(trainable=True)
    make = {"AdamW": lambda own: torch.optim.AdamW(own, lr=1e-3), "SGD": lambda own: torch.optim.SGD(own, lr=1e-3)}[
        kind
    ]
    seen: set[int] = set()
    optimizers = []
    for stage in pipeline.stages:  # the tied table is one parameter, and has one optimizer
        own = [parameter for parameter in stage.parameters() if id(parameter) not in seen]
        seen |= {id(parameter) for parameter in own}
        optimizers.append(make(own))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    single = make(model.parameters())
    generator = torch.Generator().manual_seed(1)
    worst, first = 0.0, None
    for _ in range(steps):
        ids = torch.randint(0, whole.architecture.vocab_size, (2, 16), generator=generator)
        split = losses(pipeline.stages, optimizers, ids)
        unsplit = losses([lambda ids: model(input_ids=ids).logits], [single], ids)
        worst, first = max(worst, abs(split - unsplit)), split if first is None else first
    assert worst <= 1e-4
    assert split != first


def test_memory_of_one_trained_stage() -> None:
    """Only the trained stage has gradients and optimizer state. The frozen ones stay as they are in the files."""
    whole = bundle("llama")
    bottom, trunk, top = (whole.stage(layers=layers, trainable=True) for layers in ((0, 1), (1, 3), (3, 4)))
    splitbundle.training.freeze(bottom, top)
    before = {name: p.data_ptr() for stage in (bottom, top) for name, p in stage.named_parameters()}
    optimizer = torch.optim.AdamW(trunk.parameters())
    ids = torch.tensor(token_rows(9, 9))
    token_loss(top(trunk(bottom(ids))), next_labels(ids), 16).backward()
    optimizer.step()
    assert all(p.grad is None and p._version == 0 for stage in (bottom, top) for p in stage.parameters())
    assert before == {name: p.data_ptr() for stage in (bottom, top) for name, p in stage.named_parameters()}
    held = sum(p.grad.nbytes for p in trunk.parameters()) + sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    size = sum(p.nbytes for p in trunk.parameters())
    assert held <= 3 * size + 8 * len(list(trunk.parameters()))
