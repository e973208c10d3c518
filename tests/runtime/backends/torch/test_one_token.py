"""One token of one row is computed from the tensors of the layers, with the results of the modules."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as global_hooks

import splitbundle
from splitbundle.backends.torch import kernels, one_token
from splitbundle.backends.torch import stage as stages
from splitbundle.backends.torch.kernel_choice import COLUMN, GEMV, ONEDNN, TORCH
from splitbundle.backends.torch.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = Path(__file__).parents[3] / "conformance/numbers"
NUMBERS = sorted(path.parent.name for path in MODELS.glob("*/model.splitbundle"))
UNUSUAL = {
    *("alibi", "alibi-clipped", "alibi-one-head", "capped", "gates-of-channels", "gates-of-heads", "learned-narrow"),
    *("multiplied", "parallel-two", "query-key-norm-full", "rotary-interleaved", "scaled", "scaled-sums", "sinks"),
    "temperature-yarn",
}
"""The models of the kit whose layers are computed by their modules."""


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every layer that is computed from its tensors."""
    seen: list[int] = []
    original = one_token.OneToken.apply

    def apply(self: one_token.OneToken, x: Tensor, token: one_token.Token) -> Tensor:
        seen.append(self.attention.layer)
        return original(self, x, token)

    monkeypatch.setattr(one_token.OneToken, "apply", apply)
    return seen


@pytest.fixture
def every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the chosen kernel compute the small products of these models, too."""
    monkeypatch.setattr(kernels, "SMALL", 0)


def by_modules(compute: Callable[[], Tensor]) -> Tensor:
    """Return what the modules compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "through_layers", lambda *_: None)
        return compute()


def tokens(pipeline: splitbundle.Pipeline, number: int = 5) -> Tensor:
    """Return the logits of some tokens, each in a call of its own after two that come together."""
    session = pipeline.session(capacity=number + 2)
    ids = [[(7 * i + 3) % pipeline.first.architecture.vocab_size] for i in range(number + 2)]
    pipeline(pipeline.token_ids([[ids[0][0], ids[1][0]]]), session=session)
    return torch.cat([pipeline(pipeline.token_ids([one]), session=session) for one in ids[2:]])


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(dtype, kernel) for dtype, own in (("float32", ONEDNN), ("bfloat16", GEMV)) for kernel in (COLUMN, own, TORCH)],
)
@pytest.mark.parametrize("name", NUMBERS)
@torch.no_grad()
def test_results_are_those_of_the_modules_to_the_bit(
    name: str, dtype: str, kernel: str, applied: list[int], every_product: None
) -> None:
    pipeline = splitbundle.open(MODELS / name / "model.splitbundle").pipeline(
        dtype=dtype, kernels=f"steps=few,{dtype}/1={kernel}"
    )
    got = tokens(pipeline)
    assert bool(applied) == (name not in UNUSUAL)
    assert torch.equal(got, by_modules(lambda: tokens(pipeline)))


@torch.no_grad()
def test_each_row_of_a_session_has_its_own_cache(gpt2: splitbundle.Bundle, applied: list[int]) -> None:
    pipeline = gpt2.pipeline()
    ids = pipeline.token_ids([[5, 9, 2], [7, 1, 8], [3, 3, 6]])

    def last(row: int) -> Tensor:
        session = pipeline.session(3, 8)
        pipeline(ids, session=session)
        session.reorder([2, 0, 1])
        session.rollback([1, 2, 0])
        pipeline(ids[:1, :1], session=session, rows=[row])
        return pipeline(ids[:1, 1:2], session=session, rows=[row])

    for row in range(3):
        got = last(row)
        assert len(applied) == 2 * 3
        assert torch.equal(got, by_modules(lambda: last(row)))  # noqa: B023
        applied.clear()


