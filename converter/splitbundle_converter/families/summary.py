"""A readable table of the supported families, made from the default configuration of each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from splitbundle.format.architecture.decoder import Architecture, LayerKind
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.architecture.positions import Alibi, Learned, Sinusoidal
from splitbundle.format.architecture.rotary import Rotary, Unscaled
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.evidence import evidence
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.quiet_transformers import quiet

COLUMNS = ("model_type", "norm", "position", "attention", "mlp", "extras")


_GIVEN: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "head_dim": lambda values: values["hidden_size"] // values["num_attention_heads"] // 4 * 4,
    "moe_layers": lambda values: [],
    "n_routed_experts": lambda values: 8,
    "num_experts_per_tok": lambda values: 2,
    "num_key_value_heads": lambda values: values["num_attention_heads"],
}
"""A required field that a default configuration may lack -> a function that returns the value of a plain model."""


def rows() -> Iterator[dict[str, str]]:
    """Yield a row for each family, sorted by name, from the facts of its default configuration."""
    for name in sorted(FAMILIES):
        config, needs = default(name)
        row = {"model_type": name} | summary(FAMILIES[name].facts(config))
        if needs:  # the default configuration has values that this family can't convert
            row["extras"] = ", ".join(filter(None, [row["extras"], f"only with {' and '.join(needs)}"]))
        yield row


def details() -> Iterator[dict[str, Any]]:
    """Yield the rows with more details for programs: the default architecture and the known fields of each family."""
    for name, row in zip(sorted(FAMILIES), rows(), strict=True):
        config, needs = default(name)
        facts = FAMILIES[name].facts(config)
        known = sorted(config.read)
        yield row | {"only_with": needs, "fields": known, "default_architecture": facts.as_json()}


def default(name: str) -> tuple[ConfigReader, list[str]]:
    """Return a family's default configuration with missing fields filled in, and a description of these fields."""
    with quiet():  # some default configurations name ids that their own vocabulary lacks
        values = dict(evidence(name).defaults)
    config = ConfigReader(values, evidence(name), name)
    FAMILIES[name].facts(config)
    wanted = {(problem.pointer or "")[1:]: problem.expected for problem in config.problems}
    needs = [f"{field} {'given' if values.get(field) is None else expected}" for field, expected in wanted.items()]
    filled = values | {field: _GIVEN[field](values) for field in wanted if field in _GIVEN}
    return ConfigReader(filled, evidence(name), name), needs


def summary(facts: Architecture) -> dict[str, str]:
    """Return a few words for each column about an architecture."""
    kinds = list(facts.layer_kinds.values())
    return {
        "norm": _norm(facts, kinds[0]),
        "position": ", ".join(dict.fromkeys(_embedding_position(facts) or map(_position, kinds))),
        "attention": ", ".join(_attention(kinds)),
        "mlp": _mlp(kinds),
        "extras": ", ".join(_extras(facts, kinds)),
    }


def _mlp(kinds: list[LayerKind]) -> str:
    words = f"{'gated ' if kinds[0].mlp.gated else ''}{kinds[0].mlp.activation}"
    experts = next((kind.mlp for kind in kinds if isinstance(kind.mlp, Experts)), None)
    if experts is None:
        return words
    some = "" if all(isinstance(kind.mlp, Experts) for kind in kinds) else " on some layers"
    shared = "" if experts.shared is None else " and a shared block"
    return f"{words}, {experts.per_token} of {experts.count} experts{shared}{some}"


def markdown() -> str:
    """Return the table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows()]
    return "\n".join(lines)


def _norm(facts: Architecture, kind: LayerKind) -> str:
    norm = kind.norm
    details = [
        "1 + weight" if norm.weight_offset else "",
        "no weight" if not norm.affine else "",
        "no bias" if norm.kind == "layer_norm" and norm.affine and not norm.bias else "",
        kind.placement.replace("_", " ") if kind.placement != "pre" else "",
    ]
    return ", ".join([norm.kind, *filter(None, details)])


def _embedding_position(facts: Architecture) -> list[str]:
    position = facts.embedding.position
    if isinstance(position, Learned | Sinusoidal):
        return [position.kind + (f" + {position.offset}" if position.offset else "")]
    return []


def _position(kind: LayerKind) -> str:
    position = kind.attention.position
    if isinstance(position, Rotary):
        part = f" of {position.dim}/{kind.attention.head_dim}" if position.dim != kind.attention.head_dim else ""
        scaled = "" if isinstance(position.scaling, Unscaled) else f", {position.scaling.kind}"
        return f"rotary {position.layout}{part}{scaled}"
    return "ALiBi" if isinstance(position, Alibi) else "none"


def _attention(kinds: list[LayerKind]) -> Iterator[str]:
    attention = kinds[0].attention
    sharing = "MHA" if attention.heads == attention.kv_heads else "MQA" if attention.kv_heads == 1 else "GQA"
    output = {kind.attention.output_bias for kind in kinds}
    biases = ["q, k, v"] if attention.qkv_bias else []
    biases += [] if output == {False} else ["output"] if output == {True} else ["some layers' output"]
    yield sharing + (f" with {' and '.join(biases)} bias" if biases else "")
    norm = next(filter(None, (kind.attention.query_key_norm for kind in kinds)), None)
    if norm is not None:
        yield f"q/k norm by {norm.width}{' after rotation' if norm.after_rotation else ''}"
    windows = {kind.attention.window for kind in kinds}
    if windows != {None}:
        yield "windows" + (" on some layers" if len(windows) > 1 else "")
    if any(kind.attention.chunk is not None for kind in kinds):
        yield "chunks"
    for name, has in (
        ("clip", attention.clip is not None),
        ("cap", attention.logit_cap is not None),
        ("sinks", attention.sinks),
    ):
        if has:
            yield name


def _extras(facts: Architecture, kinds: list[LayerKind]) -> Iterator[str]:
    head, embedding, kind = facts.head, facts.embedding, kinds[0]
    for name, has in (
        ("tied", head.tied),
        ("head bias", head.bias),
        ("embedding ×", embedding.multiplier != 1.0),
        ("embedding norm", embedding.norm is not None),
        ("residual ×", kind.residual_multiplier != 1.0),
        ("logit ×", head.multiplier != 1.0),
        ("logit cap", head.logit_cap is not None),
        ("no last norm", head.norm is None),
        ("query temperature", any(each.attention.query_temperature is not None for each in kinds)),
    ):
        if has:
            yield name
