"""Products by the kernel that reads weights fastest equal those of ``functional.linear``, and use it where they
must."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import splitbundle
from splitbundle.backends.torch import kernels
from splitbundle.backends.torch.feedforward import ACTIVATIONS, Mlp
from splitbundle.backends.torch.kernel_choice import KERNELS, STEPS
from splitbundle.backends.torch.kernels import linear, with_kernels_for
from splitbundle.backends.torch.modules import Linear
from splitbundle.format.architecture import feedforward

pytestmark = pytest.mark.usefixtures("one_thread")
x86 = pytest.mark.skipif(kernels._ONEDNN is None, reason="torch has no oneDNN of this kind here")


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small weights take the same path as large ones."""
    monkeypatch.setattr(kernels, "SMALL", 0)


@pytest.fixture(autouse=True)
def fastest(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Say which kernels are the fastest here, in place of a measurement."""
    found = {key: "onednn" for key in KERNELS if key.startswith("float32/")}
    found |= {"bfloat16/1": "gemv", "bfloat16/2-16": "torch", STEPS: "torch"}
    monkeypatch.setattr(kernels.measured, "kernel", found.__getitem__)
    return found


@pytest.fixture
def by_product(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compute with oneDNN's product, or only with torch's own kernels."""
    seen: list[str] = []

    def counted(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def count(*args: object) -> Tensor:
            seen.append(" ".join(["onednn", *(arg for arg in args if isinstance(arg, str) and arg)]))
            return kernel(*args)

        return count

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append("torch" if torch.backends.mkldnn.enabled else "own kernels")
        return original(x, weight, bias)

    original, onednn = functional.linear, kernels._ONEDNN
    if onednn is not None:
        monkeypatch.setattr(onednn, "product", counted(onednn.product))
        monkeypatch.setattr(onednn, "times", counted(onednn.times))
    monkeypatch.setattr(functional, "linear", plain)
    return seen


def case(*shape: int, rows: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight in the middle of a larger storage, a bias."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(*size, generator=generator) for size in (shape, (rows + 2, shape[-1]), (rows,)))
    x, weight, bias = (part.to(dtype) for part in made)
    return x, weight[1:-1], bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 5, 48), (3, 1, 48), (2, 7, 48), (1, 1, 33)])
