"""Tensors held against what the configuration implies: wrong, missing, extra, tied, and old names of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import splitbundle_converter
from splitbundle.format.manifest.document import SourceName
from splitbundle_converter.translation.restore import join
from tests.support.checkpoints import (
    MISSING,
    QUERY,
    WEIGHTS,
    Tensors,
    accepted,
    change_config,
    change_tensors,
    refused,
    replaced,
    without,
)
from tests.support.models import LAYERS, bundle

pytestmark = pytest.mark.usefixtures("one_thread")

EXTRA = "Use the configuration that was published with these weights"
QUANTIZED = "Convert the checkpoint that was quantized. Without the scales, the stored numbers are not the weights"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda tensors: tensors.update({"model.extra": torch.zeros(3, dtype=torch.bfloat16)}),
            f"{WEIGHTS} /model.extra: expected only the tensors of a model of 4 layers as its configuration "
            "describes it, got an extra tensor BF16 [3]",
        ),
        (
            # Biases that the configuration denies: leaving them out would be silently wrong.
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(36)}),
            f"{WEIGHTS} /model.layers.0.self_attn.q_proj.bias: expected only the tensors of a model of 4 layers as "
            "its configuration describes it, got an extra tensor F32 [36]",
        ),
        (
            without("model.norm.weight"),
            f"source: expected a tensor 'model.norm.weight' of shape [36], got none. {MISSING}",
        ),
        (without(QUERY), f"source: expected a tensor '{QUERY}' of shape [36, 36], got none. {MISSING}"),
        (replaced(QUERY, lambda x: x[:5]), f"{WEIGHTS} /{QUERY}: expected shape [36, 36], got [5, 36]"),
        (
            replaced("model.layers.2.mlp.up_proj.weight", lambda x: x.T),
            f"{WEIGHTS} /model.layers.2.mlp.up_proj.weight: expected shape [51, 36], got [36, 51]",
        ),
        (
            replaced(QUERY, lambda x: x.double()),
            f"{WEIGHTS} /{QUERY}: expected dtype F32, F16 or BF16, got F64",
        ),
        (
            replaced(QUERY, lambda x: x.to(torch.int8)),
            f"{WEIGHTS} /{QUERY}: expected dtype F32, F16 or BF16, got I8",
        ),
        (
            replaced(QUERY, lambda x: x.to(torch.float8_e4m3fn)),
            f"{WEIGHTS} /{QUERY}: expected dtype F32, F16 or BF16, got F8_E4M3",
        ),
    ],
)
def test_tensors_that_do_not_match(
    source: Callable[[str], Path], output: Path, change: Callable[[Tensors], None], text: str
) -> None:
    path = source("llama")
    change_tensors(path, change)
    hints = {
        "expected only": EXTRA,
        "got F64": "Save it as one of these",
        "expected dtype": QUANTIZED,
        "expected shape": MISSING,
    }
    hint = next((f". {hint}" for sign, hint in hints.items() if sign in text), "")
    assert str(refused(path, output)) == f"[source.tensor] {text}{hint}"


def test_a_transposed_layout_is_told_apart(source: Callable[[str], Path], output: Path) -> None:
    """GPT-2's matrices are stored [in, out], and a message names the source's own shape."""
    path = source("gpt2")
    change_tensors(path, replaced("transformer.h.1.attn.c_attn.weight", lambda x: x.T))
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /transformer.h.1.attn.c_attn.weight: expected shape [35, 105], got [105, 35]. "
        f"{MISSING}"
    )


@pytest.mark.parametrize("count", [LAYERS - 1, LAYERS + 1])
def test_a_checkpoint_of_another_depth(source: Callable[[str], Path], output: Path, count: int) -> None:
    """The error names each extra and each missing tensor, so no layer is dropped or invented."""
    path = source("llama")
    change_config(path, num_hidden_layers=count)
    error = refused(path, output)
    assert error.codes == ("source.tensor",) * 9
    layer = min(count, LAYERS - 1) if count < LAYERS else LAYERS
    assert all(f"model.layers.{layer}." in str(problem) for problem in error.problems)


def test_a_tied_head_that_is_stored_and_differs(source: Callable[[str], Path], output: Path) -> None:
    path = source("gpt2")
    table = "transformer.wte.weight"
    change_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors[table] + 1e-6}))
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /lm_head.weight: expected the values of {table}, as tie_word_embeddings is true, "
        "got other values. If the head was trained apart from the embedding, save the model with tie_word_embeddings "
        "false"
    )


def test_a_tied_head_that_is_stored_and_equal(source: Callable[[str], Path], output: Path) -> None:
    """The tensor is stored once, and comes back under two names."""
    path = source("gpt2")
    change_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    made = accepted(path, output)
    assert made.fingerprint == bundle("gpt2").fingerprint
    back = dict(splitbundle_converter.source_tensors(made))
    assert torch.equal(back["lm_head.weight"], back["transformer.wte.weight"])
    assert set(back) == set(load_file(path / WEIGHTS))


@pytest.mark.parametrize("name", ["gpt2", "gemma", "opt-post-narrow"])
def test_a_tied_model_that_stores_only_its_head(source: Callable[[str], Path], output: Path, name: str) -> None:
    """transformers ties the embedding to the head. The tensor comes back under the head's name alone."""
    path = source(name)
    table = next(key for key in load_file(path / WEIGHTS) if key.endswith(("wte.weight", "embed_tokens.weight")))
    change_tensors(
        path, lambda tensors: {"lm_head.weight" if key == table else key: value for key, value in tensors.items()}
    )
    made = accepted(path, output)
    assert made.fingerprint == bundle(name).fingerprint
    back = dict(splitbundle_converter.source_tensors(made))
    assert set(back) == set(load_file(path / WEIGHTS))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("gemma", "model.")])
