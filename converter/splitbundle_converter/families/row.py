"""What a row of the family table is, and how its tensors' names are written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import SourceName
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.facts import Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the table."""

    model_type: str
    facts: Callable[[ConfigReader], Architecture]
    names: Callable[[Architecture], tuple[SourceName, ...]]
    """Every tensor that some configuration has; those that an architecture doesn't imply don't apply to it."""
    prefix: str
    """What stands before the names of the base model, and is missing where the base model was saved alone."""
    layers: str
    """The module list of the layers, as ``names`` has it."""
    dropped: tuple[str, ...]
    """Tensors of old checkpoints that hold nothing that was learned."""
    constants: Mapping[str, float]
    """Tensors that hold one number, which the decoder takes for granted: dropped, if it is that one."""


@dataclass(frozen=True, slots=True)
class OneTensor:
    """A single canonical tensor, whose name in the source isn't that of its module's weight or bias."""

    name: str


Target = str | tuple[str, ...] | OneTensor | float | None
"""What a name of the source stands for:

- ``"head.norm"``: a module, that is a weight and a bias;
- ``("mlp.gate", "mlp.up")``: several modules, fused in this order;
- ``OneTensor("attention.output.bias")``: a tensor;
- ``0.5``: a tensor that holds this number, which the decoder takes for granted;
- ``None``: a tensor that holds nothing that was learned.
"""
Names = Mapping[str, Target]
"""A family's names, with ``{layer}`` for the number of each layer, and what they stand for."""
QUERY_KEY_VALUE: Final = ("attention.query", "attention.key", "attention.value")


def in_layers(modules: str, *parts: Names) -> Names:
    """The names inside of the layers, whose list is ``modules``; ``parts`` have them as they are inside of a layer."""
    return {f"{modules}.{{layer}}.{source}": _in_layer(target) for part in parts for source, target in part.items()}


def q_k_v(module: str) -> Names:
    """Queries, keys and values under the names that most families have for them."""
    return {f"{module}.{part}_proj": name for part, name in zip("qkv", QUERY_KEY_VALUE, strict=True)}


def renamed(names: Names, modules: Names) -> Names:
    """The same names but for ``modules`` inside of a layer: what these stand for has no other name."""
    new = in_layers(layers_of(names), modules)
    gone = {part for target in new.values() for part in _parts(target)}
    return {source: target for source, target in names.items() if gone.isdisjoint(_parts(target))} | {**new}


def layers_of(names: Names) -> str:
    """The module list of the layers."""
    return next(source.partition(".{layer}")[0] for source in names if "{layer}" in source)


def _in_layer(target: Target) -> Target:
    if isinstance(target, str):
        return f"layers.{{layer}}.{target}"
    if isinstance(target, tuple):
        return tuple(f"layers.{{layer}}.{part}" for part in target)
    return OneTensor(f"layers.{{layer}}.{target.name}") if isinstance(target, OneTensor) else target


def _parts(target: Target) -> tuple[str, ...]:
    """The canonical modules that a name of the source stands for."""
    return (target,) if isinstance(target, str) else target if isinstance(target, tuple) else ()


def row(
    model_type: str,
    names: Names,
    facts: Facts | Callable[[ConfigReader], Architecture],
    *,
    fused_by_key_head: bool = False,
    fused_groups: int = 1,
    transposed: Collection[str] = (),
    names_of: Callable[[Architecture], Names] | None = None,
    **changes: Any,
) -> Family:
    """A row of the table.

    Args:
        model_type: of the configuration.
        names: of the tensors.
        facts: of the configuration, or a function of it where they aren't enough.
        fused_by_key_head: whether fused modules keep each key head's queries, keys and values together.
        fused_groups: in how many groups fused modules keep their rows otherwise; see ``SourceName``.
        transposed: the modules of a layer whose weight is kept as [in, out].
        names_of: the names that an architecture has, where they vary; ``names`` are then those of one of them.
        changes: to the facts, as ``Facts.replace`` takes them.
    """
    if isinstance(facts, Facts):
        facts = facts.replace(**changes)
    elif changes:
        raise TypeError(
            f"{model_type}: a function of the configuration takes no changes, but {', '.join(changes)} came"
        )
    layers = layers_of(names)
    turned = frozenset(f"{layers}.{{layer}}.{module}.weight" for module in transposed)

    def table(architecture: Architecture) -> Iterator[SourceName]:
        fused = architecture.kind_of(0).attention.kv_heads if fused_by_key_head else fused_groups
        own = names_of(architecture) if names_of else names
        alone = {(target.name,) for target in own.values() if isinstance(target, OneTensor)}
        for source, target in own.items():
            if isinstance(target, OneTensor):
                yield SourceName(source=source, tensors=(target.name,), groups=1, transposed=False)
            parts = _parts(target)
            for kind in ("weight", "bias") if parts else ():
                tensors = tuple(f"{part}.{kind}" for part in parts)
                if tensors not in alone:
                    yield SourceName(
                        source=f"{source}.{kind}",
                        tensors=tensors,
                        groups=fused if len(parts) > 1 else 1,
                        transposed=f"{source}.{kind}" in turned,
                    )

    return Family(
        model_type=model_type,
        facts=facts,
        names=lambda architecture: tuple(table(architecture)),
        prefix=f"{layers.partition('.')[0]}.",
        layers=layers,
        dropped=tuple(source for source, target in names.items() if target is None),
        constants={source: target for source, target in names.items() if isinstance(target, float)},
    )
