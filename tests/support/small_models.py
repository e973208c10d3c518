"""Every causal language model of the installed transformers, made small by the names of its configuration's fields.

This file doesn't know which families can be converted. It takes the default configuration of transformers' own class,
and reduces only widths, depths and counts. All other fields stay at their defaults.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

LAYERS: Final = 4
VOCAB: Final = 67
LARGEST: Final = 20_000_000
"""The largest number of parameters. A larger model would cost more time than it is worth."""

_NAMES: Final[dict[int, str]] = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size "
    "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab",
    64: "hidden_size d_model n_embd embedding_size word_embed_proj_dim attention_hidden_size embed_dim embedding_dim "
    "hidden_size_global lru_width emb_dim out_hidden_size output_embedding_size input_embedding_size o_lora_rank",
    48: "max_position_embeddings n_positions n_ctx max_seq_len",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff dim_ff dff ffn_hidden_size d_inner "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "expert_ffn_hidden_size mlp_dim feed_forward_size dense_intermediate_size moe_shared_expert_intermediate_size",
    LAYERS: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers depth "
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "swa_num_attention_heads linear_num_value_heads linear_num_key_heads linear_num_heads index_n_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num",
    16: "head_dim v_head_dim d_kv d_head dim_head linear_head_dim linear_key_head_dim linear_value_head_dim "
    "swa_head_dim global_head_dim kv_channels attention_head_size index_head_dim qk_nope_head_dim",
    8: "qk_rope_head_dim rotary_dim kv_lora_rank q_lora_rank state_size ssm_state_size mamba_d_state",
    5: "sliding_window attention_chunk_size window_size",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k",
    1: "topk_group n_group",
}
SMALL: Final = {name: value for value, names in _NAMES.items() for name in names.split()}
"""A field's name -> its largest value in a small model."""
_MORE: Final[dict[str, dict[str, Any]]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},  # one entry a layer, under another name
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": 8},  # follows from the other widths
    "mimo_v2_flash": {"head_dim": 24},  # a third of it is turned, in pairs
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},  # its class doesn't say it
    # These classes leave the width of a head to the configuration, and compute nothing without it.
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
}
"""Further fields that a few models need."""


def small_config(model_type: str) -> Any:
    """Return the default configuration of a model type, made small."""
    fields = _shrunk(AutoConfig.for_model(model_type)) | _MORE.get(model_type, {})
    return AutoConfig.for_model(model_type, **fields)


def small_model(model_type: str) -> Any:
    """Return a model of that configuration, in float32, with every initial weight replaced.

    Raises:
        Exception: of any kind, if transformers makes no model of the configuration.
        ValueError: if the model would be large.
    """
    config = small_config(model_type)
    with torch.device("meta"):  # check the sizes first, which costs nothing
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: more of its fields have to be cut down")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # without a seed, a model would depend on the process's earlier random numbers
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Much more, and where scores aren't scaled (Granite's default) float32 differs from float64 by 2e-5.
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def _shrunk(config: Any) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = _shrunk(value)
        elif type(value) is not int:
            continue
        elif name in SMALL:
            given[name] = min(value, SMALL[name])
        elif name.endswith("_token_id") and value >= VOCAB:
            given[name] = 3
    heads, kv_heads = vars(config).get("num_attention_heads"), vars(config).get("num_key_value_heads")
    if type(kv_heads) is int and kv_heads > 1:  # as many as queries, one, or fewer: as before
        given["num_key_value_heads"] = given["num_attention_heads"] // (1 if kv_heads == heads else 2)
    return given
