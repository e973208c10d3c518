"""Variants of an architecture: together they have every value of every field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.architecture import norms, rotary
from splitbundle.format.architecture.parser import parse_architecture
from tests.support.paths import TESTS

BASES = TESTS / "conformance" / "bases"
Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]
"""Change a document into a variant. The arguments are the whole, and its layer kinds ``full`` and ``sliding``."""


def norm(kind: str = "rms_norm", *, affine: bool = True, offset: float = 0.0, bias: bool = False) -> dict[str, Any]:
    return {"kind": kind, "eps": 0.01, "affine": affine, "weight_offset": offset, "bias": bias}


LAYER_NORM = norm("layer_norm", bias=True)
LENGTH = 12
THRESHOLD = 8
"""The position at which a variant's scaling begins. It lies within the tokens that are run."""


def offsets(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    """Fields that neither base uses: linear scaling, an offset, biases of a gated MLP, a window without rotation."""
    full["norm"] = norm("layer_norm", offset=1.0, bias=True)
    full["attention"] |= {"kv_heads": 1, "output_bias": True, "qkv_bias": False, "scale": 0.2}
    full["attention"]["position"] |= {"base": 10000.0, "dim": 8, "scaling": {"kind": "linear", "factor": 4.0}}
    full["mlp"] |= {"bias": True, "activation": "gelu"}
    sliding["norm"]["weight_offset"] = 1.0
    sliding["attention"] |= {"window": 3, "position": {"kind": "none"}}
    sliding["mlp"] |= {"gated": False, "activation": "relu"}
    whole["embedding"]["multiplier"] = 4.898979485566356
    whole["head"] |= {"norm": norm("layer_norm", offset=1.0, bias=True), "tied": True}


def placement(name: str) -> Change:
    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        full |= {"placement": name, "norm": LAYER_NORM, "residual_multiplier": 0.7}
        sliding |= {"placement": name, "norm": norm(offset=1.0)}

    return change


def unweighted(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full |= {"placement": "sandwich", "norm": norm("layer_norm", affine=False)}
    sliding["norm"] = whole["head"]["norm"] = norm(affine=False)


def query_key_norm(width: str, after: bool) -> Change:
    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        for kind, its in ((full, LAYER_NORM), (sliding, norm(offset=1.0))):
            kind["attention"]["query_key_norm"] = {"norm": its, "width": width, "after_rotation": after}
            kind["attention"]["position"] |= {"base": 50.0, "dim": 8}  # rotated far enough to tell before from after

    return change


def unweighted_query_key_norm(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    for kind, its in ((full, norm(affine=False)), (sliding, norm("layer_norm", affine=False))):
        kind["attention"]["query_key_norm"] = {"norm": its, "width": "head", "after_rotation": True}


def alibi(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"heads": 6, "kv_heads": 3, "position": {"kind": "alibi", "max_bias": 6.0, "multiplier": 0.5}}
    sliding["attention"] |= {"window": 4, "position": {"kind": "alibi", "max_bias": 8.0, "multiplier": 1.0}}


def sinusoidal(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    whole["hidden_size"] = whole["embedding"]["token_size"] = 25  # odd: a zero stands at the end
    whole["embedding"] |= {"position": {"kind": "sinusoidal", "offset": 2}, "multiplier": 2.0}


def embedding(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    position = {"kind": "learned", "count": LENGTH, "offset": 2}
    whole["embedding"] = {"token_size": 10, "multiplier": 3.0, "position": position, "norm": LAYER_NORM}
    whole["head"] |= {"bias": True}


def head(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    whole["embedding"] |= {"token_size": 30, "multiplier": 2.0}
    whole["head"] = {"norm": None, "tied": True, "bias": True, "multiplier": 0.5, "logit_cap": 1.5}


def scores(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"logit_cap": 0.7}
    full["attention"]["query_temperature"] = {"beta": 0.5, "original_positions": 3, "offset": 0}
    sliding["attention"] |= {"window": 4, "logit_cap": 1.3, "position": {"kind": "none"}}


def sinks(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"sinks": True, "chunk": 5}
    sliding["attention"] |= {"sinks": True, "logit_cap": 0.7, "window": 4}


def chunks(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"heads": 6, "kv_heads": 3, "chunk": 4}
    full["attention"]["query_temperature"] = {"beta": 0.5, "original_positions": 3, "offset": 1}
    sliding["attention"] |= {
        "window": None,
        "chunk": 3,
        "position": {"kind": "alibi", "max_bias": 8.0, "multiplier": 1.0},
    }


def clip(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    for kind, width in ((full, "full"), (sliding, "head")):
        its = {"norm": norm(), "width": width, "after_rotation": False}
        kind["attention"] |= {"clip": 0.6, "query_key_norm": its}


def activations(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["mlp"]["activation"] = "xielu"
    sliding["mlp"] |= {"activation": "relu_squared", "gated": False}


def ungated_xielu(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["mlp"] |= {"activation": "xielu", "gated": False, "bias": True}


PLAIN_ROUTER: dict[str, Any] = {
    "function": "softmax",
    "bias": False,
    "logit_cap": None,
    "correction": None,
    "groups": None,
    "normalised": False,
    "epsilon": 0,
    "scale": 1.0,
    "weighs": "output",
}
PLAIN_EXPERTS: dict[str, Any] = {
    "kind": "experts",
    "count": 8,
    "per_token": 3,
    "gated": True,
    "activation": "silu",
    "intermediate_size": 10,
    "bias": False,
    "clamp": None,
    "gate_slope": 1.0,
    "up_offset": 0,
    "router": PLAIN_ROUTER,
    "shared": None,
}
"""A mixture of experts without options."""


def experts(router: dict[str, Any] | None = None, **block: Any) -> Change:
    """Experts in the layers of one kind; the others stay dense."""

    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        full["mlp"] = PLAIN_EXPERTS | {"router": PLAIN_ROUTER | (router or {})} | block

    return change


def gates(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    """Gates of both widths, and values that are narrower or wider than keys."""
    full["attention"] |= {"output_gate": {"width": "channel", "function": "sigmoid", "bias": True}, "value_dim": 5}
    sliding["attention"] |= {"output_gate": {"width": "head", "function": "softplus", "bias": False}}
    sliding["attention"] |= {"value_dim": 11, "value_multiplier": 0.6, "sinks": True, "clip": 0.9}


def residual_scales(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["residual_scales"] = {"attention": {"kept": 0.7, "added": 1.2}, "mlp": {"kept": 1.3, "added": 0.4}}
    full |= {"placement": "sandwich", "residual_multiplier": 0.8}
    full["attention"]["query_temperature"] = {"beta": 0.6, "original_positions": 5, "offset": 1, "growth": "power"}
    full["attention"]["output_gate"] = {"width": "head", "function": "sigmoid", "bias": True}
    sliding |= {"placement": "post", "residual_scales": full["residual_scales"]}
    sliding["attention"]["position"] |= {"base": 50.0, "direction": "backward"}


GROUPS = {"count": 4, "kept": 2, "score": "top_two"}
SHARED = {"intermediate_size": 9, "gate": True, "average": True}


def scaling(layout: str, **of_full: Any) -> Change:
    """Layers of both kinds rotate channels by one scaling; layers of the kind ``full`` rotate all of them."""

    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        longer = {key: [*value, 7.5] if isinstance(value, list) else value for key, value in of_full.items()}
        full["attention"]["position"] |= {"base": 100.0, "dim": 8, "layout": layout, "scaling": longer}
        sliding["attention"]["position"] |= {"base": 1000.0, "layout": layout, "scaling": of_full}

    return change


YARN = {
    "kind": "yarn",
    "factor": 4.0,
    "original_positions": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": True,
    "attention_factor": 1.2,
}
VARIANTS: dict[str, Change] = {
    "offsets": offsets,
    **{f"placement {name}": placement(name) for name in norms.PLACEMENTS},
    "norms without weights": unweighted,
    "query and key norms: head": query_key_norm("head", after=False),
    "query and key norms: head, after": query_key_norm("head", after=True),
    "query and key norms: heads": query_key_norm("heads", after=False),
    "query and key norms: heads, after": query_key_norm("heads", after=True),
    "query and key norms: full": query_key_norm("full", after=False),
    "query and key norms without weights": unweighted_query_key_norm,
    "alibi": alibi,
    "sinusoidal": sinusoidal,
    "embedding": embedding,
    "head": head,
    "scores": scores,
    "sinks": sinks,
    "chunks": chunks,
    "clip": clip,
    "activations": activations,
    "xielu without a gate": ungated_xielu,
    "interleaved": scaling("interleaved", kind="none"),
    "dynamic": scaling("half", kind="dynamic", factor=4.0, original_positions=THRESHOLD),
    "longrope": scaling(
        "half",
        kind="longrope",
        original_positions=THRESHOLD,
        short_factors=[1.0, 1.5, 2.0],
        long_factors=[1.2, 4.0, 9.0],
        attention_factor=1.3,
    ),
    "yarn": scaling("interleaved", **YARN),
    "yarn with parts of pairs": scaling("half", **(YARN | {"truncate": False})),
    "yarn without a ramp": scaling("half", **(YARN | {"original_positions": 1})),
    "proportional": scaling("half", kind="proportional", factor=2.0, pairs=2),
    "gates": gates,
    "residual scales": residual_scales,
    "experts": experts(),
    "experts with every option": experts(
        {"function": "sigmoid", "bias": True, "logit_cap": 2.0, "correction": "score", "groups": GROUPS}
        | {"normalised": True, "epsilon": 0.3, "scale": 2.5},
        bias=True,
        clamp=0.8,
        gate_slope=1.702,
        up_offset=1,
        shared=SHARED,
    ),
    "experts with corrected logits and weighed inputs": experts(
        {"correction": "logit", "groups": GROUPS | {"score": "max"}, "weighs": "input", "scale": 0.7},
        activation="gelu",
        shared=SHARED | {"gate": False, "average": False},
    ),
    "experts without gates": experts(gated=False, activation="relu_squared", clamp=0.5, per_token=1),
    "all experts": experts({"normalised": True}, per_token=8, shared=SHARED | {"average": False}),
    "sparsemixer": experts({"function": "sparsemixer", "epsilon": 0.2}, per_token=2),
}


def facts(name: str) -> architectures.Architecture:
    """Return a base or a variant."""
    base = "llama3" if name in VARIANTS else name
    value = json.loads((BASES / f"{base}.architecture.json").read_text("utf-8"))
    if name in VARIANTS:
        VARIANTS[name](value, value["layer_kinds"]["full"], value["layer_kinds"]["sliding"])
    return parse_architecture(json.dumps(value).encode("ascii"))


LONG_FACTORS = tuple(1.0 + i / 2 for i in range(64))
SCALED: dict[str, rotary.Scaling] = {
    "none": rotary.Unscaled(),
    "linear": rotary.Linear(factor=4.0),
    "llama3": rotary.Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192),
    "dynamic": rotary.Dynamic(factor=2.0, original_positions=8192),
    "yarn": rotary.Yarn(
        factor=4.0,
        original_positions=8192,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        attention_factor=1.1386294361119891,
    ),
    "longrope": rotary.LongRope(
        original_positions=8192, short_factors=(1.0,) * 64, long_factors=LONG_FACTORS, attention_factor=1.19
    ),
    "proportional": rotary.Proportional(factor=8.0, pairs=16),
}
