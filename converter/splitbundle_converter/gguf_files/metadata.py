"""The configuration that a GGUF file's metadata states. What it can't state completely is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy

from splitbundle.errors import BundleError, quoted
from splitbundle_converter.errors import refusal

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""The architectures of llama.cpp whose tensors are known -> the class in transformers."""
BESIDE: Final = "Put the model's own config.json beside the file: it is taken in place of the metadata"
_SIZES: Final[Mapping[str, str]] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Fields that every file has. They are whole numbers."""
_MORE: Final = frozenset(
    [
        *("attention.head_count_kv", "attention.key_length", "attention.layer_norm_rms_epsilon"),
        *("attention.value_length", "rope.dimension_count", "rope.freq_base", "vocab_size"),
    ]
)
_NOTHING: Final = (("rope.scaling.type", "none"), ("tensor_data_layout", "Meta AI original pth"))
"""Fields with a value that changes nothing."""
_MOST_LAYERS: Final = 10_000
ROTARY_FACTORS: Final = "rope_freqs.weight"
"""A tensor with the factors of scaled rotary positions. The metadata doesn't say how they are made."""


def configuration(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: str) -> dict[str, Any]:
    """Return the fields of a ``config.json``.

    Args:
        fields: The metadata by name.
        shapes: The shape of each tensor of the file.
        file: The name of the file, for messages.

    Raises:
        BundleError: ``source.family``, ``source.config``.
    """
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        expected = f"one of the architectures {', '.join(ARCHITECTURES)}"
        hint = "Convert the checkpoint that the file was made of"
        raise refusal("source.family", file, expected, quoted(kind), hint, "/general.architecture")
    own = {name.removeprefix(f"{kind}."): value for name, value in fields.items() if name.startswith(f"{kind}.")}
    for name, value in own.items():
        if name not in _SIZES and name not in _MORE and (name, value) not in _NOTHING:
            # transformers leaves such a field out: rotary scaling, windows, experts.
            raise _wrong(file, f"{kind}.{name}", "no such field, which the converter does not know", value)
    if ROTARY_FACTORS in shapes:
        raise _wrong(
            file, ROTARY_FACTORS, "no factors of rotary positions, as the metadata doesn't explain them", "a tensor"
        )
    sizes = {to: _number(own, name, kind, file) for name, to in _SIZES.items()}
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        raise _wrong(file, f"{kind}.block_count", f"a number up to {_MOST_LAYERS}", sizes["num_hidden_layers"])
    heads = sizes["num_attention_heads"]
    head_dim = _number(own, "attention.key_length", kind, file, sizes["hidden_size"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if _number(own, name, kind, file, head_dim) != head_dim:
            raise _wrong(file, f"{kind}.{name}", str(head_dim), own[name])
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise refusal("source.tensor", file, "a tensor 'token_embd.weight'", "none")
    ids = {f"{name}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        **sizes,
        "num_key_value_heads": _number(own, "attention.head_count_kv", kind, file, heads),
        "head_dim": head_dim,
        "rms_norm_eps": _real(own, "attention.layer_norm_rms_epsilon", kind, file),
        "rope_theta": _real(own, "rope.freq_base", kind, file, 10000.0),
        "vocab_size": embedding[0],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{name: value for name, value in ids.items() if type(value) is int},
    }
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    return config


def _number(own: Mapping[str, Any], name: str, kind: str, file: str, default: int | None = None) -> int:
    value = own.get(name, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise _wrong(file, f"{kind}.{name}", "a whole number from 1", value)
    return value


def _real(own: Mapping[str, Any], name: str, kind: str, file: str, default: float | None = None) -> float:
    value = own.get(name, default)
    if type(value) is not float or not 0 < value < 1e12:
        raise _wrong(file, f"{kind}.{name}", "a positive number", value)
    # The shortest decimal of the 32 bits in the file: 1e-05 in place of 9.999999747378752e-06.
    return float(str(numpy.float32(value)))


def _wrong(file: str, name: str, expected: str, value: object) -> BundleError:
    return refusal("source.config", file, expected, quoted(value), BESIDE, f"/{name}")
