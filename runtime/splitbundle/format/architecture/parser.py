"""Read ``architecture.json`` strictly: types, closed sets of fields, and rules between fields."""

from __future__ import annotations

import re

from splitbundle.errors import quoted
from splitbundle.format import strict_json
from splitbundle.format.architecture.attention import check_attention, parse_attention
from splitbundle.format.architecture.decoder import (
    FILE,
    Architecture,
    Embedding,
    Head,
    LayerKind,
    ResidualScale,
    ResidualScales,
)
from splitbundle.format.architecture.experts import Experts, check_experts, parse_experts
from splitbundle.format.architecture.feedforward import Mlp, parse_mlp
from splitbundle.format.architecture.norms import PLACEMENTS, check_norm, parse_norm, parse_optional_norm
from splitbundle.format.architecture.positions import Sinusoidal, parse_embedding_position
from splitbundle.format.architecture.sizes import MAX_LAYERS, MAX_SIZE
from splitbundle.format.fields import Field, Problems
from splitbundle.version import ARCHITECTURE_VERSION

NO_MLP = Mlp(gated=False, activation="relu", intermediate_size=1, bias=False)
"""What stands for a block of an unknown kind, whose problem was noted."""
_KIND_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def parse_architecture(data: bytes) -> Architecture:
    """Read ``architecture.json``.

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
        position=parse_embedding_position(members["position"]),
        norm=parse_optional_norm(members["norm"]),
    )


def _layer_kind(field: Field) -> LayerKind:
    members = field.members(["placement", "norm", "residual_multiplier", "attention", "mlp"], LayerKind.may_be_absent)
    return LayerKind(
        placement=members["placement"].choice(PLACEMENTS),
        norm=parse_norm(members["norm"]),
        residual_multiplier=members["residual_multiplier"].positive_number(),
        attention=parse_attention(members["attention"]),
        mlp=_mlp(members["mlp"]),
        residual_scales=_residual_scales(members["residual_scales"]) if "residual_scales" in members else None,
    )


def _residual_scales(field: Field) -> ResidualScales:
    members = field.members(["attention", "mlp"])
    return ResidualScales(attention=_residual_scale(members["attention"]), mlp=_residual_scale(members["mlp"]))


def _residual_scale(field: Field) -> ResidualScale:
    members = field.members(["kept", "added"])
    return ResidualScale(kept=members["kept"].positive_number(), added=members["added"].positive_number())


def _mlp(field: Field) -> Mlp | Experts:
    """Read a feed-forward block: a mixture of experts has a ``kind``, and a dense block has none."""
    if isinstance(field.value, dict) and "kind" in field.value:
        return parse_experts(field, MAX_SIZE) if field.kind(("experts",)) else NO_MLP
    return parse_mlp(field)


def _head(field: Field) -> Head:
    members = field.members(["norm", "tied", "bias", "multiplier", "logit_cap"])
    return Head(
        norm=parse_optional_norm(members["norm"]),
        tied=members["tied"].boolean(),
        bias=members["bias"].boolean(),
        multiplier=members["multiplier"].positive_number(),
        logit_cap=members["logit_cap"].optional_positive_number(),
    )


def _check_rules(architecture: Architecture, problems: Problems) -> None:
    """Check the rules between fields, which a schema can't express."""

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
        if isinstance(kind.mlp, Experts):
            check_experts(kind.mlp, f"{at}/mlp", add)
        if kind.residual_scales is not None and kind.placement in ("parallel", "parallel_two"):
            add(f"{at}/residual_scales", "no such field, as the layer has one sum", "an object")
        check_attention(attention, f"{at}/attention", add)
    for pointer, norm in norms:
        check_norm(norm, pointer, add)
