"""Read the language part of a composite checkpoint: its configuration, its tensors, and the list of left-out parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from splitbundle.errors import BundleError, quoted
from splitbundle.format.architecture.decoder import Architecture, Head
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.manifest.document import EMBEDDING, SourceName, expand, row_sources
from splitbundle_converter.checkpoint.source import Checkpoint, Configuration
from splitbundle_converter.errors import MISSING, refusal
from splitbundle_converter.families.composites import COMPOSITES, IGNORED, LANGUAGE, TEXT, Composite, text_type
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.configuration import (
    all_values,
    an_object,
    build,
    check_counts,
    evidence_of,
    readable,
    refuse_unknown_code,
    unusual,
)
from splitbundle_converter.families.evidence import evidence
from splitbundle_converter.families.row import Family
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.translation.translate import PROJECTION

_HEAD: Final = "lm_head.weight"
"""The name of the head's weight in all classes that have their own head."""
_HEAD_DEFAULTS: Final[dict[str, Any]] = {"multiplier": 1.0, "logit_cap": None}
"""A field of ``Head`` that changes the logits -> the value that changes nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A module of the checkpoint that the bundle does not contain, with its numbers of tensors and parameters."""

    module: str
    tensors: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguagePart:
    """The language part of a checkpoint."""

    composite: Composite
    source: Checkpoint
    """The checkpoint with only the tensors of the language part."""
    family: Family
    """The row of the part's model type, with the tensor names of the checkpoint."""
    own_names: dict[str, str]
    """A tensor's name in the checkpoint -> its name in the language model's own class."""
    own_table: dict[str, str]
    """The same for the names in the family's table, which may have ``{layer}`` and ``{row}``."""
    architecture: Architecture
    values: dict[str, Any]
    """The fields of the part's configuration."""
    not_used: dict[str, Any]
    """The fields that neither the family, nor the checkpoint's class, nor transformers' language model uses."""
    left_out: tuple[LeftOut, ...]
    not_applied: dict[str, Any]
    """Facts of the head that the language model's own class applies and the checkpoint's class does not apply."""

    def extension(self) -> dict[str, Any]:
        """Return the manifest's entry about the part; see ``spec/v1/bundle.md``, section "Versions and extensions"."""
        return {
            "name": LANGUAGE,
            "of": self.composite.model_type,
            "class": self.composite.class_name,
            "left_out": [
                {"module": item.module, "tensors": item.tensors, "parameters": item.parameters}
                for item in self.left_out
            ],
            "not_applied": self.not_applied,
            "own_names": self.own_table,
        }


def read_language_part(source: Checkpoint) -> LanguagePart:
    """Find the language part of a checkpoint by its configuration and its tensor names.

    Raises:
        BundleError: ``usage.part`` if the whole checkpoint is a language model; ``source.family``, ``source.config``,
            ``source.quantised``, ``source.remote-code``, ``source.tensor``.
    """
    found = source.configuration()
    raw = an_object(found)
    composite = _composite(found)
    readable(found)
    family = FAMILIES[text_type(raw) or composite.text_type]
    inner = {} if raw.get(TEXT) is None else raw[TEXT]
    text = Configuration(raw=inner, file=found.file, pointer=f"/{TEXT}")
    readable(text)
    _check_all_counts(found)
    built = build(found)
    nested = getattr(built, TEXT)
    if nested.model_type != family.model_type:
        got, pointer = quoted(nested.model_type), f"/{TEXT}/model_type"
        raise refusal("source.config", found.file, family.model_type, got, pointer=pointer)
    known = evidence_of(found)
    top = ConfigReader(all_values(found, built, known), known, found.file)
    stated = raw.get("tie_word_embeddings")
    top.ignored([*built.sub_configs, *IGNORED, *composite.ignored])
    tied = None if composite.whole else bool(top.raw("tie_word_embeddings")) and composite.ties
    for field in composite.same:
        if top.raw(field) != getattr(nested, field):
            top.refuse(field, f"{getattr(nested, field)}, as in {TEXT}")
    known = evidence(family.model_type)
    values = all_values(text, nested, known)
    config = ConfigReader(values, known, found.file, text.pointer)
    config.ignored(composite.text_ignored)
    if tied is not None:
        values["tie_word_embeddings"] = tied  # the checkpoint's class has the head: its field applies
    architecture = _architecture(family, config, composite)
    top.finish(architecture)
    base, head = _places(source, family, architecture)
    if composite.ties and not composite.whole and stated is None and head is not None and tied:
        # Without the field in the configuration, transformers ties the head and the embedding if they are equal.
        architecture = _with_head(architecture, tied=_equal(source, family, architecture, base, head))
    architecture, not_applied = _applied(architecture, composite)
    # The runtime's parser must accept the architecture. The same rules apply here, before any byte is written.
    architecture = parse_architecture(architecture.to_bytes())
    outer = base.removesuffix(family.prefix) if base.endswith(f".{family.prefix}") else ""
    renamed, own_names, own_table = _renamed(family, architecture, base, outer, head)
    part = copy.copy(source)
    inside = {name for name in source.tensors if name.startswith(outer or base) or name == head}
    part.tensors = {name: tensor for name, tensor in source.tensors.items() if name in inside}
    return LanguagePart(
        composite=composite,
        source=part,
        family=renamed,
        own_names=own_names,
        own_table=own_table,
        architecture=architecture,
        values=values | {"tie_word_embeddings": architecture.head.tied},
        not_used=unusual(top.not_used, found)
        | {f"{TEXT}.{name}": value for name, value in unusual(config.not_used, text).items()},
        left_out=tuple(_left_out(source, source.tensors.keys() - inside)),
        not_applied=not_applied,
    )


