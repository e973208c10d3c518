"""Stages on an accelerator: whatever torch or onnxruntime reports. Without one, every test is skipped.

The processor's results are the reference. Products on an accelerator may use narrower numbers inside, so the bound is
that of 16 bits for 16-bit stages, and 1e-4 of the largest magnitude for float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.backends.torch.pipeline import Pipeline
from tests.support.paths import ROOT

IDS = torch.tensor([[44, 308, 68, 455, 270, 618]])


def accelerator() -> torch.device | None:
    """Return torch's accelerator: CUDA, ROCm, MPS, XPU or another; None without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None or found.type == "cpu" else found


DEVICE = accelerator()
PROVIDERS = [
    name
    for name in onnxruntime.get_available_providers()
    if name not in ("CPUExecutionProvider", "AzureExecutionProvider")
]
torch_device = pytest.mark.skipif(DEVICE is None, reason="torch reports no accelerator here")
provider = pytest.mark.skipif(not PROVIDERS, reason="onnxruntime reports no provider but the processor's here")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    output: Path = tmp_path_factory.mktemp("accelerators") / "license.splitbundle"
    return splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=[2, 4], onnx=True)


def on_device(bundle: splitbundle.Bundle, **options: Any) -> Pipeline:
    pipeline = bundle.pipeline(device=str(DEVICE), **options)
    assert isinstance(pipeline, Pipeline)
    return pipeline


def close(got: Tensor, expected: Tensor, share: float = 1e-4) -> bool:
    return bool((got.cpu().float() - expected.float()).abs().max() <= share * expected.abs().max())


@torch_device
def test_stages_lie_where_they_were_put(bundle: splitbundle.Bundle) -> None:
    for stage in on_device(bundle)._in_order():
        assert stage.device.type == str(DEVICE).partition(":")[0]
        assert {parameter.device.type for parameter in stage.parameters()} == {stage.device.type}
    moved = bundle.stage("trunk").to(str(DEVICE))
    assert moved.device.type == str(DEVICE).partition(":")[0]


@torch_device
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-4), ("bfloat16", 0.05), ("float16", 0.02)])
def test_parity_with_the_processor(bundle: splitbundle.Bundle, dtype: str, share: float) -> None:
    expected = bundle.pipeline(dtype="float32")(IDS)
    with torch.no_grad():
        assert close(on_device(bundle, dtype=dtype)(IDS.to(str(DEVICE))), expected, share)


@torch_device
def test_caches_and_padding(bundle: splitbundle.Bundle) -> None:
    pipeline, reference = on_device(bundle), bundle.pipeline()
    ids, mask = torch.tensor([[0, 0, 44, 308], [44, 308, 68, 455]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    session, other = pipeline.session(2, 16), reference.session(2, 16)
    with torch.no_grad():
        one = pipeline(ids.to(str(DEVICE)), attention_mask=mask.to(str(DEVICE)), session=session)
        assert close(one, reference(ids, attention_mask=mask, session=other))
        for each in (session, other):
            each.rollback([0, 1])
            each.reorder([1, 0])
        more = torch.tensor([[5], [6]])
        assert close(pipeline(more.to(str(DEVICE)), session=session), reference(more, session=other))


@torch_device
def test_generation(bundle: splitbundle.Bundle) -> None:
    drawn, expected = (
        [int(token[0]) for token in pipeline.generate(pipeline.token_ids(IDS.tolist()), max_new_tokens=12)]
        for pipeline in (on_device(bundle), bundle.pipeline())
    )
    assert drawn == expected


@torch_device
def test_training(bundle: splitbundle.Bundle) -> None:
    own, reference = bundle.stage("trunk", trainable=True, device=str(DEVICE)), bundle.stage("trunk", trainable=True)
    x = torch.randn(1, 5, bundle.architecture.hidden_size, generator=torch.Generator().manual_seed(0))
    for stage in (own, reference):
        stage(x.to(stage.device)).square().mean().backward()
    for (name, one), (_, other) in zip(own.named_parameters(), reference.named_parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None
        assert close(one.grad, other.grad, 1e-3), name


@torch_device
def test_mixed_pipelines(bundle: splitbundle.Bundle) -> None:
    """Stages on the accelerator, on the processor, and in onnxruntime, in one pipeline."""
    expected = bundle.pipeline()(IDS)
    stages = [bundle.stage("bottom"), bundle.stage("trunk", device=str(DEVICE)), bundle.stage("top")]
    with torch.no_grad():
        assert close(Pipeline(stages)(IDS), expected)
    mixed = bundle.pipeline(backend={"bottom": "onnxruntime"}, device=str(DEVICE))
    assert close(torch.from_numpy(mixed(IDS.numpy())), expected)


@torch_device
def test_inputs_on_another_device_are_refused(bundle: splitbundle.Bundle) -> None:
    with pytest.raises(BundleError, match=r"\[input.device\]"):
        bundle.stage("bottom", device=str(DEVICE))(IDS)


@provider
@pytest.mark.parametrize("name", PROVIDERS or ["none"])
def test_parity_of_a_provider(bundle: splitbundle.Bundle, name: str) -> None:
    expected = bundle.pipeline(backend="onnxruntime")(IDS.numpy())
    pipeline = bundle.pipeline(backend="onnxruntime", providers=[name, "CPUExecutionProvider"])
    got = pipeline(IDS.numpy())
    assert numpy.abs(got - expected).max() <= 1e-3 * numpy.abs(expected).max()
    session = pipeline.session(1, 16)
    pipeline(IDS[:, :4].numpy(), session=session)
    last = pipeline(IDS[:, 4:].numpy(), session=session)[:, -1]
    assert numpy.abs(last - expected[:, -1]).max() <= 1e-3 * numpy.abs(expected).max()
