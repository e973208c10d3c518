"""Reading ``architecture.json`` strictly: types, closed sets of fields, and how fields fit each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from splitbundle.errors import quoted
from splitbundle.format import strict_json
from splitbundle.format.architecture.decoder import (
    ACTIVATIONS,
    FILE,
    MAX_LAYERS,
    MAX_SIZE,
    NORM_KINDS,
    PLACEMENTS,
    QUERY_KEY_WIDTHS,
    ROTARY_LAYOUTS,
    SCALINGS,
    Alibi,
    Architecture,
    Attention,
    Dynamic,
    Embedding,
    Head,
    LayerKind,
    Learned,
    Llama3,
    LongRope,
    Mlp,
    Norm,
    Proportional,
    QueryKeyNorm,
    QueryTemperature,
    Rotary,
    Scaling,
    Sinusoidal,
    Unpositioned,
    Unscaled,
    Yarn,
)
from splitbundle.format.fields import Field, Problems
from splitbundle.records import types
from splitbundle.version import ARCHITECTURE_VERSION

_KIND_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def parse_architecture(data: bytes) -> Architecture:
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
    members = field.members(["token_size", "multiplier", "position", "norm"])
    return Embedding(
        token_size=members["token_size"].integer(1, MAX_SIZE),
        multiplier=members["multiplier"].positive_number(),
        position=_embedding_position(members["position"]),
        norm=_optional_norm(members["norm"]),
    )


def _embedding_position(field: Field) -> Unpositioned | Learned | Sinusoidal:
    kind = _kind(field, ("none", "learned", "sinusoidal"))
    if kind == "learned":
        members = field.members(["kind", "count", "offset"])
        return Learned(count=members["count"].integer(1, MAX_SIZE), offset=members["offset"].integer(0, MAX_SIZE))
    if kind == "sinusoidal":
        return Sinusoidal(offset=field.members(["kind", "offset"])["offset"].integer(0, MAX_SIZE))
    if kind == "none":
        field.members(["kind"])
    return Unpositioned()


def _kind(field: Field, choices: tuple[str, ...]) -> str | None:
    """The ``kind`` of a tagged union, or None where it can't be told, which is noted here."""
    kind = field.members(["kind"], open=True)["kind"]
    chosen = kind.choice(choices)
    return chosen if chosen == kind.value else None


def _layer_kind(field: Field) -> LayerKind:
    members = field.members(["placement", "norm", "residual_multiplier", "attention", "mlp"])
    return LayerKind(
        placement=members["placement"].choice(PLACEMENTS),
        norm=_norm(members["norm"]),
        residual_multiplier=members["residual_multiplier"].positive_number(),
        attention=_attention(members["attention"]),
        mlp=_mlp(members["mlp"]),
    )


def _norm(field: Field) -> Norm:
    members = field.members(["kind", "eps", "affine", "weight_offset", "bias"])
    return Norm(
        kind=members["kind"].choice(NORM_KINDS),
        eps=members["eps"].positive_number(),
        affine=members["affine"].boolean(),
        weight_offset=members["weight_offset"].number((0.0, 1.0)),
        bias=members["bias"].boolean(),
    )


def _optional_norm(field: Field) -> Norm | None:
    return None if field.is_null else _norm(field)


def _optional_number(field: Field) -> float | None:
    return None if field.is_null else field.positive_number()


def _optional_integer(field: Field) -> int | None:
    return None if field.is_null else field.integer(1, MAX_SIZE)


def _attention(field: Field) -> Attention:
    members = field.members(types(Attention))
    temperature = members["query_temperature"]
    return Attention(
        heads=members["heads"].integer(1, MAX_SIZE),
        kv_heads=members["kv_heads"].integer(1, MAX_SIZE),
        head_dim=members["head_dim"].integer(1, MAX_SIZE),
        scale=members["scale"].positive_number(),
        qkv_bias=members["qkv_bias"].boolean(),
        output_bias=members["output_bias"].boolean(),
        clip=_optional_number(members["clip"]),
        query_key_norm=None if members["query_key_norm"].is_null else _query_key_norm(members["query_key_norm"]),
        query_temperature=None if temperature.is_null else _query_temperature(temperature),
        logit_cap=_optional_number(members["logit_cap"]),
        window=_optional_integer(members["window"]),
        chunk=_optional_integer(members["chunk"]),
        sinks=members["sinks"].boolean(),
        position=_attention_position(members["position"]),
    )


def _query_key_norm(field: Field) -> QueryKeyNorm:
    members = field.members(["norm", "width", "after_rotation"])
    return QueryKeyNorm(
        norm=_norm(members["norm"]),
        width=members["width"].choice(QUERY_KEY_WIDTHS),
        after_rotation=members["after_rotation"].boolean(),
    )


def _query_temperature(field: Field) -> QueryTemperature:
    members = field.members(["beta", "original_positions", "offset"])
    return QueryTemperature(
        beta=members["beta"].positive_number(),
        original_positions=members["original_positions"].integer(1, MAX_SIZE),
        offset=members["offset"].integer(0, MAX_SIZE),
    )


def _attention_position(field: Field) -> Unpositioned | Rotary | Alibi:
    kind = _kind(field, ("none", "rotary", "alibi"))
    if kind == "rotary":
        members = field.members(["kind", "base", "dim", "layout", "scaling"])
        return Rotary(
            base=members["base"].positive_number(),
            dim=members["dim"].integer(2, MAX_SIZE),
            layout=members["layout"].choice(ROTARY_LAYOUTS),
            scaling=_scaling(members["scaling"]),
        )
    if kind == "alibi":
        members = field.members(["kind", "max_bias", "multiplier"])
        return Alibi(max_bias=members["max_bias"].positive_number(), multiplier=members["multiplier"].positive_number())
    if kind == "none":
        field.members(["kind"])
    return Unpositioned()


