"""The original model, run with one layer in memory at a time, computes what the whole model does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import torch

from splitbundle import BundleError
from splitbundle_converter.checkpoint.source import Checkpoint, Reader
from splitbundle_converter.families.composites import COMPOSITES
from splitbundle_converter.open_checkpoint import OpenedCheckpoint, open_checkpoint
from splitbundle_converter.reference import module_weights
from splitbundle_converter.reference.golden_vectors import layered_vectors, reference_vectors
from tests.support.language_parts import make
from tests.support.models import CONFIGURATIONS, LAYERS, ONE_PER_FAMILY, checkpoint
from tests.support.tiers import FEW, thinned

pytestmark = pytest.mark.usefixtures("one_thread")
RENAMED: Final = {"mixtral", "qwen3_moe-biased", "gpt_oss", "glm4_moe", "phi3", "gemma3_text", "llama4_text-experts"}
"""Sources that keep each expert apart, fuse them, or have corrections of routers; fused projections; scaled tables."""
PARTS: Final = {"gemma3", "llava", "mistral3"}


@contextmanager
def opened(path: Path, part: str | None = None) -> Iterator[OpenedCheckpoint]:
    """Open a checkpoint as a conversion does."""
    with open_checkpoint(
        path, None, part=part, output=path / "no", allow_pickle=False, force=False, progress=None
    ) as found:
        yield found


def check_equal(found: OpenedCheckpoint, dtype: str = "keep") -> None:
    """Compare all golden vectors, bit by bit."""
    lengths, whole = reference_vectors(found.load_original, found.architecture, dtype)
    same, layered = layered_vectors(found.layered_original, found.architecture, dtype, None)
    assert same == lengths
    assert list(layered) == list(whole)
    different = [name for name in whole if not torch.equal(layered[name], whole[name])]
    assert not different


@pytest.mark.rule("SB-G-003")
@pytest.mark.parametrize("name", thinned(CONFIGURATIONS, FEW | RENAMED))
def test_it_computes_what_the_whole_model_does(name: str) -> None:
    with opened(checkpoint(name)) as found:
        check_equal(found)


@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, {"gpt2-by-layer", "qwen2_moe", "glm4_moe-groups"}))
def test_narrow_and_rounded_weights(name: str) -> None:
    """16 bits are joined before they become float32, and rounded to other 16 bits after that."""
    for stored, dtype in (("bfloat16", "keep"), ("float16", "bfloat16")):
        with opened(checkpoint(name, stored)) as found:
            check_equal(found, dtype)


@pytest.mark.parametrize("model_type", thinned(COMPOSITES, PARTS))
def test_language_parts(model_type: str, tmp_path: Path) -> None:
    """The checkpoint's own class runs, and only its language model is loaded."""
    if model_type == "perception_lm":
        pytest.importorskip("timm")  # its class builds a tower of that library
    with opened(make(tmp_path, model_type), "language") as found:
        check_equal(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe-biased"])
def test_the_tensors_of_a_layer_are_read_once_and_when_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read by the checkpoint's reader alone, and freed before those of the next layer are read."""
    read: list[str] = []
    held: list[int] = []
    get, load = Reader.get, module_weights.ModuleWeights.load

    def noted(reader: Reader, tensor: str) -> torch.Tensor:
        read.append(tensor)
        return get(reader, tensor)

    def counted(weights: module_weights.ModuleWeights, *arguments: object) -> None:
        load(weights, *arguments)  # type: ignore[arg-type]
        loaded = {found[0] for each in weights.loaded() if (found := re.search(r"\b(h|layers)\.\d+", each))}
        held.append(len(loaded))

    with opened(checkpoint(name)) as found:
        monkeypatch.setattr(Reader, "get", noted)
        monkeypatch.setattr(module_weights.ModuleWeights, "load", counted)
        layered_vectors(found.layered_original, found.architecture, "keep", None)
        tied = found.architecture.head.tied
        names = set(found.checkpoint.tensors)
    layers = [int(number[1]) for each in read if (number := re.search(r"\b(?:h|layers)\.(\d+)\.", each))]
    assert layers == sorted(layers)
    assert set(layers) == set(range(LAYERS))
    assert max(held) == 1
    # A tied table is read for the embedding, and again for the head.
    assert len(read) == len(names) + tied
    assert set(read) == names


@pytest.mark.parametrize(("name", "expected"), [("gpt2", "missing_keys"), ("qwen2_moe", "mismatched_keys")])
def test_a_missing_tensor(name: str, expected: str) -> None:
    """Without one of its experts, a layer would be joined of too few."""
    with opened(checkpoint(name)) as found:
        gone = next(each for each in found.checkpoint.tensors if ".1." in each)
        rest = Checkpoint(found.checkpoint.directory.path, name="source")
        del rest.tensors[gone]
        found.checkpoint.tensors = rest.tensors
        with pytest.raises(BundleError) as caught:
            layered_vectors(found.layered_original, found.architecture, "keep", None)
    assert caught.value.codes == ("source.tensor",)
    assert expected in str(caught.value)
