"""Fields that change no logits of a decoder, fields that mean another computation, and fields that repeat a fact."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from splitbundle.format.architecture.decoder import Architecture

_GENERATION: Final = frozenset(
    [
        *("bad_words_ids", "begin_suppress_tokens", "cache_implementation", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens"),
        *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores"),
        *("prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens"),
        *("temperature", "tokenizer_class", "top_k", "top_p", "typical_p", "use_cache"),
    ]
)
"""Fields that act while tokens are chosen. Versions 4 of transformers wrote them into every configuration."""
_OUTPUTS: Final = frozenset(
    [
        *("classifier_bias", "finetuning_task", "id2label", "keys_to_ignore_at_inference", "label2id"),
        *("loss_type", "num_labels", "_num_labels", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "problem_type", "return_dict", "summary_activation", "summary_proj_to_labels"),
        *("summary_type", "summary_use_proj", "task_specific_params", "token_classification_bias"),
    ]
)
"""Fields about outputs that a causal language model does not have, or that are not its logits."""
_MACHINERY: Final = frozenset(
    [
        *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_experts_implementation"),
        *("_name_or_path", "architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation"),
        *("gradient_checkpointing", "is_decoder", "model_type", "name_or_path", "tf_legacy_loss", "torch_dtype"),
        *("chunk_size_feed_forward", "cross_attention_hidden_size", "torchscript", "transformers_version"),
        *("use_bfloat16", "xla_device"),
    ]
)
"""Fields of all configurations about the loading and running of a model."""
_TRAINING: Final = re.compile(
    r"\w*(dropout|pdrop|layerdrop|dropout_prob)\w*|summary_first_dropout|init_std|initializer_\w+|router_aux_loss_coef"
)
"""Fields that act in training alone."""
_TOKEN_IDS: Final = re.compile(r"\w+_token_ids?")
"""Ids of single tokens. The padding token's row of the embedding gets no gradient, and is a row as any in a result."""

ROUTINE: Final = frozenset(
    [
        *("_commit_hash", "_name_or_path", "architectures", "dtype", "finetuning_task", "model_type"),
        *("torch_dtype", "transformers_version", "use_cache"),
    ]
)
"""Fields of nearly every configuration. A note that names them would tell nothing."""
_NEUTRAL: Final[Mapping[str, Callable[[Any], bool]]] = {
    "is_causal": lambda value: value is True,
    "layer_types": lambda value: isinstance(value, list) and all(kind == "full_attention" for kind in value),
}
"""A field that the code for all models reads -> whether a value is the one that the code uses without the field."""

QUANTIZED: Final = re.compile(r"quantization\w*|compression_config")
"""Fields that say that the weights are quantized."""
_OTHER: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), meaning)
    for pattern, meaning in (
        ("dual_chunk_attention_config", "attention that isn't cut into chunks for long texts"),
        ("rope_interleaved", "rotary positions that rotate the two halves of a head"),
        ("alibi|use_alibi", "no ALiBi"),
        (r"(attn|final)_logit_softcapping", "no cap on scores and logits"),
        ("add_cross_attention|is_encoder_decoder|tie_encoder_decoder", "a decoder without an encoder"),
        ("pruned_heads", "no heads that were removed"),
    )
)
"""The pattern of a field's name -> what a model without the field has. With a value, it is another computation."""

_REPEATED: Final[Mapping[str, tuple[str, Callable[[Architecture], int]]]] = {
    **dict.fromkeys(
        ["attention_head_dim", "kv_channels"], ("the size of a head", lambda facts: facts.kind_of(0).attention.head_dim)
    ),
    **dict.fromkeys(
        ["multi_query_group_num", "n_head_kv", "n_kv_heads", "num_kv_heads", "num_query_groups"],
        ("the number of key heads", lambda facts: facts.kind_of(0).attention.kv_heads),
    ),
    **dict.fromkeys(
        ["n_head", "n_heads", "num_heads"], ("the number of heads", lambda facts: facts.kind_of(0).attention.heads)
    ),
    **dict.fromkeys(["n_layer", "n_layers", "num_layers"], ("the number of layers", lambda facts: len(facts.layers))),
    **dict.fromkeys(["d_model", "n_embd"], ("the hidden size", lambda facts: facts.hidden_size)),
    **dict.fromkeys(
        ["ffn_dim", "ffn_hidden_size", "n_inner"],
        ("the width of the feed-forward block", lambda facts: facts.kind_of(0).mlp.intermediate_size),
    ),
}
"""Another framework's name of a field -> the fact that it repeats, and how to find it in the architecture."""


def is_inert(name: str) -> bool:
    """Return whether a field is known to act only in training, in generation, or on outputs that are not logits."""
    return (
        name in _GENERATION
        or name in _OUTPUTS
        or name in _MACHINERY
        or _TRAINING.fullmatch(name) is not None
        or _TOKEN_IDS.fullmatch(name) is not None
    )


def is_neutral(name: str, value: object) -> bool:
    """Return whether a field has the value that transformers uses where the field is absent."""
    return name in _NEUTRAL and _NEUTRAL[name](value)


def is_meaningful(value: object) -> bool:
    """Return whether a value is not null, false, zero or empty."""
    return value is not None and value not in ({}, [], "", 0)


def other_computation(name: str, value: object) -> str | None:
    """Return what a model without the field has, if the field with this value means another computation."""
    if not is_meaningful(value):
        return None
    return next((meaning for pattern, meaning in _OTHER if pattern.fullmatch(name)), None)


def repeated(name: str, architecture: Architecture) -> tuple[str, int] | None:
    """Return the words for the fact that a field repeats, and its value; or None if the field repeats no fact."""
    if name not in _REPEATED:
        return None
    words, value = _REPEATED[name]
    return words, value(architecture)
