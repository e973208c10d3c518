"""Layers with the same input compute as one product, and each for itself wherever that could change a number."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as hooks

import splitbundle
from splitbundle.backends.torch import joint, rms_norms
from splitbundle.backends.torch.feedforward import Mlp
from splitbundle.backends.torch.quantized_modules import Codes
from splitbundle.backends.torch.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of outputs of every joint product."""
    seen: list[int] = []
    original = joint.product

    def product(kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(weight))
        return original(kernel, x, weight, bias)

    monkeypatch.setattr(joint, "product", product)
    return seen


@pytest.fixture
def stage(gpt2: splitbundle.Bundle) -> Stage:
    """The first shard after the bottom one, with one layer."""
    return gpt2.stage(gpt2.shards[1].name)


def hidden(stage: Stage, length: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, stage.architecture.hidden_size, generator=generator).to(stage.dtype)


@torch.no_grad()
def test_the_numbers_are_those_of_separate_layers(golden: splitbundle.Bundle, products: list[int]) -> None:
    own, usual = golden.pipeline(), golden.pipeline(kernels="torch")
    ids = own.token_ids([[5, 3, 9, 1]])
    whole = usual(ids)
    near: dict[str, float] = {
        "rtol": 0,
        "atol": (1e-5 if whole.dtype == torch.float32 else 2**-6) * float(whole.abs().max()),
    }
    assert torch.allclose(own(ids), whole, **near)
    assert products
    session, before = own.session(capacity=4), len(products)
    steps = torch.cat([own(ids[:, i : i + 2], session=session) for i in (0, 2)], dim=1)
    assert torch.allclose(steps, whole, **near)
    assert len(products) > before


@torch.no_grad()
def test_memory_is_not_copied(stage: Stage, products: list[int]) -> None:
    attention = stage.layers["1"].attention
    assert attention.joint.weight.data_ptr() == attention.query.weight.data_ptr()
    before = stage(hidden(stage))
    attention.value.weight.mul_(2.0)
    attention.key.bias.add_(1.0)
    after = stage(hidden(stage))
    fresh = [layer(hidden(stage)) for layer in (attention.key, attention.value)]
    assert torch.equal(
        attention.joint.product(hidden(stage), attention).split(stage.architecture.hidden_size, -1)[2], fresh[1]
    )
    assert not torch.equal(before, after)


def _replace_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


def _replace_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def _transpose(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.t()


def _replace_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(layer.bias.detach() * 2 + 1, requires_grad=False)


def _hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)


