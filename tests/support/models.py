"""Small random models of every family, on disk and converted, and the results that transformers computes with them.

The weights are far larger than usual initial weights: norms away from one, biases away from zero, attention that
prefers some tokens. So if a step is left out, swapped or scaled twice, the logits move by much more than the tolerance.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle_converter.reference.golden_vectors import learned_tensors
from tests.support import (
    models_experts,
    models_gated_attention,
    models_layer_norm,
    models_renamed_experts,
    models_rms_norm,
)

LAYERS: Final = 4
VOCAB: Final = 61
TOLERANCE: Final = 1e-5
"""The tolerance, relative to the largest magnitude of the original's logits."""

_ROTARY: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
_GPT2: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "n_embd": 35,
    "n_head": 5,
    "n_layer": LAYERS,
    "n_positions": 48,
}
_LLAMA3: Final[dict[str, Any]] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So small that some of the five frequencies are kept, some divided, and some lie on the ramp in between.
    "original_max_position_embeddings": 16,
}
_LINEAR: Final[dict[str, Any]] = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}

_FIRST: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt2-by-layer": (
        "gpt2",
        _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 50, "activation_function": "gelu"},
    ),
    "gpt2-unscaled-untied": (
        "gpt2",
        _GPT2
        | {"n_embd": 42, "n_head": 3, "scale_attn_weights": False, "tie_word_embeddings": False}
        | {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ),
    "gpt2-one-head": ("gpt2", _GPT2 | {"n_head": 1, "n_inner": 91, "activation_function": "silu"}),
    "qwen2": ("qwen2", _ROTARY | {"num_key_value_heads": 2}),
    "qwen2-mixed": (
        "qwen2",
        _ROTARY
        | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
        | {"rms_norm_eps": 1e-3},
    ),
    "qwen2-one-kv-tied": ("qwen2", _ROTARY | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-alternating": (
        "qwen2",
        _ROTARY
        | {"num_key_value_heads": 6, "use_sliding_window": True, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gemma": ("gemma", _ROTARY | {"num_key_value_heads": 6, "head_dim": 10}),
    "gemma-one-kv-biased": ("gemma", _ROTARY | {"num_key_value_heads": 1, "head_dim": 14, "attention_bias": True}),
    "gemma-grouped-untied": (
        "gemma",
        _ROTARY | {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": False},
    ),
    "gemma-silu": ("gemma", _ROTARY | {"num_key_value_heads": 3, "head_dim": 2, "hidden_act": "silu"}),
    "llama": ("llama", _ROTARY | {"num_key_value_heads": 2}),
    "llama-one-kv-biased-tied": (
        "llama",
        _ROTARY
        | {"num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama-linear": ("llama", _ROTARY | {"num_key_value_heads": 6, "head_dim": 14, "rope_parameters": _LINEAR}),
    "llama-llama3": (
        "llama",
        _ROTARY | {"num_key_value_heads": 3, "head_dim": 10, "rope_parameters": _LLAMA3, "attention_bias": True},
    ),
    "mistral-window": ("mistral", _ROTARY | {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5}),
    "mistral-full": ("mistral", _ROTARY | {"num_key_value_heads": 6, "sliding_window": None}),
    # A window of one: a token sees itself alone. (transformers' own cache can't be driven in pieces here.)
    "mistral-narrow-tied": (
        "mistral",
        _ROTARY | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 1, "tie_word_embeddings": True},
    ),
    "mistral-wide-linear": (
        "mistral",
        _ROTARY
        | {"num_key_value_heads": 3, "head_dim": 14, "sliding_window": 60}
        | {"rope_parameters": _LINEAR, "hidden_act": "gelu"},
    ),
}
CONFIGURATIONS: Final = (
    _FIRST
    | models_rms_norm.CONFIGURATIONS
    | models_layer_norm.CONFIGURATIONS
    | models_experts.CONFIGURATIONS
    | models_renamed_experts.CONFIGURATIONS
    | models_gated_attention.CONFIGURATIONS
)
"""Name -> the family, and the fields of its configuration that differ from their defaults."""
ONE_PER_FAMILY: Final = (
    *("gpt2-by-layer", "qwen2-mixed", "gemma-one-kv-biased", "llama-llama3", "mistral-window"),
    *models_rms_norm.ONE_PER_FAMILY,
    *models_layer_norm.ONE_PER_FAMILY,
    *models_experts.ONE_PER_FAMILY,
    *models_renamed_experts.ONE_PER_FAMILY,
    *models_gated_attention.ONE_PER_FAMILY,
)
"""The configuration of each family that has the most ways to go wrong."""
BY_PIECES: Final = frozenset(models_rms_norm.BY_PIECES)
"""Models whose rows become longer than a threshold of their rotary scaling.

In transformers too, the pieces matter.
"""
WITHOUT_CACHE: Final = frozenset(models_layer_norm.WITHOUT_CACHE)
"""Families for which transformers has no cache."""
WEIGHT_OFFSET_FAMILIES: Final = models_rms_norm.WEIGHT_OFFSET_FAMILIES | models_layer_norm.WEIGHT_OFFSET_FAMILIES
"""Families that store what they add to one in place of a norm's weight."""


@cache
def scratch() -> Path:
    """A directory that is removed when the process ends."""
    path = tempfile.mkdtemp(prefix="splitbundle-models-")
    owner = os.getpid()
    # A forked worker has this registration too, and must not remove its parent's directory.
    atexit.register(lambda: shutil.rmtree(path, ignore_errors=True) if os.getpid() == owner else None)
    return Path(path)


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that all processes of a run share, and that no test changes.

    Args:
        name: its name.
        make: a function that makes it at another path. The result is renamed, so nobody sees a part of it.
    """
    folder = os.environ.get("SPLITBUNDLE_MODELS")
    path = (Path(folder) if folder else scratch()) / name
    if not path.exists():
        own = Path(tempfile.mkdtemp(dir=path.parent)) / name
        make(own)
        with contextlib.suppress(OSError):  # another process was first
            own.rename(path)
    return path


def make_model(name: str, **changes: Any) -> Any:
    """Return the model of the named configuration.

    Its weights depend only on the name; ``changes`` are to its fields.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # pytest would show two lines a model where a test fails
    family, fields = CONFIGURATIONS[name]
    # The ids of the families' defaults lie outside this vocabulary, which generate() warns of; and transformers
    # withholds the gradient of a padding id's row, which here is a token as any.
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    config = AutoConfig.for_model(family, **(ids | fields | changes))
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .float()
        .eval()
    )
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            flat = parameter.ndim == 1 or (parameter.ndim == 2 and parameter_name.endswith("_norm.weight"))
            norm = flat and parameter_name.endswith("weight") and family not in WEIGHT_OFFSET_FAMILIES
            parameter.copy_(1 + 0.3 * values if norm else 0.2 * values)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("bias"):  # a router's correction of its scores
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


@cache
def checkpoint(name: str, dtype: str = "float32") -> Path:
    """Return the checkpoint directory of the named model, with weights in ``dtype``."""
    return once(f"{name}-{dtype}", lambda path: make_model(name).to(getattr(torch, dtype)).save_pretrained(path))


@cache
def bundle(name: str) -> splitbundle.Bundle:
    """Convert the named model, cut at every layer, so tests can run every range of it.

    The conversion checks nothing: these tests are to find the faults.
    """
    source, split = checkpoint(name), range(LAYERS + 1)
    made = once(
        f"{name}.splitbundle", lambda path: splitbundle_converter.convert(source, path, split=split, check=False)
    )
    return splitbundle.open(made)


@cache
def original(name: str) -> Any:
    """Load the named model in float32 with transformers."""
    return load_original(checkpoint(name))


def load_original(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint with transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def source_gradients(model: Any) -> dict[str, Tensor]:
    """Return the gradients of a model under the names that its checkpoint has. The model is lost.

    transformers joins experts when it loads them, and takes them apart when it saves them.
    """
    from safetensors.torch import load_file

    with torch.no_grad():
        for parameter in model.parameters():  # a router's correction may be a parameter without a gradient
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # a router's correction has no gradient
                buffer.zero_()
    path = Path(tempfile.mkdtemp(dir=scratch()))
    model.save_pretrained(path)
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name not in buffers}


def original_of(path: Path, stored: torch.dtype, computed: torch.dtype = torch.float32) -> Any:
    """Load the model in transformers with the weights as they are stored."""
    model = load_original(path)
    with torch.no_grad():
        for tensor in learned_tensors(model):
            tensor.copy_(tensor.to(stored))
    return model.to(computed)


def original_logits(model: Any, ids: Sequence[int], pieces: Sequence[int] | None = None) -> Tensor:
    """Return the logits that transformers computes for one row alone.

    *Shape:* (sequence) -> (sequence, vocab).

    Args:
        model: a model of transformers.
        ids: the row's tokens.
        pieces: the lengths of the pieces that the model gets, with its own cache; by default one piece.
    """
    if not len(ids):
        return torch.zeros(0, model.config.vocab_size)
    row = torch.tensor([list(ids)])
    given, past = [], None
    with torch.no_grad():
        for piece in row.split(list(pieces or [len(ids)]), dim=1):
            out = model(input_ids=piece, past_key_values=past, use_cache=pieces is not None)
            past = getattr(out, "past_key_values", None)
            given.append(out.logits[0])
    return torch.cat(given)


_KNOWN: Final[dict[str, dict[tuple[int, ...], Tensor]]] = defaultdict(dict)
"""Name -> the logits of rows. A row that another one begins with has the first of its logits."""


def expected_logits(name: str, ids: tuple[int, ...]) -> Tensor:
    """``original_logits`` of the named model, computed once for a row."""
    known = _KNOWN[name]
    if ids not in known:
        known[ids] = original_logits(original(name), ids)
    return known[ids]


def expect(name: str, rows: Iterable[tuple[int, ...]]) -> None:
    """Compute the logits of rows for ``expected_logits``. Those of their beginnings come with them.

    No token sees those after it, and the pieces of a row don't matter in models other than ``BY_PIECES``.
    """
    known = _KNOWN[name]
    for row in rows:
        if row not in known:
            logits = original_logits(original(name), row)
            known.update({row[:length]: logits[:length] for length in range(len(row) + 1)})


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected magnitude; infinite if a value isn't a number.

    *Shape:* (…) twice the same.
    """
    if got.shape != expected.shape:
        raise ValueError(f"{tuple(expected.shape)} was expected, {tuple(got.shape)} came")
    difference = (got.double() - expected.double()).abs().max().item() / expected.double().abs().max().item()
    return difference if difference == difference else float("inf")


def token_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Return random tokens: one row of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def deviations(got: Tensor, expected: Tensor) -> Tensor:
    """Return the root mean square of each row's differences.

    One rounding can decide the largest difference, so that would be less steady.

    *Shape:* (rows, sequence, vocab) twice -> (rows).
    """
    return (got.double() - expected.double()).square().mean(dim=(1, 2)).sqrt()
