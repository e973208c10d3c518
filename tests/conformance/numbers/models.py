"""The models whose numbers the kit has: for every fact with numbers at least one, past its threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Model:
    """A configuration of the tests' models, and the rules that its numbers hold."""

    configuration: str
    """Its name in ``tests/support/models.py``."""
    about: str
    rules: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    position: Mapping[str, float] = field(default_factory=dict)
    """Members of each layer's ``attention.position`` that replace the converter's, where both say the same."""
    more: tuple[dict[str, Any], ...] = ()
    """Calls that a reader must refuse, each with its code."""


def _refused(about: str, code: str, past: list[int], rows: list[list[int]], *before: list[int]) -> dict[str, Any]:
    """Return a case whose last call is refused by a code; ``before`` are rows of one call that comes first."""
    first = [{"past": [0] * len(before), "rows": list(before), "expect": {}}] if before else []
    return {"about": about, "cuts": [], "calls": [*first, {"past": past, "rows": rows, "expect": {"code": code}}]}


def _forgotten() -> dict[str, Any]:
    """Return a case whose last call goes on after positions that the call before it has discarded."""
    calls: list[dict[str, Any]] = [
        {"past": [0], "rows": [[1, 2, 3, 4, 5, 6]], "expect": {}},
        {"past": [2], "rows": [[7]], "expect": {}},
        {"past": [4], "rows": [[8]], "expect": {"code": "input.position"}},
    ]
    return {"about": "positions that a rollback discarded", "cuts": [], "calls": calls}


_COMMON = "SB-B-002", "SB-B-003", "SB-B-004", "SB-B-006", "SB-B-008", "SB-B-014", "SB-C-001"


def _model(configuration: str, about: str, *rules: str, **fields: Any) -> Model:
    return Model(configuration=configuration, about=about, rules=(*_COMMON, *rules), **fields)


_OUTSIDE = (
    _refused("a position that nobody computed", "input.position", [4], [[1, 2]], [1, 2, 3]),
    _refused("a position of padding", "input.position", [3, 2], [[1], [1]], [1, 2, 3], [1]),
    _forgotten(),
    _refused("an id that the vocabulary hasn't", "input.value", [0], [[1, 31]]),
    _refused("a negative id", "input.value", [0], [[-1]]),
)

MODELS: dict[str, Model] = {
    "learned": _model(
        "gpt2",
        "learned positions, layer norm, gelu_tanh, a tied head",
        *("SB-C-003", "SB-C-005", "SB-C-008", "SB-C-009", "SB-C-010", "SB-C-015", "SB-C-016", "SB-C-017", "SB-B-009"),
        more=_OUTSIDE,
    ),
    "learned-narrow": _model(
        "opt-post-narrow", "positions with an offset, a narrow token table, post norms, relu", "SB-C-003", "SB-C-004"
    ),
    "sinusoidal": _model("xglm-odd-unscaled", "sinusoidal positions, of an odd width", "SB-C-019"),
    "alibi": _model("bloom-six-heads", "ALiBi with heads that aren't a power of two, an embedding's norm", "SB-C-024"),
    "alibi-clipped": _model(
        "mpt-six-heads-clipped", "ALiBi without biases of linear layers, and clipping", "SB-C-020", "SB-C-024"
    ),
    "alibi-one-head": _model(
        "mpt",
        "ALiBi with a multiplier and another largest bias, which say the same of a single head as 1 and 8",
        "SB-C-024",
        changes={"n_heads": 1},
        position={"max_bias": 9.0, "multiplier": 2.0},
    ),
    "rotary-interleaved": _model(
        "gptj", "interleaved rotary positions of some channels, parallel", "SB-C-011", "SB-C-012"
    ),
    "parallel-two": _model("gpt_neox", "rotary positions of some channels, parallel with two norms", "SB-C-004"),
    "multiplied": _model("cohere-normed", "norms of queries and keys of each head, multiplied logits", "SB-C-021"),
    "capped": _model(
        "gemma2-capped-biased",
        "capped scores and logits, windows, sandwich, an offset of norms, linear scaling",
        *("SB-C-006", "SB-C-007", "SB-C-023", "SB-C-013"),
    ),
    "query-key-norm": _model("qwen3", "norms of queries and keys by head", "SB-C-021"),
    "query-key-norm-after": _model(
        "hunyuan_v1_dense", "norms of queries and keys with weights, after they are turned", "SB-C-021"
    ),
    "query-key-norm-full": _model("olmo2", "norms of whole queries and keys, norms of outputs", "SB-C-004", "SB-C-021"),
    "scaled": _model("granite-scaled-biased", "multipliers of embedding, residual, scores and logits", "SB-C-004"),
    "window": _model("mistral-window", "a window of five positions", "SB-C-009"),
    "scaling-linear": _model("llama-linear", "linear scaling", "SB-C-013"),
    "scaling-llama3": _model("llama-llama3", "llama3 scaling past its positions", "SB-C-014"),
    "scaling-yarn": _model("llama-yarn-mscale", "yarn scaling past its positions", "SB-C-027", "SB-C-030"),
    "scaling-dynamic": _model(
        "llama-dynamic",
        "dynamic scaling past its positions",
        *("SB-C-025", "SB-C-026", "SB-C-031"),
        more=(_refused("back across the threshold", "session.rollback", [5], [[1]], [*range(1, 16)]),),
    ),
    "scaling-longrope": _model("llama-longrope", "longrope past its positions", "SB-C-025", "SB-C-028", "SB-C-030"),
    "scaling-proportional": _model("llama-proportional", "proportional rotary positions", "SB-C-029"),
    "temperature": _model(
        "llama4_text-tuned-biased", "temperature of queries, chunks, norms after rotation", "SB-C-022", "SB-C-009"
    ),
    "temperature-yarn": _model("ministral3", "temperature of queries with yarn", "SB-C-022"),
    "sinks": _model("gpt_oss", "sinks, and experts with clamped gates, slopes and offsets", "SB-C-032", "SB-C-037"),
    "xielu": _model("apertus", "xIELU, norms of queries and keys", "SB-C-016"),
    "relu-squared": _model("nanochat", "relu squared, norms without weights, capped logits", "SB-C-016", "SB-C-017"),
    "clipped": _model("olmo-clipped-grouped", "clipped queries, keys and values, norms without weights", "SB-C-020"),
    "experts": _model("mixtral", "experts by softmax", "SB-C-033", "SB-C-034", "SB-C-035"),
    "experts-shared": _model("qwen2_moe", "a shared block with a gate", "SB-C-038"),
    "experts-groups": _model("glm4_moe", "groups, a correction of scores, a shared block", "SB-C-034", "SB-C-035"),
    "experts-input": _model(
        "llama4_text-experts", "weights that multiply an expert's input", "SB-C-037", changes={"moe_layers": [1]}
    ),
    "experts-sparsemixer": _model("phimoe", "sparsemixer", "SB-C-036"),
    "gates-of-heads": _model("laguna-heads", "a factor a head, capped logits of the router", "SB-C-039", "SB-C-033"),
    "gates-of-channels": _model("laguna-channels", "a factor a channel", "SB-C-039"),
    "narrow-values": _model("mimo_v2_flash", "values of fewer channels, sinks in some layers", "SB-C-040", "SB-C-041"),
    "scaled-sums": _model("beam", "factors of both sums", "SB-C-042"),
}
