"""``check="layers"``: the bundle of the whole check, errors that name the part, and memory for one layer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from splitbundle import ParityError
from splitbundle_converter import conversion
from splitbundle_converter.checkpoint.source import Reader
from splitbundle_converter.reference import golden_vectors, memory
from splitbundle_converter.translation.translate import Origin, Translation, translate
from tests.support.checkpoints import accepted, change_tensors, digests, refused, replaced, said
from tests.support.command_line import run
from tests.support.models import LAYERS, ONE_PER_FAMILY, bundle, checkpoint
from tests.support.tiers import FEW, thinned

pytestmark = pytest.mark.usefixtures("one_thread")
ALL: Final = [f"layer {i}" for i in range(LAYERS)]
MEBI: Final = 2**20


@pytest.mark.rule("SB-I-004")
@pytest.mark.parametrize("name", thinned(sorted(FEW), {"gpt2-by-layer", "qwen2_moe"}))
def test_the_bundle_is_that_of_the_whole_check(name: str, output: Path) -> None:
    made = [
        accepted(checkpoint(name), output.with_name(check), split=(1, 3), dtype="bfloat16", check=check)
        for check in ("whole", "layers")
    ]
    one, two = (digests(each.path) for each in made)
    assert one == two
    assert made[1].manifest.vectors is not None
    made[1].run_vectors(require_original=True)


@dataclass(frozen=True)
class Changed:
    """An origin whose tensor has a wrong value in one place."""

    right: Origin
    row: int

    @property
    def source(self) -> str:
        return self.right.source

    def pieces(self, reader: Reader) -> Iterator[Tensor]:
        whole = self.right.extract(reader).clone()
        whole[self.row].flatten()[0].add_(0.5)
        yield whole


def change(monkeypatch: pytest.MonkeyPatch, *names: str, row: int = 0) -> None:
    """Let the converter write a wrong value into each of these tensors of the bundle."""

    def wrong(*arguments: Any) -> Translation:
        right = translate(*arguments)
        changed: dict[str, Any] = {name: Changed(right.origins[name], row) for name in names}
        return replace(right, origins=right.origins | changed)

    monkeypatch.setattr(conversion, "translate", wrong)


@pytest.mark.long
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_family(name: str, output: Path) -> None:
    """Also the embedding of each token: some originals have a table of few positions."""
    accepted(checkpoint(name), output, check="layers")


def first_token(name: str) -> int:
    """Return the first token of the golden vectors. Ask before ``change``: other tests share the bundle."""
    return int(golden_vectors.case_rows(bundle(name).architecture)[0][0])


def places(name: str, output: Path) -> list[str | None]:
    """Return the places that the error of a conversion names."""
    error = refused(checkpoint(name), output, split=(2,), check="layers")
    assert isinstance(error, ParityError)
    assert set(error.codes) == {"parity"}
    return [problem.argument for problem in error.problems]


@pytest.mark.rule("SB-G-003", "SB-D-009")
@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_wrong_weight_of_a_layer(layer: int, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tensor in ("attention.value.weight", "mlp_norm.weight"):
        change(monkeypatch, f"layers.{layer}.{tensor}")
        assert places("llama", output) == [f"layer {layer}"]


@pytest.mark.rule("SB-G-003")
def test_one_wrong_weight_of_an_expert(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, "layers.3.mlp.experts.down.weight")
    assert places("qwen3_moe-biased", output) == ["layer 3"]


@pytest.mark.rule("SB-G-003")
def test_one_wrong_weight_of_the_embedding(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = first_token("llama")
    change(monkeypatch, "embedding.token.weight", row=token)
    assert places("llama", output) == ["the embedding"]


@pytest.mark.rule("SB-G-003")
@pytest.mark.parametrize("name", ["llama", "gpt2-by-layer", "gemma3_text"])
def test_one_wrong_weight_of_a_token_that_no_golden_vector_has(
    name: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = bundle(name).architecture
    used = {int(token) for row in golden_vectors.case_rows(architecture) for token in row}
    unused = next(token for token in reversed(range(architecture.vocab_size)) if token not in used)
    change(monkeypatch, "embedding.token.weight", row=unused)
    assert places(name, output)[0] == "the embedding"


@pytest.mark.rule("SB-G-003")
@pytest.mark.parametrize("tensor", ["head.norm.weight", "head.projection.weight"])
def test_one_wrong_weight_of_the_head(tensor: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, tensor)
    assert places("llama", output) == ["the head"]


@pytest.mark.rule("SB-G-003")
def test_a_wrong_layer_does_not_hide_a_later_one(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = first_token("gpt2")
    change(monkeypatch, *(f"layers.{layer}.attention.value.weight" for layer in range(LAYERS)), "head.norm.weight")
    assert places("llama", output) == [*ALL, "the head"]
    # The table of a tied head is in both ends.
    change(monkeypatch, "embedding.token.weight", row=token)
    assert places("gpt2", output) == ["the embedding", "the head"]


@pytest.mark.rule("SB-G-003")
def test_weights_that_are_not_numbers(source: Callable[[str], Path], output: Path) -> None:
    """The first part that has no number is named."""
    path = source("llama")
    name = "model.layers.2.self_attn.q_proj.weight"
    change_tensors(path, replaced(name, lambda x: torch.full_like(x, float("nan"))))
    error = refused(path, output, check="layers")
    assert isinstance(error, ParityError)
    assert error.problems[0].argument == "layer 2"


def test_pickled_weights(output: Path, tmp_path: Path) -> None:
    """The weights lie in other files than those of the checkpoint."""
    path = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), path)
    from safetensors.torch import load_file

    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    made = accepted(path, output, check="layers", allow_pickle=True)
    assert made.manifest.vectors is not None


def test_graphs_are_not_run(output: Path) -> None:
    """onnxruntime would need memory for a whole shard."""
    notes: list[str] = []
    made = accepted(checkpoint("llama"), output, split=(2,), check="layers", onnx=True, notes=notes.append)
    assert notes[-1] == (
        "The check by layer did not run the graphs, which take memory for a whole shard. "
        'Bundle.run_vectors(backend="onnxruntime") does'
    )
    made.run_vectors(backend="onnxruntime")


@pytest.mark.parametrize("check", ["some", 1, None, ""])
def test_a_check_that_does_not_exist(check: object, output: Path) -> None:
    text = f"[usage.check] check: expected one of whole, layers, none, True or False, got {check!r}"
    assert said(refused(checkpoint("llama"), output, check=check)) == text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "x.splitbundle"
    status, out, err = run(capsys, "convert", checkpoint("llama"), "--check", "layers", "-o", output)
    assert status == 0, err
    assert out.splitlines()[0] == f"{output}: model [0, 4); checked against the original model, layer by layer"
    if memory.private_memory() is not None:
        pattern = r"note: The check took at most [0-9.]+ MiB of memory, one layer at a time. "
        assert re.search(pattern + r"The whole original model in float32 takes 0\.2 MiB\n", err), err
    for words in (["--check", "none"], ["--no-check"]):
        status, out, err = run(capsys, "convert", checkpoint("llama"), *words, "--force", "-o", output)
        assert (status, out.splitlines()[0]) == (0, f"{output}: model [0, 4); not checked"), err
    assert run(capsys, "convert", checkpoint("llama"), "--check", "some", "-o", output)[0] == 2
    change(monkeypatch, "layers.1.attention.value.weight")
    status, out, err = run(capsys, "convert", checkpoint("llama"), "--check", "layers", "--force", "-o", output)
    assert status == 3
    assert "[parity] vectors.safetensors layer 1: expected a difference to the original model of at most" in err


def test_without_a_measure_of_memory(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems don't report private memory. The note is left out there, and the check is the same."""
    monkeypatch.setattr(memory, "private_memory", lambda: None)
    notes: list[str] = []
    accepted(checkpoint("llama"), output, check="layers", notes=notes.append)
    assert not [note for note in notes if "memory" in note]