def _composite(found: Configuration) -> Composite:
    raw, file = found.raw, found.file
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        expected = "a checkpoint that has other parts than a language model"
        got = f"model_type {quoted(model_type)}, which is a language model as a whole"
        raise refusal("usage.part", None, expected, got, "Convert it without part=", argument="part")
    if not isinstance(model_type, str) or model_type not in COMPOSITES:
        refuse_unknown_code(found)
        text = text_type(raw)
        hint = (
            None
            if text is None
            else f"Its language part is {quoted(text, 40)}, but its place in the checkpoint is unknown"
        )
        expected = f"one of {', '.join(sorted(COMPOSITES))}, whose language part can be converted alone"
        raise refusal("source.family", file, expected, quoted(model_type), hint, "/model_type")
    composite, text = COMPOSITES[model_type], text_type(raw)
    known = composite.texts or FAMILIES.keys()
    if text not in known:
        got = text if text is not None else raw[TEXT].get("model_type")
        expected = f"one of {', '.join(sorted(known))}"
        raise refusal("source.family", file, expected, quoted(got), pointer=f"/{TEXT}/model_type")
    return composite


def _check_all_counts(found: Configuration) -> None:
    check_counts(found)
    for name, value in found.raw.items():
        if isinstance(value, dict):
            _check_all_counts(replace(found, raw=value, pointer=f"{found.pointer}/{name}"))


def _architecture(family: Family, config: ConfigReader, composite: Composite) -> Architecture:
    architecture = family.facts(config)
    if not composite.whole and architecture.head.bias:
        expected = f"a type of model whose head has no bias, as that of {composite.class_name} has none"
        config.refuse("model_type", expected)
    if not composite.whole and architecture.embedding.token_size != architecture.hidden_size:
        expected = f"a head as wide as the layers, as {composite.class_name} has it"
        config.refuse("hidden_size", expected, architecture.embedding.token_size)
    config.finish(architecture)
    return architecture


def _applied(architecture: Architecture, composite: Composite) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture that the checkpoint's class computes, and the facts that its head does not apply."""
    if composite.whole:
        return architecture, {}
    dropped = {
        field: getattr(architecture.head, field)
        for field, nothing in _HEAD_DEFAULTS.items()
        if field not in composite.applies and getattr(architecture.head, field) != nothing
    }
    return _with_head(architecture, **{field: _HEAD_DEFAULTS[field] for field in dropped}), dropped


def _with_head(architecture: Architecture, **fields: Any) -> Architecture:
    head: Head = replace(architecture.head, **fields)
    return replace(architecture, head=head)


# The places of the tensors.


def _implied(family: Family, architecture: Architecture) -> Iterator[SourceName]:
    """Yield the entries of the family's table whose tensors the architecture implies."""
    shapes, layers = architecture.tensors(), len(architecture.layers)
    for row in family.names(architecture):
        for entry in expand(row, layers):
            if all(name in shapes for name in entry.tensors):
                yield entry