def test_a_base_model_saved_alone(source: Callable[[str], Path], output: Path, name: str, prefix: str) -> None:
    """The names lack the prefix, and a tied head needs no tensor of its own. The names come back unchanged."""
    path = source(name)
    change_tensors(path, lambda tensors: {key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    made = accepted(path, output)
    assert made.fingerprint == bundle(name).fingerprint
    assert {key for key, _ in splitbundle_converter.source_tensors(made)} == set(load_file(path / WEIGHTS))


def test_buffers_of_old_checkpoints_are_dropped(source: Callable[[str], Path], output: Path) -> None:
    """GPT-2's masks are dropped by name, only for layers that exist."""
    path = source("gpt2")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in range(LAYERS)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    change_tensors(path, lambda tensors: tensors.update(masks))
    assert accepted(path, output).fingerprint == bundle("gpt2").fingerprint
    change_tensors(path, lambda tensors: tensors.update({"transformer.h.4.attn.bias": torch.ones(1)}))
    shutil.rmtree(output)
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /transformer.h.4.attn.bias: expected only the tensors of a model of 4 layers as "
        "its configuration describes it, got an extra tensor F32 [1]. "
        f"{EXTRA}"
    )


def test_rotary_buffers_are_dropped(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_tensors(
        path,
        lambda tensors: tensors.update(
            {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(LAYERS)}
        ),
    )
    assert accepted(path, output).fingerprint == bundle("llama").fingerprint


def test_a_checkpoint_of_another_model_does_not_flood(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, num_hidden_layers=2000)
    assert len(refused(path, output).problems) == 100


def test_a_constant_of_another_value(source: Callable[[str], Path], output: Path) -> None:
    """The constants of xIELU are buffers of the checkpoint, and transformers loads them."""
    path = source("apertus")
    change_tensors(path, replaced("model.layers.2.mlp.act_fn.beta", lambda x: x + 0.25))
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /model.layers.2.mlp.act_fn.beta: expected 0.5, which the decoder uses, got 0.75. "
        "A model with another value of this constant can't be converted yet"
    )


@pytest.mark.parametrize(("value", "got"), [(0.505, "0.505"), (0.508, "0.508"), (float("nan"), "nan")])
def test_a_constant_that_is_nearly_the_decoders(
    source: Callable[[str], Path], output: Path, value: float, got: str
) -> None:
    path = source("apertus")
    change_tensors(path, replaced("model.layers.2.mlp.act_fn.beta", lambda x: torch.full_like(x, value)))
    text = str(refused(path, output))
    assert f"/model.layers.2.mlp.act_fn.beta: expected 0.5, which the decoder uses, got {got}. " in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_constant_as_each_dtype_keeps_it(source: Callable[[str], Path], output: Path, dtype: torch.dtype) -> None:
    path = source("apertus")
    change_tensors(path, replaced("model.layers.2.mlp.act_fn.eps", lambda x: torch.full_like(x, -1e-6).to(dtype)))
    accepted(path, output, check=False)


@pytest.mark.rule("SB-M-087", "SB-M-080")
def test_a_source_tensor_is_put_together_by_groups() -> None:
    query, key, value = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    entry = SourceName(source="s", tensors=("q", "k", "v"), groups=2, transposed=False)
    tensors = {name: rows.reshape(-1, 1).expand(-1, 3) for name, rows in zip("qkv", (query, key, value), strict=True)}
    got = join(entry, tensors.__getitem__)["s"]
    assert got[:, 1].tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.rule("SB-M-088")
def test_source_tensors_that_are_rows() -> None:
    entry = SourceName(source="s.{row}.weight", tensors=("q",), groups=1, transposed=False)
    got = join(entry, {"q": torch.arange(6).reshape(3, 2)}.__getitem__)
    assert {name: row.tolist() for name, row in got.items()} == {
        "s.0.weight": [0, 1],
        "s.1.weight": [2, 3],
        "s.2.weight": [4, 5],
    }


def test_a_bias_of_zeros_changes_nothing(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_tensors(path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(36)}))
    accepted(path, output, check=True)
