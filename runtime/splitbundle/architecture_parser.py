"""Reading ``architecture.json`` strictly: types, closed sets of fields, and how fields fit each other."""

from __future__ import annotations

import re

from splitbundle import strict_json
from splitbundle.architecture import (
    ACTIVATIONS,
    FILE,
    MAX_LAYERS,
    MAX_SIZE,
    NORM_KINDS,
    PLACEMENTS,
    ROTARY_LAYOUTS,
    Architecture,
    Attention,
    Embedding,
    Head,
    LayerKind,
    Learned,
    Linear,
    Llama3,
    Mlp,
    Norm,
    Rotary,
    Scaling,
    Unpositioned,
    Unscaled,
)
from splitbundle.errors import quoted
from splitbundle.fields import Field, Problems
from splitbundle.version import ARCHITECTURE_VERSION

_KIND_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def parse(data: bytes) -> Architecture:
    """Reads ``architecture.json``.

    Raises:
        BundleError: every problem of the file.
    """
    problems = Problems(FILE)
    document = Field(strict_json.parse(data, FILE), problems)
    if isinstance(document.value, dict):
        version = document.value.get("version")
        if type(version) is int and version > ARCHITECTURE_VERSION:
            problems.add(
                "architecture.version",
                "/version",
                f"at most {ARCHITECTURE_VERSION}",
                quoted(version),
                "A newer splitbundle reads this bundle",
            )
            problems.raise_if_any()
    members = document.members(
        ["kind", "version", "vocab_size", "hidden_size", "embedding", "layer_kinds", "layers", "head"]
    )
    members["kind"].choice(["decoder"])
    members["version"].integer(1, ARCHITECTURE_VERSION)
    hidden_size = members["hidden_size"].integer(1, MAX_SIZE)
    embedding = _embedding(members["embedding"])
    kinds: dict[str, LayerKind] = {}
    for name, field in members["layer_kinds"].mapping():
        if not _KIND_NAME.fullmatch(name):
            field.problems.add("field.value", field.pointer, f"a name like {_KIND_NAME.pattern}", quoted(name))
        kinds[name] = _layer_kind(field)
    layers = members["layers"].items(minimum=1, maximum=MAX_LAYERS)
    architecture = Architecture(
        vocab_size=members["vocab_size"].integer(1, MAX_SIZE),
        hidden_size=hidden_size,
        embedding=embedding,
        layer_kinds=kinds,
        layers=tuple(layer.string() for layer in layers),
        head=_head(members["head"]),
    )
    problems.raise_if_any()
    _check_rules(architecture, problems)
    problems.raise_if_any()
    return architecture


def _embedding(field: Field) -> Embedding:
    members = field.members(["multiplier", "position"])
    return Embedding(
        multiplier=members["multiplier"].positive_number(), position=_embedding_position(members["position"])
    )


def _embedding_position(field: Field) -> Unpositioned | Learned:
    kind = _kind(field, ("none", "learned"))
    if kind == "learned":
        return Learned(count=field.members(["kind", "count"])["count"].integer(1, MAX_SIZE))
    if kind == "none":
        field.members(["kind"])
    return Unpositioned()


def _kind(field: Field, choices: tuple[str, ...]) -> str | None:
    """The ``kind`` of a tagged union, or None where it can't be told, which is noted here."""
    kind = field.members(["kind"], open=True)["kind"]
    chosen = kind.choice(choices)
    return chosen if chosen == kind.value else None


def _layer_kind(field: Field) -> LayerKind:
    members = field.members(["placement", "norm", "attention", "mlp"])
    return LayerKind(
        placement=members["placement"].choice(PLACEMENTS),
        norm=_norm(members["norm"]),
        attention=_attention(members["attention"]),
        mlp=_mlp(members["mlp"]),
    )


def _norm(field: Field) -> Norm:
    members = field.members(["kind", "eps", "weight_offset", "bias"])
    return Norm(
        kind=members["kind"].choice(NORM_KINDS),
        eps=members["eps"].positive_number(),
        weight_offset=members["weight_offset"].number((0.0, 1.0)),
        bias=members["bias"].boolean(),
    )


