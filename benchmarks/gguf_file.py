"""Write a checkpoint of the benchmark as GGUF for llama.cpp, with a made-up vocabulary of the right size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import torch
from benchmarks.shapes import Shape
from safetensors import safe_open
from torch import Tensor

_GPT2: Final = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_LLAMA: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS: Final = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def write(shape: Shape, checkpoint: Path, path: Path, to: str | None = None) -> None:
    """Write the whole model. Matrices keep the dtype of the checkpoint; all other tensors are float32.

    With ``to``, matrices are quantized by the library gguf: "int8" to Q8_0, or "int4" to Q4_0 and the table to Q8_0.
    """
    writer = gguf.GGUFWriter(path, shape.family)
    _facts(writer, shape)
    for name, tensor in tensors(shape, checkpoint):
        if to is not None and tensor.dim() == 2 and name != "position_embd.weight":
            types = gguf.GGMLQuantizationType
            kind = types.Q8_0 if to == "int8" or name == "token_embd.weight" else types.Q4_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().contiguous().numpy(), kind), raw_dtype=kind)
        elif tensor.dtype == torch.bfloat16 and tensor.dim() == 2 and name != "position_embd.weight":
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(shape: Shape, checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the checkpoint with llama.cpp's names and layouts. *Shape:* matrices are (out, in)."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for source in opened.keys():  # noqa: SIM118  (it is not a dict)
                name, tensor = renamed(source), opened.get_tensor(source)
                if shape.family == "gpt2" and tensor.dim() == 2 and name.startswith("blk."):
                    tensor = tensor.t()  # GPT-2's layers store [in, out]
                if shape.family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                    tensor = _interleaved(tensor, shape.head_size)
                yield name, tensor


def renamed(source: str) -> str:
    """Return llama.cpp's name: ``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    module, _, last = source.rpartition(".")
    if module in _ENDS:
        return f"{_ENDS[module]}.{last}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{(_GPT2 | _LLAMA)[part]}.{last}"


def _interleaved(tensor: Tensor, size: int) -> Tensor:
    """Reorder channels: llama.cpp rotates adjacent channels; transformers rotates channels half a head apart."""
    rows, columns = tensor.shape
    return tensor.view(rows // size, 2, size // 2, columns).transpose(1, 2).reshape(rows, columns)


def _facts(writer: Any, shape: Shape) -> None:
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    if shape.family == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(shape.head_size)
        writer.add_vocab_size(shape.vocabulary)
    # No text is computed, but llama.cpp loads no model without a tokenizer. Ċ is a new line, which it searches for.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["Ċ", *(f"t{i}" for i in range(1, shape.vocabulary))])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocabulary)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(shape.end)
    writer.add_eos_token_id(shape.end)