def _scaling(field: Field) -> Scaling:
    """The members of a scaling have the types of its record's fields."""
    kind = _kind(field, tuple(SCALINGS))
    if kind is None:
        return Unscaled()
    record = SCALINGS[kind]
    members = field.members(types(record))
    values: dict[str, Any] = {}
    for name, written in types(record).items():
        item = members[name]
        if written == "float":
            values[name] = item.positive_number()
        elif written == "int":
            values[name] = item.integer(1, MAX_SIZE)
        elif written == "bool":
            values[name] = item.boolean()
        elif written == "tuple[float, ...]":
            values[name] = tuple(each.positive_number() for each in item.items(minimum=1))
    scaling: Scaling = record(**values)
    return scaling


def _mlp(field: Field) -> Mlp:
    members = field.members(["gated", "activation", "intermediate_size", "bias"])
    return Mlp(
        gated=members["gated"].boolean(),
        activation=members["activation"].choice(ACTIVATIONS),
        intermediate_size=members["intermediate_size"].integer(1, MAX_SIZE),
        bias=members["bias"].boolean(),
    )


def _head(field: Field) -> Head:
    members = field.members(["norm", "tied", "bias", "multiplier", "logit_cap"])
    return Head(
        norm=_optional_norm(members["norm"]),
        tied=members["tied"].boolean(),
        bias=members["bias"].boolean(),
        multiplier=members["multiplier"].positive_number(),
        logit_cap=_optional_number(members["logit_cap"]),
    )


def _check_rules(architecture: Architecture, problems: Problems) -> None:
    """What a schema can't say: how fields fit each other."""

    def add(pointer: str, expected: str, got: object) -> None:
        problems.add("architecture.rule", pointer, expected, quoted(got))

    known, used = tuple(architecture.layer_kinds), set(architecture.layers)
    for i, name in enumerate(architecture.layers):
        if name not in architecture.layer_kinds:
            add(f"/layers/{i}", f"a name in /layer_kinds ({', '.join(known)})", name)
    if isinstance(architecture.embedding.position, Sinusoidal) and architecture.hidden_size < 4:
        add("/hidden_size", "at least 4, as positions are sinusoidal", architecture.hidden_size)
    norms = [("/head/norm", architecture.head.norm), ("/embedding/norm", architecture.embedding.norm)]
    for name, kind in architecture.layer_kinds.items():
        at = f"/layer_kinds/{name}"
        if name not in used:
            add(at, "a kind that some layer has", name)
        attention = kind.attention
        norms.append((f"{at}/norm", kind.norm))
        if attention.query_key_norm is not None:
            norms.append((f"{at}/attention/query_key_norm/norm", attention.query_key_norm.norm))
            if attention.query_key_norm.width == "full" and attention.query_key_norm.after_rotation:
                add(f"{at}/attention/query_key_norm/after_rotation", "false, as width is full", True)
        if isinstance(attention.position, Alibi) and attention.logit_cap is not None:
            add(f"{at}/attention/logit_cap", "null, as position is alibi", attention.logit_cap)
        if isinstance(attention.position, Alibi) and attention.sinks:
            add(f"{at}/attention/sinks", "false, as position is alibi", attention.sinks)
        if attention.window is not None and attention.chunk is not None:
            add(f"{at}/attention/chunk", "null, as there is a window", attention.chunk)
        if attention.heads % attention.kv_heads:
            add(f"{at}/attention/kv_heads", f"a divisor of heads ({attention.heads})", attention.kv_heads)
        if isinstance(attention.position, Rotary):
            _check_rotary(attention.position, attention.head_dim, f"{at}/attention/position", add)
    for pointer, norm in norms:
        if norm is not None and norm.kind == "rms_norm" and norm.bias:
            add(f"{pointer}/bias", "false, as kind is rms_norm", norm.bias)
        if norm is not None and not norm.affine and (norm.bias or norm.weight_offset):
            add(f"{pointer}/affine", "true, as there is a bias or an offset", norm.affine)


def _check_rotary(rotary: Rotary, head_dim: int, at: str, add: Callable[[str, str, object], None]) -> None:
    scaling = rotary.scaling
    if rotary.dim % 2 or rotary.dim > head_dim:
        add(f"{at}/dim", f"an even number up to head_dim ({head_dim})", rotary.dim)
    if isinstance(scaling, Llama3) and not scaling.low_frequency_factor < scaling.high_frequency_factor:
        expected = f"more than low_frequency_factor ({scaling.low_frequency_factor})"
        add(f"{at}/scaling/high_frequency_factor", expected, scaling.high_frequency_factor)
    if isinstance(scaling, Yarn) and not rotary.base > 1:
        add(f"{at}/base", "more than 1, as scaling is yarn", rotary.base)
    if isinstance(scaling, Yarn) and not scaling.beta_slow < scaling.beta_fast:
        add(f"{at}/scaling/beta_fast", f"more than beta_slow ({scaling.beta_slow})", scaling.beta_fast)
    if isinstance(scaling, Dynamic) and rotary.dim < 4:
        add(f"{at}/dim", "at least 4, as scaling is dynamic", rotary.dim)
    if isinstance(scaling, Proportional) and scaling.pairs > rotary.dim // 2:
        add(f"{at}/scaling/pairs", f"at most dim / 2 ({rotary.dim // 2})", scaling.pairs)
    if isinstance(scaling, LongRope):
        for name in ("short_factors", "long_factors"):
            factors = getattr(scaling, name)
            if len(factors) != rotary.dim // 2:
                add(f"{at}/scaling/{name}", f"dim / 2 ({rotary.dim // 2}) numbers", f"{len(factors)} numbers")