def _hook_before(layer: nn.Linear) -> None:
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def _replace_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: functional.linear(x, layer.weight) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "change", [_replace_weight, _replace_data, _transpose, _replace_bias, _hook, _hook_before, _replace_forward]
)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@torch.no_grad()
def test_a_changed_layer_computes_for_itself(
    change: Callable[[nn.Linear], None], name: str, stage: Stage, gpt2: splitbundle.Bundle, products: list[int]
) -> None:
    usual = gpt2.stage(gpt2.shards[1].name, kernels="torch")
    x = hidden(stage)
    before = stage(x)
    assert products
    products.clear()
    for changed in (stage, usual):
        change(getattr(changed.layers["1"].attention, name))
    assert torch.allclose(stage(x), usual(x), rtol=1e-5, atol=1e-5)
    assert not products
    # A constant shift of all keys changes no weight of the softmax, and a factor of one token's keys none either.
    assert name != "value" or not torch.allclose(stage(x), before, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_replaced_layer_computes_for_itself(stage: Stage, products: list[int]) -> None:
    attention = stage.layers["1"].attention

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    own = Doubled(attention.value.in_features, attention.value.out_features)
    own.load_state_dict(attention.value.state_dict())
    before = stage(hidden(stage))
    products.clear()
    attention.value = own
    assert not torch.allclose(stage(hidden(stage)), before, atol=1e-3)
    assert not products


@torch.no_grad()
def test_neurons_that_are_taken_away_count(golden: splitbundle.Bundle) -> None:
    results = []
    for kernels in ("torch", "steps=few"):
        stage = golden.stage(layers=(1, 2), kernels=kernels)
        mlp = stage.layers["1"].mlp
        if not isinstance(mlp, Mlp) or isinstance(mlp.down, Codes):
            pytest.skip("experts and codes have no rows to take away")
        kept = mlp.down.in_features // 2
        for layer in (mlp.up, mlp.gate):
            for part in [] if layer is None else layer.parameters():
                part.data = part.data[:kept]
        mlp.down.weight.data = mlp.down.weight.data[:, :kept].clone()
        results.append(stage(hidden(stage), cache=stage.cache(2, 1)))
        results.append(stage(hidden(stage)[:1], cache=stage.cache(1, 1)))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert torch.allclose(
            one, other, rtol=0, atol=(1e-5 if one.dtype == torch.float32 else 2**-5) * one.abs().max()
        )


@torch.no_grad()
def test_a_hook_of_every_module_sees_every_layer(stage: Stage, products: list[int]) -> None:
    seen: list[nn.Module] = []
    handle = hooks.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        stage(hidden(stage))
    finally:
        handle.remove()
    assert not products
    assert stage.layers["1"].attention.query in seen


def test_gradients_reach_each_weight(stage: Stage, products: list[int]) -> None:
    weight = stage.layers["1"].attention.key.weight.requires_grad_()
    stage(hidden(stage, 3)).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.any()
    assert not products
    x = hidden(stage, 3).requires_grad_()
    stage.requires_grad_(False)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert not products


@torch.no_grad()
def test_trainable_stages_and_torchs_kernels_have_none(gpt2: splitbundle.Bundle, products: list[int]) -> None:
    for options in ({"trainable": True}, {"kernels": "torch"}, {"dtype": "bfloat16"}):
        stage = gpt2.stage(gpt2.shards[1].name, **options)  # type: ignore[call-overload]
        stage(hidden(stage))
        assert not products, options


@torch.no_grad()
def test_copies_and_conversions(stage: Stage, products: list[int]) -> None:
    x = hidden(stage)
    before = stage(x)
    products.clear()
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert other.layers["1"].attention.joint.weight is None
        assert torch.allclose(other(x), before, rtol=1e-5, atol=1e-5)
        other.layers["1"].attention.value.weight.zero_()
        assert not torch.allclose(other(x), before, atol=1e-3)
    assert torch.allclose(stage.double()(x.double()), before.double(), rtol=1e-5, atol=1e-5)
    assert not products
    assert not any("joint" in name for name in stage.state_dict())


@torch.no_grad()
def test_a_short_norm_equals_torchs(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    original = rms_norms.rms_norm_of_one_row

    def short(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        taken.append(x)
        return original(x, weight, eps)

    monkeypatch.setattr(rms_norms, "rms_norm_of_one_row", short)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, generator=generator)
    for scale in (1e-12, 1e-3, 1.0, 1e6, 1e25):
        x = torch.randn(1, 1, 64, generator=generator) * scale
        got, expected = rms_norms.rms_norm(x, (64,), weight, 1e-6), functional.rms_norm(x, (64,), weight, 1e-6)
        assert torch.allclose(got, expected, rtol=2e-6, atol=0), scale
        half, own = x.bfloat16(), weight.bfloat16()
        got, expected = rms_norms.rms_norm(half, (64,), own, 1e-6), functional.rms_norm(half, (64,), own, 1e-6)
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=0), scale
    assert len(taken) == 10
    zero, bad = torch.zeros(1, 1, 64), torch.full((1, 1, 64), float("nan"))
    assert torch.equal(
        rms_norms.rms_norm(zero, (64,), weight, 0.0).isnan(), functional.rms_norm(zero, (64,), weight, 0.0).isnan()
    )
    assert rms_norms.rms_norm(bad, (64,), weight, 1e-6).isnan().all()
    taken.clear()
    rms_norms.rms_norm(torch.zeros(1, 2, 64), (64,), weight, 1e-6)
    rms_norms.rms_norm(zero.half(), (64,), weight.half(), 1e-6)
    with torch.enable_grad():
        slope = rms_norms.rms_norm(zero + 1, (64,), nn.Parameter(weight), 1e-6)
        assert slope.requires_grad
    assert not taken
