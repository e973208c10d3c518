"""The helpers for training parts, and dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch.stage import Stage
from splitbundle.training import (
    boundary,
    freeze,
    label_count,
    next_labels,
    sum_tied_gradients,
    tied_gradient,
    token_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 3, 9, 1], [7, 7, 2, 4]])


def stages(bundle: splitbundle.Bundle, **options: object) -> list[Stage]:
    return [bundle.stage(shard.name, trainable=True, **options) for shard in bundle.shards]  # type: ignore[call-overload]


# Boundaries.


def test_a_boundary_hands_the_gradient_back(gpt2: splitbundle.Bundle) -> None:
    bottom, trunk, _ = stages(gpt2)
    trunk(bottom(IDS)).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in bottom.parameters()]
    bottom.zero_grad()
    cut = boundary(bottom(IDS))
    assert cut.hidden.is_leaf
    trunk(cut.hidden).square().mean().backward()
    assert all(parameter.grad is None for parameter in bottom.parameters())
    sent = cut.gradient.clone()
    cut.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(bottom.parameters(), expected, strict=True))
    bottom.zero_grad()
    remote = boundary(bottom(IDS))
    remote.backward(sent)
    assert all(torch.equal(p.grad, e) for p, e in zip(bottom.parameters(), expected, strict=True))


def test_wrong_boundaries(gpt2: splitbundle.Bundle) -> None:
    bottom = gpt2.stage("bottom", trainable=True)
    cut = boundary(bottom(IDS))
    with pytest.raises(BundleError, match=r"\[input.grad\] hidden: expected a gradient of this boundary, got none"):
        cut.backward()
    for wrong in (torch.zeros(2, 4, 3), cut.hidden.detach().double()):
        with pytest.raises(BundleError, match=r"\[input.value\] gradient: expected torch.float32 \[2, 4, 48\]"):
            cut.backward(wrong)
    for wrong in (IDS, "hidden", None):
        with pytest.raises(BundleError, match=r"\[input.value\] hidden"):
            boundary(wrong)  # type: ignore[arg-type]
    twice = boundary(bottom(IDS))
    twice.backward(torch.ones_like(twice.hidden))
    with pytest.raises(BundleError, match=r"\[input.grad\] hidden: expected one call, got a second"):
        twice.backward(torch.ones_like(twice.hidden))
    freeze(bottom)
    frozen = boundary(bottom(IDS))
    frozen.hidden.sum().backward()
    frozen.backward()  # there is nothing before it to take a gradient


# Frozen parameters.


def trains(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_freezing(gpt2: splitbundle.Bundle) -> None:
    trunk = gpt2.stage("trunk", trainable=True)
    freeze(trunk, but=["layers.1.mlp"])
    assert trains(trunk) == {f"layers.1.mlp.{n}.{k}" for n in ("up", "down") for k in ("weight", "bias")}
    freeze(trunk)
    assert trains(trunk) == set()
    freeze(trunk, but="layers.1.attention.query.bias")
    assert trains(trunk) == {"layers.1.attention.query.bias"}
    pipeline = gpt2.pipeline(trainable=True)
    freeze(pipeline, but=["embedding.token", "layers.2"])
    names = {name for stage in pipeline.stages for name in trains(stage)}
    assert names >= {"embedding.token.weight", "layers.2.mlp.up.weight"}
    assert not any(name.startswith(("layers.0", "layers.1", "head", "embedding.position")) for name in names)
    for wrong in (["layers.1.m"], ["layers.9"], ["stages.0"], [""]):
        with pytest.raises(BundleError, match=r"\[input.value\] but: expected the beginning of a parameter's name"):
            freeze(trunk, but=wrong)
    with pytest.raises(BundleError, match=r"\[input.value\] stages"):
        freeze("trunk")  # type: ignore[arg-type]


# Losses.


def test_labels() -> None:
    assert next_labels(IDS).tolist() == [[3, 9, 1, -100], [7, 2, 4, -100]]
    assert next_labels(IDS, [2, 4]).tolist() == [[3, -100, -100, -100], [7, 2, 4, -100]]
    assert next_labels(IDS, torch.tensor([1, 0])).tolist() == [[-100] * 4] * 2
    assert label_count(next_labels(IDS)) == 6
    assert label_count([next_labels(IDS), next_labels(IDS, [2, 4])]) == 10


def test_the_shares_add_up_to_the_loss_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 11, generator=generator)
    labels = next_labels(IDS, [2, 4])
    whole = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    parts = [token_loss(logits[i : i + 1], labels[i : i + 1], label_count(labels)) for i in range(2)]
    assert torch.allclose(sum(parts, torch.zeros(())), whole)
    assert token_loss(logits[:1].bfloat16(), labels[:1], 4).dtype == torch.float32
    for wrong in (0, 2, 1.5, None):
        with pytest.raises(BundleError, match=r"\[input.value\] tokens: expected label_count of all micro-batches"):
            token_loss(logits, labels, wrong)  # type: ignore[arg-type]


def test_wrong_labels() -> None:
    logits, labels = torch.zeros(2, 4, 11), next_labels(IDS)
    assert token_loss(logits, labels.int(), torch.tensor(6)) > 0  # type: ignore[arg-type]
    assert token_loss(logits, torch.full((2, 4), -100), 3) == 0
    for wrong in (labels[:1], labels[:, :2], labels + 11, torch.full((2, 4), -1)):
        with pytest.raises(BundleError, match=r"\[input.value\] labels"):
            token_loss(logits, wrong, 99)
    for wrong_ids in (IDS[0], IDS.float(), [[1, 2]]):
        with pytest.raises(BundleError, match=r"\[input.value\] token_ids"):
            next_labels(wrong_ids)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"\[input.value\] count"):
        next_labels(IDS, [1])


# Tied tables.


def test_tied_tables_in_one_process_and_in_two(gpt2: splitbundle.Bundle) -> None:
    """Both ends take the same steps, and stay equal to the bit."""
    pipeline = gpt2.pipeline(trainable=True)
    pipeline(IDS).square().mean().backward()
    whole = pipeline.stages[0].embedding.token.weight.grad

    def ends() -> tuple[Stage, Stage]:
        bottom, trunk, top = stages(gpt2)
        cut = boundary(trunk(bottom(IDS)))
        top(cut.hidden).square().mean().backward()
        cut.backward()
        return bottom, top

    for apart in (False, True):
        bottom, top = ends()
        if apart:  # each process sends its gradient to the other
            sent = tied_gradient(bottom).clone(), tied_gradient(top).clone()
            sum_tied_gradients(bottom, sent[1])
            sum_tied_gradients(top, sent[0])
        else:
            sum_tied_gradients(bottom, top)
        tables = [end.embedding.token.weight for end in (bottom, top)]
        assert torch.equal(tables[0].grad, tables[1].grad)
        assert torch.allclose(tables[0].grad, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
        for end in (bottom, top):
            torch.optim.AdamW(end.parameters(), lr=0.1).step()
        assert torch.equal(*tables)


def test_ends_without_a_tied_table(gpt2: splitbundle.Bundle) -> None:
    bottom, trunk, top = stages(gpt2)
    with pytest.raises(BundleError, match=r"\[input.value\] stage: expected a stage with a tied token table"):
        sum_tied_gradients(trunk, top)
    assert not tied_gradient(bottom).any()  # no backward pass came yet
    with pytest.raises(BundleError, match=r"\[input.value\] other: expected a gradient of torch.float32"):
        sum_tied_gradients(bottom, torch.zeros(3))
    pipeline = gpt2.pipeline(trainable=True)
    pipeline(IDS).sum().backward()
    before = tied_gradient(pipeline.stages[0]).clone()
    sum_tied_gradients(pipeline.stages[0], pipeline.stages[2])  # one parameter already
    assert torch.equal(tied_gradient(pipeline.stages[0]), before)


# Dropout.


def outputs(stage: Stage, x: Tensor, times: int = 400) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.stack([stage(x) for _ in range(times)])


def test_dropout_is_off_unless_it_is_asked_for(gpt2: splitbundle.Bundle) -> None:
    x = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1))
    plain = gpt2.stage("trunk", trainable=True)
    with torch.no_grad():
        expected = plain.train()(x)
        assert torch.equal(plain.eval()(x), expected)
        dropped = gpt2.stage("trunk", trainable=True, dropout={"attention_output": 0.5, "attention": 0.5})
        assert not torch.equal(dropped(x), expected)
        assert torch.equal(dropped.eval()(x), expected)
    pipeline = gpt2.pipeline(trainable=True, dropout={"embedding": 0.5})
    with torch.no_grad():
        assert not torch.equal(pipeline(IDS), gpt2.pipeline(kernels="torch")(IDS))


def test_the_mean_over_many_masks_is_the_result_without_dropout(gpt2: splitbundle.Bundle) -> None:
    """What is dropped is made up for by what is kept: at the last step of each place, the mean stays."""
    x = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1))
    stage = gpt2.stage("trunk", trainable=True, dropout={"attention_output": 0.3, "mlp_output": 0.3})
    layer = stage.layers["1"]
    torch.manual_seed(0)
    ones = torch.ones(1000, 48)
    dropped = layer._dropped(ones, 0)
    assert {round(float(value), 4) for value in dropped.unique()} == {0.0, round(1 / 0.7, 4)}
    assert abs(float(dropped.mean()) - 1) < 0.02
    embedding = gpt2.stage("bottom", trainable=True, dropout={"embedding": 0.25}).embedding
    assert embedding is not None
    assert embedding.dropout == 0.25
    assert outputs(stage, x, 5).std(0).max() > 0.1


def test_wrong_rates(gpt2: splitbundle.Bundle) -> None:
    for wrong in (
        {"mlp": 0.1},
        {"mlp_output": 1.0},
        {"mlp_output": -0.1},
        {"mlp_output": "x"},
        {"mlp_output": True},
        0.1,
    ):
        with pytest.raises(BundleError, match=r"\[input.value\] dropout: expected a rate from 0 to below 1"):
            gpt2.stage("trunk", trainable=True, dropout=wrong)  # type: ignore[call-overload]
    with pytest.raises(BundleError, match=r"\[input.value\] dropout: expected nothing, without trainable=True"):
        gpt2.stage("trunk", dropout={"mlp_output": 0.1})