def test_it_is_a_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = case(*shape, dtype=dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for b in (bias, None):
        exact = functional.linear(x.double(), weight.double(), None if b is None else b.double())
        got = linear(x, weight, b)
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert (got - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("shape", [(1, 5, 48), (3, 1, 48), (2, 8, 33)])
def test_the_weight_times_columns_is_the_same_product(shape: tuple[int, ...]) -> None:
    x, weight, bias = case(*shape, dtype=torch.bfloat16)
    for b in (bias, None):
        exact = functional.linear(x.double(), weight.double(), None if b is None else b.double())
        got = kernels.product("turned", x, weight, b)
        assert got.is_contiguous()
        assert (got.shape, got.dtype) == (exact.shape, torch.bfloat16)
        assert (got - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_a_view_is_as_good() -> None:
    x, weight, bias = case(2, 6, 96)
    part = x[:, 1::2, 32:80]
    assert torch.allclose(linear(part, weight[:, 32:80], bias), part @ weight[:, 32:80].T + bias, atol=1e-4)


@x86
def test_which_kernel_computes(by_product: list[str]) -> None:
    x, weight, bias = case(1, 1, 48)
    linear(x, weight, bias)
    linear(x.expand(2, 3, 48), weight, None)
    linear(x.bfloat16(), weight.bfloat16(), None)
    assert by_product == ["onednn", "onednn", "torch"]


@x86
def test_a_user_who_turned_onednn_off_gets_none(by_product: list[str]) -> None:
    x, weight, _ = case(1, 1, 48)
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight, None)
        linear(x.bfloat16(), weight.bfloat16(), None)
        assert not torch.backends.mkldnn.enabled
    assert not [each for each in by_product if "onednn" in each]


def test_small_weights_go_the_short_way(by_product: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 10**6)
    linear(*case(1, 1, 48))
    assert by_product == ["torch"]


def test_gradients_are_those_of_linear(by_product: list[str]) -> None:
    x, weight, bias = case(2, 3, 48)
    for wanted in ((x,), (weight,), (bias,), (x, weight, bias)):
        for tensor in (x, weight, bias):
            tensor.grad = None
            tensor.requires_grad_(any(tensor is one for one in wanted))
        got = torch.autograd.grad(linear(x, weight, bias).square().sum(), wanted)
        for one, other in zip(got, torch.autograd.grad((x @ weight.T + bias).square().sum(), wanted), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)
    assert not [each for each in by_product if "onednn" in each]


def test_forward_gradients_and_transforms_are_seen(by_product: list[str]) -> None:
    x, weight, _ = case(3, 48)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(linear(dual, weight, None)).tangent
    assert torch.allclose(tangent, torch.ones_like(x) @ weight.T, atol=1e-4)
    with torch.no_grad():
        mapped = torch.vmap(lambda row: linear(row[None], weight, None)[0])(x)
    assert torch.allclose(mapped, x @ weight.T, atol=1e-4)
    assert not [each for each in by_product if "onednn" in each]


def test_a_bias_that_is_not_side_by_side() -> None:
    x, weight, bias = case(1, 1, 48)
    for odd in (torch.stack((bias, bias + 1), dim=1).flatten()[::2], bias[:1].expand(24)):
        assert not odd.is_contiguous()
        assert torch.allclose(linear(x, weight, odd), functional.linear(x, weight, odd), atol=1e-4)


class Doubled(TorchFunctionMode):
    """A mode that changes one function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        return 2 * result if function.__name__ == "linear" else result


def test_modes_and_tracers_see_an_operator_that_they_know(by_product: list[str]) -> None:
    x, weight, bias = case(2, 3, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 6 * 48 * 24
    with Doubled():
        assert torch.allclose(linear(x, weight, None), 2 * (x @ weight.T), atol=1e-4)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: linear(x, weight, bias))(x)
    assert "addmm" in graph.code
    assert not [each for each in by_product if "onednn" in each]


def test_sparse_weights_answer_for_themselves() -> None:
    x, weight, _ = case(2, 48)
    assert torch.allclose(linear(x, weight.to_sparse(), None), x @ weight.T, atol=1e-4)


class Scaled(Tensor):
    """A weight of another kind, such as a quantized one, which computes its own product."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is functional.linear:
            x, weight, _ = args
            return 2 * (x @ weight.as_subclass(Tensor).T)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_another_kind_answers_for_itself() -> None:
    x, weight, _ = case(1, 1, 48)
    got = linear(x, weight.as_subclass(Scaled), None)  # type: ignore[arg-type]
    assert torch.allclose(got, 2 * x @ weight.T, atol=1e-4)


def computing(
    rows: int, compute: Callable[[], object], dtype: torch.dtype = torch.bfloat16, place: str = "cpu"
) -> None:
    """Do something in the same way as a call of a stage with some rows."""
    x = torch.zeros(1, rows, 4, device=place)

    def computed(x: Tensor) -> Tensor:
        compute()
        return x

    assert with_kernels_for(x, dtype, None, computed) is x


def is_on() -> None:
    assert torch.backends.mkldnn.enabled


def is_off() -> None:
    assert not torch.backends.mkldnn.enabled


class Caller:
    """A thread that computes some rows in bfloat16 until it is told to stop."""

    def __init__(self, rows: int) -> None:
        self.rows, self.enabled = rows, list[bool]()
        self.entered, self.leave = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._compute, daemon=True)
        self.thread.start()

    def _compute(self) -> None:
        computing(self.rows, self._wait)

    def _wait(self) -> None:
        self.enabled.append(torch.backends.mkldnn.enabled)
        self.entered.set()
        self.leave.wait(60)

    def inside(self, seconds: float = 60.0) -> bool:
        return self.entered.wait(seconds)

    def end(self) -> None:
        self.leave.set()
        self.thread.join(60)


@pytest.fixture
def switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is as before once all calls have ended."""
    monkeypatch.setattr(kernels, "_SWITCHES", True)
    yield
    assert torch.backends.mkldnn.enabled
    assert (kernels._switch.single, kernels._switch.several) == (set(), set())


@x86
@pytest.mark.usefixtures("switches")
def test_the_switch_goes_back_once_the_last_thread_has_left() -> None:
    callers = [Caller(rows=1), Caller(rows=1)]
    assert all(caller.inside() for caller in callers)
    callers[0].end()
    assert not torch.backends.mkldnn.enabled
    callers[1].end()
    assert torch.backends.mkldnn.enabled


@x86
@pytest.mark.usefixtures("switches")
def test_many_rows_wait_until_onednn_is_back() -> None:
    one = Caller(rows=1)
    assert one.inside()
    many = Caller(rows=5)
    assert not many.inside(0.2)
    one.end()
    assert many.inside()
    many.end()
    assert (one.enabled, many.enabled) == ([False], [True])


@x86
@pytest.mark.usefixtures("switches")
def test_one_row_beside_many_leaves_the_switch_alone() -> None:
    callers = []
    for rows in (5, 1, 5):
        callers.append(Caller(rows))
        assert callers[-1].inside()
    for caller in callers:
        caller.end()
        assert caller.enabled == [True]


@x86
@pytest.mark.usefixtures("switches")
def test_nobody_waits_for_ever() -> None:
    computing(1, lambda: computing(5, is_off))


@x86
@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("rows", [1, 5])
def test_an_interrupt_at_any_moment_leaves_the_switch_as_it_was(rows: int) -> None:
    def interrupted_at(moment: int) -> bool:
        """Python handles signals where a function begins and where a call of one ends."""
        left = moment

        def trace(frame: FrameType, event: str, _: object) -> None:
            nonlocal left
            if event in ("call", "c_return") and frame.f_code.co_filename == kernels.__file__:
                left -= 1
                if left == 0:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        try:
            sys.setprofile(trace)
            computing(rows, lambda: None)
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False

    moments = 0
    while interrupted_at(moments + 1):
        moments += 1
        is_on()
        assert not kernels._switch.lock.locked()
        assert (kernels._switch.single, kernels._switch.several) == (set(), set())
    assert moments > 10


@x86
@pytest.mark.usefixtures("switches")
def test_an_interrupt_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    one = Caller(rows=1)
    assert one.inside()
    monkeypatch.setattr(kernels, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        computing(5, is_on)
    one.end()


@x86
@pytest.mark.usefixtures("switches")
def test_a_failure_turns_the_switch_back() -> None:
    with pytest.raises(ZeroDivisionError):
        computing(1, lambda: 1 / 0)


@x86
@pytest.mark.usefixtures("switches")
def test_float32_beside_it_keeps_onednn(by_product: list[str]) -> None:
    computing(1, lambda: linear(*case(1, 1, 48)))
    assert by_product == ["onednn"]


@x86
@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize("place", [(torch.float32, "cpu"), (torch.bfloat16, "meta")])
def test_only_bfloat16_on_the_processor_turns_it(place: tuple[torch.dtype, str]) -> None:
    computing(1, is_on, *place)


@x86
@pytest.mark.usefixtures("switches")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_while_the_switch_is_turned_turns_it_back() -> None:
    def fork() -> None:
        child = os.fork()
        if not child:
            # Only the answer: in a test's process, nothing cleans up after a fork.
            os._exit(0 if torch.backends.mkldnn.enabled and not kernels._switch.single else 1)
        assert os.waitpid(child, 0)[1] == 0

    computing(1, fork)


@x86
@pytest.mark.usefixtures("switches")
def test_a_stage_turns_it_for_one_row_alone(gpt2: splitbundle.Bundle, by_product: list[str]) -> None:
    pipeline = gpt2.pipeline(dtype="bfloat16")
    session = pipeline.session(1, 8)
    with torch.no_grad():
        pipeline(torch.tensor([[1, 2, 3]]), session=session)
    assert set(by_product) == {"torch"}
    by_product.clear()
    with torch.no_grad():
        pipeline(torch.tensor([[1, 2]]), session=session, logits="last")
    assert by_product[-1] == "own kernels"  # the head's only row
    assert set(by_product[:-1]) == {"torch"}
    by_product.clear()
    with torch.no_grad():
        pipeline(torch.tensor([[1]]), session=session)
    assert set(by_product) == {"own kernels"}


def test_a_stage_can_be_traced(gpt2: splitbundle.Bundle) -> None:
    pipeline, ids = gpt2.pipeline(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        traced = torch.jit.trace(lambda ids: pipeline(ids), (ids,))
        assert torch.allclose(traced(ids + 1), pipeline(ids + 1), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_compiles_to_one_graph(gpt2: splitbundle.Bundle, dtype: str) -> None:
    stage = gpt2.stage(gpt2.shards[1].name, dtype=dtype)
    x = torch.randn(1, 3, gpt2.architecture.hidden_size, generator=torch.Generator().manual_seed(0)).to(stage.dtype)
    with torch.no_grad():
        compiled = torch.compile(stage, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), stage(x), rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5)


def test_a_layer_uses_it(by_product: list[str]) -> None:
    layer = Linear(48, 24, bias=True)
    _, weight, bias = case(1, 1, 48)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    layer(case(1, 1, 48)[0])
    assert by_product == ["onednn" if kernels._ONEDNN is not None else "torch"]


# Activations and factors.


def mlp(activation: str, *, gated: bool, dtype: torch.dtype = torch.float32) -> Mlp:
    block = Mlp(feedforward.Mlp(intermediate_size=40, activation=activation, gated=gated, bias=True), 48)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in list(block.named_parameters()):
        layer, kind = name.split(".")
        made = torch.randn(parameter.shape, generator=generator).to(dtype)
        setattr(block.get_submodule(layer), kind, nn.Parameter(made, requires_grad=False))
    return block


def plainly(block: Mlp, x: Tensor) -> Tensor:
    """Compute as the equation says, in double precision."""

    def through(layer: nn.Module, x: Tensor) -> Tensor:
        return x @ layer.weight.double().T + layer.bias.double()  # type: ignore[operator, union-attr]

    up = through(block.up, x.double())
    hidden = block.activation(up) if block.gate is None else block.activation(through(block.gate, x.double())) * up
    return through(block.down, hidden)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 5, 48)])
def test_a_block_is_its_equation(activation: str, gated: bool, shape: tuple[int, ...], by_product: list[str]) -> None:
    block, x = mlp(activation, gated=gated), case(*shape)[0]
    expected = plainly(block, x)
    assert (block(x) - expected).abs().max() <= 2e-6 * expected.abs().max()
    fused = kernels._ONEDNN is not None and activation in kernels._FUSED
    assert any(each.startswith("onednn ") for each in by_product) == fused


def double(layer: nn.Module, args: object, output: Tensor) -> Tensor:
    """A hook."""
    return 2 * output


def test_a_changed_layer_of_a_block_has_its_own_say() -> None:
    block, x = mlp("silu", gated=True), case(2, 5, 48)[0]
    block.up.register_forward_hook(double)
    once = mlp("silu", gated=True)
    assert torch.allclose(block(x) - block.down.bias, 2 * (once(x) - once.down.bias), rtol=1e-4, atol=1e-3)
    assert block.gate is not None
    block.gate.register_forward_hook(lambda layer, args, output: 0 * output)
    assert torch.equal(block(x), block.down.bias.expand_as(x))


def test_another_activation_is_used() -> None:
    block, x = mlp("silu", gated=False), case(2, 5, 48)[0]
    block.activation = torch.zeros_like
    assert torch.equal(block(x), block.down.bias.expand_as(x))


@pytest.mark.parametrize("trained", ["", "bias", "gate.bias", "up.weight"])
def test_what_is_trained_of_a_block_has_gradients(trained: str) -> None:
    block, x = mlp("gelu_tanh", gated=True), case(2, 5, 48)[0]
    wanted = [own.requires_grad_(True) for name, own in block.named_parameters() if name.endswith(trained)]
    block(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in wanted)
