"""The choice of kernels: measured, named, exported, and pinned for what is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch import kernel_choice, kernels
from splitbundle.backends.torch.kernel_choice import KERNELS, PINNED, Measured

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """A clock that only products move, so that a busy machine changes no result."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def product(self, seconds: float) -> Callable[..., None]:
        """Return a product that takes some seconds."""

        def take(x: Tensor, weight: Tensor) -> None:
            self.now += seconds

        return take


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(kernel_choice, "time", made)
    return made


@pytest.mark.parametrize("key", kernel_choice.MEASURED)
@pytest.mark.parametrize("fastest", ["column", "onednn", "torch", "gemv", "turned"])
def test_the_fastest_kernel_is_found(key: str, fastest: str, clock: Clock) -> None:
    if fastest not in KERNELS[key]:
        pytest.skip("this kernel doesn't compute such products")
    measured = Measured(lambda name: clock.product(0.001 if name == fastest else 0.002))
    assert measured.kernel(key) == fastest
    assert set(measured.rates[key, 1]) == set(KERNELS[key])
    assert max(measured.rates[key, 1], key=measured.rates[key, 1].__getitem__) == fastest


@pytest.mark.parametrize(("others", "stays"), [(1.0, True), (0.95, True), (0.85, False)])
def test_a_little_faster_is_not_enough(others: float, stays: bool, clock: Clock) -> None:
    for key in kernel_choice.MEASURED:
        first = KERNELS[key][0]
        measured = Measured(lambda name, first=first: clock.product(0.001 * (1.0 if name == first else others)))
        assert (measured.kernel(key) == first) == stays


def test_a_disturbed_round_does_not_count(clock: Clock) -> None:
    """Another program stops the first timed round of the fastest kernel for a while."""
    calls = dict.fromkeys(KERNELS["float32/1"], 0)

    def product(name: str) -> Callable[..., None]:
        def take(x: Tensor, weight: Tensor) -> None:
            calls[name] += 1
            stopped = name == "onednn" and calls[name] == 3
            clock.now += 1e-5 * (1 if name == "onednn" else 2) + (0.01 if stopped else 0)

        return take

    assert Measured(product).kernel("float32/1") == "onednn"


def test_a_measurement_is_bounded(clock: Clock) -> None:
    for seconds in (1e-6, 1e-3, 10.0):
        before = clock.now
        Measured(lambda name, seconds=seconds: clock.product(seconds)).kernel("float32/1")
        rounds = (clock.now - before) / (seconds * 2 * len(KERNELS["float32/1"]))
        assert 1.9 < rounds < 5.1


def test_four_rows_and_more_are_not_measured(clock: Clock) -> None:
    measured = Measured(lambda name: clock.product(1.0))
    assert measured.kernel("float32/4-") == "onednn"
    assert clock.now == 0


def test_a_kernel_that_this_torch_lacks_is_not_measured() -> None:
    measured = Measured(lambda name: torch.nn.functional.linear if name == "torch" else None)
    assert {measured.kernel(key) for key in KERNELS} == {"torch"}
    assert not measured.rates


def test_each_number_of_threads_has_its_own(clock: Clock) -> None:
    measured = Measured(lambda name: clock.product(0.001))
    measured.kernel("float32/1")
    torch.set_num_threads(2)
    measured.kernel("float32/1")
    torch.set_num_threads(1)
    assert set(measured.rates) == {("float32/1", 1), ("float32/1", 2)}


def test_every_kernel_computes_the_same_product() -> None:
    """So a disturbed measurement costs speed, and never correctness."""
    generator = torch.Generator().manual_seed(0)
    for key, names in KERNELS.items():
        if key == kernel_choice.STEPS or key.startswith(("rows8", "blocks4")):
            continue  # the kernels of quantized weights have tests of their own
        dtype, rows = (
            getattr(torch, key.partition("/")[0]),
            {"1": 1, "2-3": 3, "4-": 5, "2-16": 9}[key.partition("/")[2]],
        )
        x, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, 768), (1024, 768)))
        exact = x.double() @ weight.double().T
        for name in names:
            product = kernels._products(name)
            if product is not None:
                got = product(x, weight)
                assert isinstance(got, Tensor)
                tolerance = 1e-6 if dtype == torch.float32 else 2**-7
                assert (got - exact).abs().max() <= tolerance * exact.abs().max(), (key, name)


def test_a_choice_as_text() -> None:
    choice = PINNED | {"float32/1": "onednn", "bfloat16/1": "gemv"}
    text = kernel_choice.as_text(choice)
    plain = "float32/1=onednn,float32/2-3=torch,float32/4-=torch,bfloat16/1=gemv,bfloat16/2-16=torch"
    quantized = "rows8-bfloat16/1-8=torch,rows8-bfloat16-amx/1-8=torch,rows8-float32/1-8=torch,blocks4/1-16=torch"
    assert text == f"{plain},{quantized},steps=torch"
    assert kernel_choice.parse(text) == choice
    assert kernel_choice.parse(" bfloat16/1=gemv, float32/1=onednn") == choice
    assert kernel_choice.parse("torch") == PINNED
    assert kernel_choice.parse("auto") is None


@pytest.mark.parametrize(
    "text", ["", "mkl", "float32/1", "float32/1=gemv", "float16/1=torch", "float32/1=onednn;", "=", 3]
)
def test_a_text_that_names_no_choice(text: str) -> None:
    with pytest.raises(
        BundleError, match=r"\[input.value\] kernels: expected auto, torch, or some of float32/1=column"
    ):
        kernel_choice.parse(text)


def test_the_variable_and_the_option(gpt2: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = gpt2.shards[1].name
    monkeypatch.delenv(kernel_choice.VARIABLE, raising=False)
    assert gpt2.stage(shard).kernels is None
    assert gpt2.stage(shard, kernels="torch").kernels == PINNED
    assert gpt2.stage(shard, trainable=True).kernels == PINNED
    assert gpt2.stage(shard, trainable=True, kernels="auto").kernels is None
    monkeypatch.setenv(kernel_choice.VARIABLE, "float32/1=onednn")
    named = PINNED | {"float32/1": "onednn"}
    assert gpt2.stage(shard).kernels == named
    assert gpt2.stage(shard, trainable=True).kernels == PINNED
    assert gpt2.pipeline(kernels="torch").first.kernels == PINNED
    monkeypatch.setenv(kernel_choice.VARIABLE, "fast")
    with pytest.raises(BundleError, match=r"SPLITBUNDLE_KERNELS: expected auto, torch"):
        gpt2.stage(shard)


def test_a_trainable_stage_computes_the_same_with_and_without_gradients(gpt2: splitbundle.Bundle) -> None:
    stage = gpt2.stage(gpt2.shards[1].name, trainable=True)
    x = torch.randn(1, 1, gpt2.architecture.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        without = stage(x)
    assert torch.equal(without, stage(x))


def test_the_named_kernel_computes(gpt2: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    used: list[str] = []
    for name in ("_column", "_gemv"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, own=name, call=original: (used.append(own), call(*given))[1])
    x = torch.randn(1, 1, gpt2.architecture.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = gpt2.stage(gpt2.shards[1].name, kernels="torch")(x)
        assert not used
        other = gpt2.stage(gpt2.shards[1].name, kernels="float32/1=column")(x)
    assert set(used) == {"_column"}
    assert torch.allclose(plain, other, atol=1e-5)