def _attention(field: Field) -> Attention:
    members = field.members(["heads", "kv_heads", "head_dim", "scale", "qkv_bias", "output_bias", "window", "position"])
    return Attention(
        heads=members["heads"].integer(1, MAX_SIZE),
        kv_heads=members["kv_heads"].integer(1, MAX_SIZE),
        head_dim=members["head_dim"].integer(1, MAX_SIZE),
        scale=members["scale"].positive_number(),
        qkv_bias=members["qkv_bias"].boolean(),
        output_bias=members["output_bias"].boolean(),
        window=None if members["window"].is_null else members["window"].integer(1, MAX_SIZE),
        position=_attention_position(members["position"]),
    )


def _attention_position(field: Field) -> Unpositioned | Rotary:
    kind = _kind(field, ("none", "rotary"))
    if kind == "rotary":
        members = field.members(["kind", "base", "dim", "layout", "scaling"])
        return Rotary(
            base=members["base"].positive_number(),
            dim=members["dim"].integer(2, MAX_SIZE),
            layout=members["layout"].choice(ROTARY_LAYOUTS),
            scaling=_scaling(members["scaling"]),
        )
    if kind == "none":
        field.members(["kind"])
    return Unpositioned()


def _scaling(field: Field) -> Scaling:
    kind = _kind(field, ("none", "linear", "llama3"))
    if kind == "linear":
        return Linear(factor=field.members(["kind", "factor"])["factor"].positive_number())
    if kind == "llama3":
        members = field.members(
            ["kind", "factor", "low_frequency_factor", "high_frequency_factor", "original_positions"]
        )
        return Llama3(
            factor=members["factor"].positive_number(),
            low_frequency_factor=members["low_frequency_factor"].positive_number(),
            high_frequency_factor=members["high_frequency_factor"].positive_number(),
            original_positions=members["original_positions"].integer(1, MAX_SIZE),
        )
    if kind == "none":
        field.members(["kind"])
    return Unscaled()


def _mlp(field: Field) -> Mlp:
    members = field.members(["gated", "activation", "intermediate_size", "bias"])
    return Mlp(
        gated=members["gated"].boolean(),
        activation=members["activation"].choice(ACTIVATIONS),
        intermediate_size=members["intermediate_size"].integer(1, MAX_SIZE),
        bias=members["bias"].boolean(),
    )


def _head(field: Field) -> Head:
    members = field.members(["norm", "tied"])
    return Head(norm=_norm(members["norm"]), tied=members["tied"].boolean())


def _check_rules(architecture: Architecture, problems: Problems) -> None:
    """What a schema can't say: how fields fit each other."""

    def add(pointer: str, expected: str, got: object) -> None:
        problems.add("architecture.rule", pointer, expected, quoted(got))

    known, used = tuple(architecture.layer_kinds), set(architecture.layers)
    for i, name in enumerate(architecture.layers):
        if name not in architecture.layer_kinds:
            add(f"/layers/{i}", f"a name in /layer_kinds ({', '.join(known)})", name)
    norms = [("/head/norm", architecture.head.norm)]
    for name, kind in architecture.layer_kinds.items():
        at = f"/layer_kinds/{name}"
        if name not in used:
            add(at, "a kind that some layer has", name)
        norms.append((f"{at}/norm", kind.norm))
        attention, position = kind.attention, kind.attention.position
        if attention.heads % attention.kv_heads:
            add(f"{at}/attention/kv_heads", f"a divisor of heads ({attention.heads})", attention.kv_heads)
        if isinstance(position, Rotary):
            if position.dim % 2 or position.dim > attention.head_dim:
                limit = attention.head_dim
                add(f"{at}/attention/position/dim", f"an even number up to head_dim ({limit})", position.dim)
            scaling = position.scaling
            if isinstance(scaling, Llama3) and not scaling.low_frequency_factor < scaling.high_frequency_factor:
                add(
                    f"{at}/attention/position/scaling/high_frequency_factor",
                    f"more than low_frequency_factor ({scaling.low_frequency_factor})",
                    scaling.high_frequency_factor,
                )
    for pointer, norm in norms:
        if norm.kind == "rms_norm" and norm.bias:
            add(f"{pointer}/bias", "false, as kind is rms_norm", norm.bias)
