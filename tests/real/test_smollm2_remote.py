"""SmolLM2 with its trunk on servers: the text of one machine, also when a server is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import splitbundle
import splitbundle_converter
from tests.support.stage_servers import StageProcess

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    output: Path = tmp_path_factory.mktemp("remote") / "smollm2.splitbundle"
    return splitbundle_converter.convert(smollm2, output, split=[2, 28], check=False)


@pytest.mark.parametrize("replay", ["exact", "merged"])
def test_text_survives_a_killed_server(bundle: splitbundle.Bundle, replay: str) -> None:
    options = ("--threads", "1")
    with StageProcess(bundle.path, "trunk", *options) as first, StageProcess(bundle.path, "trunk", *options) as second:
        near = bundle.pipeline(kernels="torch")
        far = bundle.pipeline(kernels="torch", remote={"trunk": [first.url, second.url]}, replay=replay)
        ids = torch.tensor([bundle.tokenizer().encode(PROMPT)])
        expected = [int(token) for token in near.generate(ids, max_new_tokens=24)]
        found = []
        for token in far.generate(ids, max_new_tokens=24):
            found.append(int(token))
            if len(found) == 8:
                first.kill()
        assert found == expected
        assert "Paris" in bundle.tokenizer().decode(found)


def test_outlier_channels_and_narrow_encodings(bundle: splitbundle.Bundle) -> None:
    """A real model has channels of very large numbers, which random ones don't have. They cost ``int8`` much."""
    with StageProcess(bundle.path, "trunk", "--threads", "1") as server, torch.no_grad():
        ids = torch.tensor([bundle.tokenizer().encode(PROMPT * 4)])
        exact = bundle.pipeline(kernels="torch", remote={"trunk": server.url})(ids).float()
        assert torch.equal(exact, bundle.pipeline(kernels="torch")(ids).float())
        for wire, kept, difference in (("float16", 1.0, 5e-3), ("int8", 0.8, 0.3)):
            got = bundle.pipeline(kernels="torch", remote={"trunk": server.url}, wire=wire)(ids).float()
            same = float((got.argmax(-1) == exact.argmax(-1)).float().mean())
            largest = float((got - exact).abs().max() / exact.abs().max())
            assert same >= kept
            assert largest <= difference