def _places(source: Checkpoint, family: Family, architecture: Architecture) -> tuple[str, str | None]:
    """Return the prefix of the base model's names, and the name of the head's projection, or None if it isn't stored.

    A prefix is right if every tensor that the architecture implies exists under it. No other rule applies.
    """
    shapes = architecture.tensors()
    wanted = [
        name.removeprefix(family.prefix)
        for entry in _implied(family, architecture)
        if entry.source.startswith(family.prefix)
        for name in row_sources(entry.source, shapes[entry.tensors[0]][0])
    ]
    probe = next(entry.source for entry in _implied(family, architecture) if entry.tensors == (EMBEDDING,))
    probe = probe.removeprefix(family.prefix)
    candidates = [name.removesuffix(probe) for name in source.tensors if name == probe or name.endswith(f".{probe}")]
    right = [base for base in candidates if all(base + name in source.tensors for name in wanted)]
    if len(right) > 1:
        found = ", ".join(f"{base}{probe}" for base in sorted(right))
        raise refusal("source.tensor", source.name, "one language part with every tensor of it", f"several: {found}")
    if not right:
        raise _nowhere(source, wanted, probe, candidates)
    base = right[0]
    own = {
        entry.source.removeprefix(family.prefix)
        for entry in _implied(family, _with_head(architecture, tied=False))
        if entry.tensors == (PROJECTION,)
    }
    # The head belongs to the language model, or to one of the modules that contain the language model.
    above = ["", *(base[: i + 1] for i, character in enumerate(base) if character == ".")]
    heads = sorted({above + name for above in above for name in (*own, _HEAD)} & source.tensors.keys())
    if len(heads) > 1:
        got = f"several: {', '.join(heads)}"
        raise refusal("source.tensor", source.name, "one head of the language part", got)
    if not heads and not architecture.head.tied:
        hint = (
            "The checkpoint isn't whole, or its head is the embedding: then tie_word_embeddings has to be true, at the "
            "top level of config.json where the class has the head"
        )
        expected = f"the language part's {_HEAD}, as tie_word_embeddings isn't true"
        raise refusal("source.tensor", source.name, expected, "none", hint)
    return base, heads[0] if heads else None


def _nowhere(source: Checkpoint, wanted: list[str], probe: str, candidates: list[str]) -> BundleError:
    if not candidates:
        expected = f"a language part's tensor {quoted(probe)}, with any prefix"
        return refusal("source.tensor", source.name, expected, "none")
    nearest = max(candidates, key=lambda base: sum(base + name in source.tensors for name in wanted))
    missing = [nearest + name for name in wanted if nearest + name not in source.tensors]
    got = f"{len(wanted) - len(missing)}; the first that isn't there is {missing[0]}"
    expected = f"the {len(wanted)} tensors of the language part as {TEXT} describes it below {quoted(nearest)}"
    return refusal("source.tensor", source.name, expected, got, MISSING)


def _renamed(
    family: Family, architecture: Architecture, base: str, outer: str, head: str | None
) -> tuple[Family, dict[str, str], dict[str, str]]:
    """Return the row with the names of the checkpoint, and two maps from these names to the names of the row.

    The first map has the name of each tensor, and the second one the names of the table.

    ``outer`` is the prefix of the module that contains a complete language model, or empty. Within this module, the
    base model has the family's prefix.
    """

    def stored(name: str, tensors: tuple[str, ...] = ()) -> str:
        if name.startswith(family.prefix):
            return base + name.removeprefix(family.prefix)
        return head if head is not None and tensors == (PROJECTION,) else outer + name

    rows = family.names(architecture)
    table = tuple(replace(row, source=stored(row.source, row.tensors)) for row in rows)
    shapes = architecture.tensors()
    own = {
        stored(name, entry.tensors): name
        for entry in _implied(family, architecture)
        for name in row_sources(entry.source, shapes[entry.tensors[0]][0])
    }
    renamed = replace(
        family,
        names=lambda architecture: table,
        prefix=base,
        dropped=tuple(stored(name) for name in family.dropped),
        constants={stored(name): value for name, value in family.constants.items()},
    )
    layers = len(architecture.layers)

    def is_used(row: SourceName) -> bool:
        implied = any(all(name in shapes for name in entry.tensors) for entry in expand(row, layers))
        return implied or row.tensors == (PROJECTION,)  # a source may keep the projection of a tied head

    names = {new.source: row.source for new, row in zip(table, rows, strict=True) if is_used(row)}
    return renamed, own, names | {stored(name): name for name in family.constants}


def _equal(source: Checkpoint, family: Family, architecture: Architecture, base: str, head: str) -> bool:
    probe = next(entry.source for entry in _implied(family, architecture) if entry.tensors == (EMBEDDING,))
    embedding = base + probe.removeprefix(family.prefix)
    if source.tensors[embedding].shape != source.tensors[head].shape:
        return False
    with source.reader() as reader:
        return torch.equal(reader.get(embedding), reader.get(head))


def _left_out(source: Checkpoint, names: Iterable[str]) -> Iterator[LeftOut]:
    modules: dict[str, list[int]] = {}
    for name in sorted(names):
        path = name.split(".")
        # Newer classes have all parts in one module "model". Its submodules are more informative.
        module = ".".join(path[:2] if path[0] == "model" else path[:1])
        modules.setdefault(module, []).append(math.prod(source.tensors[name].shape))
    for module, sizes in modules.items():
        yield LeftOut(module=module, tensors=len(sizes), parameters=sum(sizes))
