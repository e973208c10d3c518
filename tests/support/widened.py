"""The models of ``models``, wide enough for quantization: sizes are multiples of 32, and hardly larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

import splitbundle
import splitbundle_converter
from tests.support import models

HEAD: Final = 32
INNER: Final = 96
_INNER_SIZES: Final = (
    *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"),
    *("moe_shared_expert_intermediate_size", "prefix_dense_intermediate_size"),
)
_OTHER: Final = {"glm": "glm", "glm4": "glm4", "phi3": "phi3", "stablelm": "stablelm", "laguna": "laguna-channels"}
"""Families whose usual configuration has numbers that depend on its widths -> another configuration."""
NAMES: Final = tuple(_OTHER.get(models.CONFIGURATIONS[name][0], name) for name in models.ONE_PER_FAMILY)
"""One configuration of each family."""


def widened(name: str) -> dict[str, Any]:
    """Return the fields of a configuration that make it wide enough."""
    from transformers import AutoConfig

    family, fields = models.CONFIGURATIONS[name]
    config = AutoConfig.for_model(family, **fields)
    names, own = config.attribute_map, config.to_dict()
    found: dict[str, Any] = {names.get("hidden_size", "hidden_size"): HEAD * config.num_attention_heads}
    found |= {size: HEAD for size in ("head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim") if own.get(size)}
    found |= {names.get(size, size): INNER for size in _INNER_SIZES if isinstance(getattr(config, size, None), int)}
    if family == "mimo_v2_flash":  # 0.6 of a head's channels are rotated, in pairs
        found |= {"head_dim": 40, "swa_head_dim": 40}
    return found


def bundle(name: str, root: Path, *, onnx: bool = False) -> splitbundle.Bundle:
    """Convert the widened model, cut at every layer. Its matrices are smaller, so that its results aren't larger."""
    model = models.make_model(name, **widened(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_((36 / parameter.shape[-1]) ** 0.5)
    model.save_pretrained(root / "wide")
    split = range(models.LAYERS + 1)
    return splitbundle_converter.convert(root / "wide", root / "wide.splitbundle", split=split, check=False, onnx=onnx)