PROBE: Final = """
import json, sys
import jsonschema, transformers
import torch
import transformers.models.llama.modeling_llama
import splitbundle_converter
from splitbundle_converter.reference.memory import PeakMemory

torch.set_num_threads(1)

for check in sys.argv[2:]:
    notes, peak = [], PeakMemory()
    with peak.watch():
        splitbundle_converter.convert(sys.argv[1], f"{sys.argv[1]}-{check}", check=check, notes=notes.append)
    print(json.dumps([check, peak.bytes, notes]), flush=True)
"""


@pytest.mark.skipif(memory.private_memory() is None, reason="RssAnon is Linux's")
def test_the_peak_is_near_one_layer(tmp_path: Path) -> None:
    """Of 24 layers, the check by layer holds about one and the whole check all, in private memory."""
    path, layers = tmp_path / "source", 24
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=6,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (0.03 * torch.randn(shape, generator=generator)).bfloat16() for name, shape in shapes.items()}
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(path)
    # The first conversion imports what all of them need.
    layer = sum(4 * shape.numel() for name, shape in shapes.items() if name.startswith("model.layers.0."))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path), "none", "layers", "whole"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = {check: (peak, notes) for check, peak, notes in map(json.loads, done.stdout.splitlines())}
    by_layer, whole = found["layers"][0], found["whole"][0]
    assert whole > 0.9 * layers * layer, "the whole check needs all layers"
    figures = f"{layer / MEBI:.0f} MiB a layer, {by_layer / MEBI:.0f} MiB, {whole / MEBI:.0f} MiB"
    assert by_layer <= 2 * layer + 24 * MEBI, figures
    assert by_layer <= whole / 4, figures
    (note,) = (note for note in found["layers"][1] if "one layer at a time" in note)
    told = re.search(r"at most ([0-9.]+) MiB", note)
    assert told is not None
    assert float(told[1]) * MEBI <= by_layer + MEBI