@torch.no_grad()
def test_nothing_of_inference_mode_is_left(gpt2: splitbundle.Bundle, applied: list[int]) -> None:
    """Such a tensor could be neither changed in place nor saved for a backward pass."""
    stage = gpt2.stage(gpt2.shards[1].name)
    cache = stage.cache(1, 4)
    x = hidden(stage)
    got = stage(x, cache=cache)
    assert applied == [1]
    for tensor in (got, x, *cache.keys.values(), *cache.values.values(), *stage.state_dict().values()):
        assert not tensor.is_inference()
    got.add_(1)
    weight = torch.ones(1, requires_grad=True)
    with torch.enable_grad():
        (got * weight).sum().backward()
    assert torch.allclose(weight.grad, got.sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scaling-llama3", "query-key-norm"])
@torch.no_grad()
def test_a_later_stage_may_compute_with_gradients(name: str, applied: list[int]) -> None:
    """The stages of a pipeline share the positions of a call, and with them the rotations."""
    bundle = splitbundle.open(MODELS / name / "model.splitbundle")
    stage = bundle.stage(layers=(1, 2), embeds=False, head=False, kernels="steps=few")
    cache, x = stage.cache(1, 4), hidden(stage)
    positions = stage.check(x, cache=cache)
    stage(x, cache=cache, positions=positions)
    assert applied == [1]
    with torch.enable_grad():
        tracked = x.clone().requires_grad_()
        stage(tracked, positions=positions).sum().backward()
    assert tracked.grad is not None


@torch.no_grad()
def test_an_interrupt_leaves_no_inference_mode(stage: Stage, applied: list[int]) -> None:
    """An error holds the frames that it went through: in a notebook, until the next error."""
    x, cache = hidden(stage), stage.cache(1, 4)
    places: set[tuple[str, int]] = set()
    inside = False

    def interrupt(frame: FrameType, event: str, argument: object) -> object:
        nonlocal inside
        inside = inside or frame.f_code is one_token._through_all.__code__
        place = frame.f_code.co_name, frame.f_lineno
        if inside and event in ("line", "return") and place not in places:
            places.add(place)
            raise KeyboardInterrupt
        return interrupt

    interrupted = True
    while interrupted:
        inside, before = False, sys.gettrace()
        try:
            sys.settrace(interrupt)
            stage(x, cache=cache, past=[0])
            interrupted = False
        except KeyboardInterrupt:
            assert not torch.is_inference_mode_enabled()
        finally:
            sys.settrace(before)
    assert len(places) > 10
    assert applied


@torch.no_grad()
def test_a_layer_that_is_called_changes_the_layers_after_it(gpt2: splitbundle.Bundle, applied: list[int]) -> None:
    """All layers are looked at at once only if nothing else runs between them."""
    stage = gpt2.stage(layers=(1, 3))
    before = computed(stage)

    def change(module: nn.Module, *_: object) -> None:
        stage.layers["2"].mlp.activation = functional.relu

    stage.layers["1"].mlp.register_forward_hook(change)
    assert not torch.equal(computed(stage), before)
    assert applied == [1, 2]


@pytest.fixture
def stage(gpt2: splitbundle.Bundle) -> Stage:
    """The first shard after the bottom one, with one layer."""
    return gpt2.stage(gpt2.shards[1].name)


def hidden(stage: Stage) -> Tensor:
    """Return the hidden states of one token. *Shape:* (1, 1, hidden)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 1, stage.architecture.hidden_size, generator=generator).to(stage.dtype)


def computed(stage: Stage) -> Tensor:
    """Return what a stage computes for one token. *Shape:* (1, 1, hidden)."""
    return stage(hidden(stage), cache=stage.cache(1, 4))  # type: ignore[no-any-return]


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def _hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(), *inputs[1:]))


def _replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2


def _replace_weights(module: nn.Module) -> None:
    for part in list(module.modules()):
        for name, weight in part._parameters.items():
            part._parameters[name] = None if weight is None else nn.Parameter(weight * 2, requires_grad=False)


def _replace_class(module: nn.Module) -> None:
    forward = type(module).forward
    own = {"forward": lambda self, *args: forward(self, *args) * 2}
    module.__class__ = type("Doubled", (type(module),), own)  # type: ignore[assignment]


def _compile(module: nn.Module) -> None:
    """Do what ``Module.compile`` does, with a compiler that shows itself."""
    compiled = module._call_impl
    module._compiled_call_impl = lambda *args: compiled(*args) * 2


CHANGED = ("", "attention_norm", "attention", "attention.value", "attention.output", "mlp_norm", "mlp", "mlp.up")


@pytest.mark.parametrize("change", [_hook, _hook_before, _replace_forward, _replace_class, _compile, _replace_weights])
@pytest.mark.parametrize("name", [*CHANGED, "mlp.down"])
@torch.no_grad()
def test_a_changed_layer_is_computed_by_its_modules(
    change: Callable[[nn.Module], None], name: str, stage: Stage, applied: list[int]
) -> None:
    before = computed(stage)
    assert applied == [1]
    change(stage.layers["1"].get_submodule(name))
    got = computed(stage)
    assert applied == [1]
    assert not torch.allclose(got, before, atol=1e-3)


@torch.no_grad()
def test_weights_that_change_in_place_count(stage: Stage, applied: list[int]) -> None:
    before = computed(stage)
    for name, weight in stage.layers["1"].named_parameters():
        kept = weight.clone()
        weight.add_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        got = computed(stage)
        # A constant shift of all keys changes nothing, and a token that is alone gives no choice.
        assert name.startswith(("attention.query", "attention.key")) or not torch.allclose(got, before, atol=1e-3), name
        assert torch.equal(got, by_modules(lambda: computed(stage))), name
        weight.copy_(kept)
    assert torch.equal(computed(stage), before)
    weight = stage.layers["1"].mlp.down.weight
    weight.data = weight.data * 2
    assert torch.equal(computed(stage), by_modules(lambda: computed(stage)))
    assert set(applied) == {1}


@torch.no_grad()
def test_a_replaced_part_is_called(stage: Stage, applied: list[int]) -> None:
    layer = stage.layers["1"]
    before = computed(stage)
    layer.mlp.activation = functional.relu
    assert not torch.equal(computed(stage), before)
    layer.mlp = nn.Identity()
    replaced = computed(stage)
    assert not torch.equal(replaced, before)
    assert applied == [1]


def _with_sinks(layer: nn.Module) -> None:
    layer.attention.sinks = nn.Parameter(torch.ones(layer.attention.facts.heads), requires_grad=False)


def _with_another_norm(layer: nn.Module) -> None:
    layer.mlp_output_norm = copy.deepcopy(layer.mlp_norm)


def _with_half_the_sums(layer: nn.Module) -> None:
    layer.multiplier = 0.5


def _with_another_eps(layer: nn.Module) -> None:
    layer.mlp_norm.facts = dataclasses.replace(layer.mlp_norm.facts, eps=10.0)


@pytest.mark.parametrize("change", [_with_sinks, _with_another_norm, _with_half_the_sums, _with_another_eps])
@torch.no_grad()
def test_a_part_that_is_added_and_a_fact_that_changes_count(
    change: Callable[[nn.Module], None], stage: Stage, applied: list[int]
) -> None:
    before = computed(stage)
    change(stage.layers["1"])
    assert not torch.allclose(computed(stage), before, atol=1e-3)
    assert applied == [1]


@torch.no_grad()
def test_attention_that_is_replaced_in_torch_is_called(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fused = computed(stage), functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *args, **kwargs: fused(*args, **kwargs) * 2)
    assert not torch.allclose(computed(stage), before, atol=1e-3)


@torch.no_grad()
def test_a_bias_with_gaps_in_memory_is_read_as_it_is(
    gpt2: splitbundle.Bundle, applied: list[int], every_product: None
) -> None:
    stage = gpt2.stage(gpt2.shards[1].name, kernels=f"steps=few,float32/1={ONEDNN}")
    before = computed(stage)
    for name, bias in stage.named_parameters():
        if name.endswith("output.bias"):
            bias.data = torch.stack((bias, torch.full_like(bias, 9)), dim=1)[:, 0]
    assert torch.allclose(computed(stage), before, rtol=1e-5, atol=1e-5)
    assert applied == [1, 1]


@torch.no_grad()
def test_weights_that_are_swapped_count(stage: Stage, applied: list[int]) -> None:
    before = computed(stage)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        stage.load_state_dict({name: weight * 2 for name, weight in stage.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    got = computed(stage)
    assert not torch.allclose(got, before, atol=1e-3)
    assert torch.equal(got, by_modules(lambda: computed(stage)))


class _Own(Tensor):
    """A tensor of another class."""


@torch.no_grad()
def test_layers_after_a_hook_see_the_class_of_its_tensor(gpt2: splitbundle.Bundle, applied: list[int]) -> None:
    stage = gpt2.stage(layers=(1, 3))
    stage.layers["1"].register_forward_hook(lambda module, inputs, output: output.as_subclass(_Own))
    assert type(computed(stage)) is _Own
    assert not applied


@torch.no_grad()
def test_other_calls_are_computed_by_the_modules(stage: Stage, gpt2: splitbundle.Bundle, applied: list[int]) -> None:
    x = hidden(stage)
    stage(x)  # without a cache
    stage(x.expand(2, 1, -1), cache=stage.cache(2, 4))
    stage(x.expand(1, 2, -1), cache=stage.cache(1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        computed(stage)
    with torch.enable_grad():
        computed(stage)
    handle = global_hooks.register_module_forward_hook(lambda *_: None)
    try:
        computed(stage)
    finally:
        handle.remove()
    for options in ({"trainable": True}, {"kernels": "torch"}, {"kernels": "float32/1=column"}):
        computed(gpt2.stage(gpt2.shards[1].name, **options))  # type: ignore[call-overload]
    other = gpt2.stage(gpt2.shards[1].name)
    other.add_lora(2, 4.0)
    computed(other)
    assert not applied
    with torch.inference_mode():
        assert torch.equal(computed(stage), by_modules(lambda: computed(stage)))
    assert applied == [1]


@torch.no_grad()
def test_copies_and_conversions_compute_with_their_own_weights(stage: Stage, applied: list[int]) -> None:
    before = computed(stage)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert torch.allclose(computed(other), before, rtol=1e-5, atol=1e-5)
        other.layers["1"].mlp.down.weight.zero_()
        assert not torch.allclose(computed(other), before, atol=1e-3)
    assert torch.equal(computed(stage), before)
    wide = computed(stage.double())
    assert wide.dtype == torch.float64
    assert torch.allclose(wide.float(), before, rtol=1e-5, atol=1e-5)
    assert applied == [1, 1]
