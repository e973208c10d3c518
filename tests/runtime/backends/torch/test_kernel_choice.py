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


def slow(product: Callable[..., Tensor], times: int) -> Callable[..., Tensor]:
    """Return a product that takes as long as several."""

    def repeated(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(times - 1):
            product(x, weight)
        return product(x, weight)

    return repeated


@pytest.mark.parametrize("key", kernel_choice.MEASURED)
@pytest.mark.parametrize("fastest", ["column", "onednn", "torch", "gemv"])
def test_the_fastest_kernel_is_found(key: str, fastest: str) -> None:
    if fastest not in KERNELS[key]:
        pytest.skip("this kernel doesn't compute such products")
    plain = torch.nn.functional.linear
    measured = Measured(lambda name: plain if name == fastest else slow(plain, 4))
    assert measured.kernel(key) == fastest
    assert set(measured.rates[key, 1]) == set(KERNELS[key])


def test_equal_kernels_keep_the_preferred_one() -> None:
    measured = Measured(lambda name: torch.nn.functional.linear)
    assert {key: measured.kernel(key) for key in KERNELS} == {key: names[0] for key, names in KERNELS.items()}


def test_a_kernel_that_this_torch_lacks_is_not_measured() -> None:
    measured = Measured(lambda name: torch.nn.functional.linear if name == "torch" else None)
    assert {measured.kernel(key) for key in KERNELS} == {"torch"}
    assert not measured.rates


def test_each_number_of_threads_has_its_own() -> None:
    measured = Measured(lambda name: torch.nn.functional.linear)
    measured.kernel("float32/1")
    torch.set_num_threads(2)
    measured.kernel("float32/1")
    torch.set_num_threads(1)
    assert set(measured.rates) == {("float32/1", 1), ("float32/1", 2)}


def test_every_kernel_computes_the_same_product() -> None:
    """So a disturbed measurement costs speed, and never correctness."""
    generator = torch.Generator().manual_seed(0)
    for key, names in KERNELS.items():
        dtype, rows = getattr(torch, key.partition("/")[0]), {"1": 1, "2-3": 3, "4-": 5}[key.partition("/")[2]]
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
    assert text == "float32/1=onednn,float32/2-3=torch,float32/4-=torch,bfloat16/1=gemv"
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
    assert gpt2.stage(shard).kernels == gpt2.stage(shard, trainable=True).kernels == named
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
