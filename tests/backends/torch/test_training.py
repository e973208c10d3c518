"""Training: gradients and steps equal the original's, and the bundle doesn't change."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from splitbundle import Bundle
from splitbundle.format.architecture.experts import Experts
from tests.support import models
from tests.support.models import (
    LAYERS,
    ONE_PER_FAMILY,
    TOLERANCE,
    bundle,
    checkpoint,
    expected_logits,
    load_original,
    make_model,
    relative,
    token_rows,
)
from tests.support.pipelines import left_padded
from tests.support.tiers import EVERY_FACT, thinned

pytestmark = pytest.mark.usefixtures("one_thread")


def digests(whole: Bundle) -> dict[str, str]:
    """Return each file's sha256."""
    files = (path for path in whole.path.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def original_loss(model: Any, ids: Tensor) -> Tensor:
    """The loss of each next token. *Shape:* (batch, sequence) -> ()."""
    return next_token_loss(model(input_ids=ids).logits, ids)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """*Shape:* (batch, sequence, vocab), (batch, sequence) -> ()."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def source_gradients(whole: Bundle, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename gradients from canonical names to the source's names and layouts, by the manifest's own table."""
    from splitbundle.format.manifest.document import expand
    from splitbundle_converter.translation.restore import join

    return {
        name: gradient
        for template in whole.manifest.source_names
        for entry in expand(template, LAYERS)
        for name, gradient in join(entry, gradients.__getitem__).items()
    }


def assert_gradients(whole: Bundle, gradients: dict[str, Tensor], model: Any) -> None:
    """Compare each gradient with the original's."""
    got = source_gradients(whole, gradients)
    compared = 0
    mlp = whole.architecture.kind_of(0).mlp
    one_expert = isinstance(mlp, Experts) and mlp.per_token == 1 and mlp.router.normalised
    for name, gradient in models.source_gradients(model).items():
        if name.endswith(("attn.c_attn.bias", "k_proj.bias")) or (name.endswith("gate.weight") and one_expert):
            # Without rotations a key's bias changes nothing: its gradient is noise, so the whole vector is the scale.
            # So does the router of a single expert whose weight is divided by itself.
            assert (got[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-3)
        elif not gradient.any():  # an expert that no token chose
            assert not got[name].any(), name
        else:
            assert relative(got[name], gradient) <= 1e-4, name
        compared += 1
    assert compared >= 6 * LAYERS


@pytest.mark.parametrize("name", [*thinned(ONE_PER_FAMILY, EVERY_FACT), "gpt2", "gpt2-unscaled-untied", "llama"])
def test_gradients_of_a_pipeline(name: str) -> None:
    whole = bundle(name)
    parts = whole.pipeline(trainable=True)
    model = load_original(checkpoint(name))
    ids = torch.tensor(token_rows(9, 9))
    original_loss(model, ids).backward()
    loss = next_token_loss(parts(ids), ids)
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for stage in parts.stages:
        for key, parameter in stage.named_parameters():
            assert (parameter.grad is not None) is parameter.requires_grad is (not key.endswith("router.correction"))
            gradients[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert_gradients(whole, gradients, model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma-one-kv-biased"])
def test_split_learning_by_hand(name: str) -> None:
    """Bottom, trunk and top are on three machines. Activations go up without a graph, and their gradients come down.

    Each machine has its own copy of a tied embedding, so its gradient is the sum of the two.
    """
    whole = bundle(name)
    stages = [whole.stage(layers=ends, trainable=True) for ends in ((0, 1), (1, 3), (3, 4))]
    model = load_original(checkpoint(name))
    ids = torch.tensor(token_rows(9, 9))
    original_loss(model, ids).backward()

    sent, received = [], []
    x = ids
    for stage in stages:
        x = stage(x)
        sent.append(x)
        x = x.detach().requires_grad_()
        received.append(x)
    next_token_loss(sent[-1], ids).backward()
    for i in (1, 0):
        gradient = received[i].grad
        assert gradient is not None
        sent[i].backward(gradient)

    gradients: dict[str, Tensor] = {}
    for stage in stages:
        for key, parameter in stage.named_parameters():
            assert parameter.grad is not None
            gradients[key] = gradients.get(key, 0) + parameter.grad
    assert_gradients(whole, gradients, model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_does_not_change_the_bundle(name: str) -> None:
    whole = bundle(name)
    before = digests(whole)
    parts = whole.pipeline(trainable=True)
    ids = torch.tensor(token_rows(9, 9))
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = next_token_loss(parts(ids), ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert digests(whole) == before
    known = expected_logits(name, tuple(ids[0].tolist()))
    assert relative(whole.pipeline()(ids)[0], known) <= TOLERANCE
    assert relative(parts(ids)[0], known) > 100 * TOLERANCE


def test_one_step_is_the_original_s_step() -> None:
    """With a tied table, the two uses must add up in one parameter. Otherwise the step is a different one."""
    name = "llama-one-kv-biased-tied"
    model = make_model(name)
    parts = bundle(name).pipeline(trainable=True)
    ids = torch.tensor(token_rows(9, 9))
    for module, loss in ((model, original_loss(model, ids)), (parts, next_token_loss(parts(ids), ids))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert relative(parts(ids), model(input_ids=ids).logits) <= 10 * TOLERANCE


def test_a_tied_table_is_one_parameter() -> None:
    parts = bundle("gpt2").pipeline(trainable=True)
    first, last = parts.stages[0], parts.stages[-1]
    assert first.embedding.token.weight is last.embedding.token.weight  # type: ignore[union-attr]
    names = [name for name, _ in parts.named_parameters() if "token" in name]
    assert names == ["stages.0.embedding.token.weight"]
    apart = [bundle("gpt2").stage(name, trainable=True) for name in ("bottom", "top")]
    assert apart[0].embedding.token.weight is not apart[1].embedding.token.weight  # type: ignore[union-attr]


def test_a_padded_batch_trains_as_its_rows_do() -> None:
    """Padding must not enter a gradient."""
    name = "mistral-window"
    rows = token_rows(9, 4)
    ids, mask = left_padded(rows)
    padded_parts, parts = (bundle(name).pipeline(trainable=True) for _ in range(2))
    logits = padded_parts(ids, attention_mask=mask)
    sum(logits[i, -len(row) :].square().sum() for i, row in enumerate(rows)).backward()
    sum(parts(torch.tensor([row])).square().sum() for row in rows).backward()
    for (key, one), other in zip(padded_parts.named_parameters(), parts.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert relative(one.grad, other.grad) <= 1e-4, key
