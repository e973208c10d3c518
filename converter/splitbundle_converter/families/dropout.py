"""The rates of dropout in a source's configuration. ``spec/v1/decoder.md`` says what is dropped at each place.

A test trains each family's own class, and compares where it drops what with what a stage does.
"""

from __future__ import annotations

from typing import Any, Final

from splitbundle.format.manifest.document import DROPOUT

_ATTENTION: Final = ("", "attention_dropout", "", "")
_GPT: Final = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "resid_pdrop")
_FIELDS: Final[dict[str, tuple[str, str, str, str] | None]] = {
    "biogpt": ("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout_prob", "hidden_dropout_prob"),
    "bloom": ("", "attention_dropout", "hidden_dropout", "hidden_dropout"),
    "codegen": _GPT,
    "dbrx": ("", "attn_config.attn_pdrop", "resid_pdrop", "resid_pdrop"),
    "ernie4_5": ("", "", "", ""),
    "ernie4_5_moe": ("", "", "", ""),
    "falcon": None,  # it drops the sum of attention and feed-forward block in some shapes
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": ("embed_dropout", "attention_dropout", "resid_dropout", "resid_dropout"),
    "gpt_neox": ("hidden_dropout", "attention_dropout", "hidden_dropout", "hidden_dropout"),
    "gpt_neox_japanese": ("", "attention_dropout", "hidden_dropout", "hidden_dropout"),
    "gptj": _GPT,
    "mpt": ("", "attn_config.attn_pdrop", "attn_config.attn_pdrop", "attn_config.attn_pdrop"),
    "openai-gpt": _GPT,
    "opt": ("", "attention_dropout", "dropout", "dropout"),
    "persimmon": ("", "attention_dropout", "", "hidden_dropout"),
    "phi": ("embd_pdrop", "attention_dropout", "resid_pdrop", "resid_pdrop"),
    "phi3": ("", "attention_dropout", "resid_pdrop", "resid_pdrop"),
    "seed_oss": ("", "attention_dropout", "residual_dropout", "residual_dropout"),
    "stablelm": ("", "attention_dropout", "", "hidden_dropout"),
    "starcoder2": ("embedding_dropout", "attention_dropout", "residual_dropout", "residual_dropout"),
    "xglm": ("dropout", "attention_dropout", "dropout", "dropout"),
}
"""A family -> its fields, in the order of ``DROPOUT``, or None if a stage drops something else. Others have
``attention_dropout`` alone."""


def rates(model_type: str, values: dict[str, Any]) -> dict[str, float] | None:
    """Return the rate at each place, or None if they aren't known.

    Args:
        model_type: The family.
        values: The configuration, with the defaults of its class.
    """
    fields = _FIELDS.get(model_type, _ATTENTION)
    if fields is None:
        return None
    found = [_rate(values, field) if field else 0.0 for field in fields]
    if any(rate is None for rate in found):
        return None
    return {place: rate for place, rate in zip(DROPOUT, found, strict=True) if rate is not None}


def _rate(values: dict[str, Any], field: str) -> float | None:
    outer, _, name = field.rpartition(".")
    inside = values.get(outer) if outer else values
    rate = inside.get(name, 0.0) if isinstance(inside, dict) else 0.0
    number = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 <= rate < 1
    return float(rate) if number else None
