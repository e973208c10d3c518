"""A row of the family table, and the notation for its tensor names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.manifest.document import SourceName
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.facts import Facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the family table."""

    model_type: str
    facts: Callable[[ConfigReader], Architecture]
    names: Callable[[Architecture], tuple[SourceName, ...]]
    """Returns the names of all tensors that a configuration may have. An architecture may lack some of them."""
    prefix: str
    """The prefix of the base model's tensor names. It is absent if the base model was saved alone."""
    layers: str
    """The name of the module list that has the layers, as in ``names``."""
    modules: str
    """The same in the class of transformers, whose names may differ from those of the tensors."""
    dropped: tuple[str, ...]
    """Names of tensors in old checkpoints that have no learned values."""
    further: tuple[str, ...]
    """The beginnings of the names of layers that predict further tokens, which no call of the model uses."""
    constants: Mapping[str, float]
    """The name of a tensor with one number -> the number that the decoder uses. An equal tensor is dropped."""


@dataclass(frozen=True, slots=True)
class OneTensor:
    """A single canonical tensor. Its source name isn't the name of a module with ``.weight`` or ``.bias`` added."""

    name: str
    one_row: bool = False
    """Whether it is stored as one row: as [1, experts] in place of [experts]."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """A single tensor of all experts. Its source name isn't the name of a module either."""

    tensors: tuple[str, ...]
    transposed: bool = False
    """Whether each expert's matrix is stored as [in, out]."""
    interleaved: bool = False
    """Whether the rows of the tensors take turns."""
    merged: bool = False
    """Whether the first two dimensions are stored as one: the rows of all experts."""


Target = str | tuple[str, ...] | OneTensor | Stacked | float | None
"""The canonical meaning of a source name:

- ``"head.norm"``: a module, with a weight and a bias;
- ``("mlp.gate", "mlp.up")``: several modules, fused in this order;
- ``OneTensor("attention.output.bias")``: a single tensor;
- ``Stacked(("mlp.experts.gate.weight", "mlp.experts.up.weight"))``: tensors of all experts, joined expert by expert;
- ``0.5``: a tensor with this number, which the decoder uses as a constant;
- ``None``: a tensor without learned values.
"""
Names = Mapping[str, Target]
"""A source name of the family, with ``{layer}`` in place of a layer's number -> its canonical meaning."""
QUERY_KEY_VALUE: Final = ("attention.query", "attention.key", "attention.value")


def in_layers(modules: str, *parts: Names) -> Names:
    """Return the names of modules in layers. ``parts`` have the names within one layer of the list ``modules``."""
    return {f"{modules}.{{layer}}.{source}": _in_layer(target) for part in parts for source, target in part.items()}


def q_k_v(module: str) -> Names:
    """Return the names of the query, key and value projections that most families use."""
    return {f"{module}.{part}_proj": name for part, name in zip("qkv", QUERY_KEY_VALUE, strict=True)}


def renamed(names: Names, modules: Names) -> Names:
    """Return the names with ``modules`` changed within a layer. The old names of the same targets are removed."""
    new = in_layers(layers_of(names), modules)
    gone = {part for target in new.values() for part in _targets(target)}
    return {source: target for source, target in names.items() if gone.isdisjoint(_targets(target))} | {**new}


def layers_of(names: Names) -> str:
    """Return the name of the module list that has the layers."""
    return next(source.partition(".{layer}")[0] for source in names if "{layer}" in source)


def _in_layer(target: Target) -> Target:
    if isinstance(target, str):
        return f"layers.{{layer}}.{target}"
    if isinstance(target, tuple):
        return tuple(f"layers.{{layer}}.{part}" for part in target)
    if isinstance(target, Stacked):
        return replace(target, tensors=tuple(f"layers.{{layer}}.{name}" for name in target.tensors))
    return replace(target, name=f"layers.{{layer}}.{target.name}") if isinstance(target, OneTensor) else target


def _expert_sizes(architecture: Architecture) -> tuple[int, int]:
    """Return the number of experts, and the numbers between of one. Both are 1 if no layer has experts."""
    blocks = (kind.mlp for kind in architecture.layer_kinds.values() if isinstance(kind.mlp, Experts))
    return next(((experts.count, experts.intermediate_size) for experts in blocks), (1, 1))


def _targets(target: Target) -> tuple[str, ...]:
    """Return the canonical modules or the single tensor that ``target`` stands for."""
    return (target.name,) if isinstance(target, OneTensor) else _parts(target)


def _parts(target: Target) -> tuple[str, ...]:
    """Return the canonical modules that ``target`` stands for."""
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
    further: Collection[str] = (),
    modules: str | None = None,
    **changes: Any,
) -> Family:
    """Return a row of the family table.

    Args:
        model_type: The ``model_type`` of the configuration.
        names: The names of the tensors.
        facts: The facts of the configuration, or a function that reads a configuration that facts can't describe.
        fused_by_key_head: Whether fused modules store the queries, keys and values of each key head together.
        fused_groups: The number of row groups in other fused modules. See ``SourceName``.
        transposed: The modules of a layer whose weight is stored as [in, out].
        names_of: Returns the names for an architecture, if they vary. ``names`` are then those of one architecture.
        further: The beginnings of the names of layers that predict further tokens. ``{further}`` is the number of a
            layer above the last one.
        modules: The name of the module list of the layers in the class of transformers, if its tensors have others.
        changes: Changes to the facts, as for ``Facts.replace``.

    Raises:
        TypeError: ``facts`` is a function, and there are changes.
    """
    if isinstance(facts, Facts):
        facts = facts.replace(**changes)
    elif changes:
        raise TypeError(
            f"{model_type}: expected no changes for a function of the configuration, got {', '.join(changes)}"
        )
    layers = layers_of(names)
    turned = frozenset(f"{layers}.{{layer}}.{module}.weight" for module in transposed)

    def table(architecture: Architecture) -> Iterator[SourceName]:
        fused = architecture.kind_of(0).attention.kv_heads if fused_by_key_head else fused_groups
        experts, width = _expert_sizes(architecture)
        own = names_of(architecture) if names_of else names
        alone = {(target.name,) for target in own.values() if isinstance(target, OneTensor)}
        for source, target in own.items():
            if isinstance(target, OneTensor):
                shape = (1, experts) if target.one_row else None
                yield SourceName(source=source, tensors=(target.name,), groups=1, transposed=False, shape=shape)
            if isinstance(target, Stacked):
                yield SourceName(
                    source=source,
                    tensors=target.tensors,
                    groups=width if target.interleaved else 1,
                    transposed=target.transposed,
                    axis=1 if len(target.tensors) > 1 else 0,
                    shape=(experts * width, architecture.hidden_size) if target.merged else None,
                )
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
        modules=modules or layers,
        dropped=tuple(source for source, target in names.items() if target is None),
        further=tuple(further),
        constants={source: target for source, target in names.items() if isinstance(target, float)},
    )
