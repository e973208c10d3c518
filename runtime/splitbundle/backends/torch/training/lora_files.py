"""Adapters as PEFT stores them: under the names of the source model, in a directory that PEFT loads, and back.

A layer of the source may be several canonical layers, one above the other, such as the queries, keys and values of
GPT-2. Their adapters become one: A is all their A, one above the other, and B has theirs as blocks. So the product is
the same. Where they share one A, the rank stays.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from splitbundle.backends.torch.stage import Stage, stages_in
from splitbundle.backends.torch.training.adapter_files import (
    BASE,
    PREFIX,
    WEIGHTS,
    SourceAdapter,
    read_adapters,
    write_adapters,
)
from splitbundle.backends.torch.training.lora import LoraLinear, adapters_of, add_lora, canonical_layers, linear_layers
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format.fields import MAX_PROBLEMS
from splitbundle.format.manifest.document import SourceName, row_sources
from splitbundle.format.manifest.row_names import ROW
from splitbundle.records import replace


def save_lora(
    path: str | os.PathLike[str],
    stages: Stage | Sequence[Stage] | nn.Module,
    *,
    base_model: str = "",
    prefix: str = "",
    force: bool = False,
) -> Path:
    """Save the adapters of some stages in a directory that PEFT loads onto the source model.

    The directory of one stage has the adapters of its layers alone. ``merge_adapters`` makes one of several.

    Args:
        path: the directory.
        stages: stages with adapters: one, several, or a pipeline.
        base_model: the hub id or path of the source model, for ``base_model_name_or_path``.
        prefix: what the names of the source's layers lack in the checkpoint and have in the class, such as
            ``"transformer."`` for a GPT-2 that was saved without its head.
        force: whether to replace adapters that are there.

    Raises:
        BundleError: ``input.value`` for stages without adapters, and for adapters that PEFT can't hold together;
            ``output.*``.
    """
    found: dict[str, SourceAdapter] = {}
    given = stages_in(stages)
    adapters = [adapter for stage in given for _, adapter in adapters_of(stage)]
    if not adapters:
        raise wrong_argument("stages", "stages with adapters (add_lora)", "none")
    if len({adapter.rslora for adapter in adapters}) > 1:
        raise wrong_argument(
            "stages", "one kind of scaling, as PEFT has one for all adapters", "with and without rslora"
        )
    transposed = False
    for stage in given:
        own = dict(adapters_of(stage))
        for entry in _weights(stage):
            parts = canonical_layers(entry)
            if any(part in own for part in parts):
                name = prefix + entry.source.removesuffix(".weight")
                if ROW in entry.source:
                    found |= _of_experts(name, own[parts[0]])
                else:
                    found[name] = _to_source(stage, entry, [own.get(part) for part in parts])
                transposed = transposed or entry.transposed
                for part in parts:
                    own.pop(part, None)
        if own:
            expected = f"layers that the source has as linear layers, for {quoted(next(iter(own)))}"
            hint = "merge_lora folds the adapters into the weights, and save_as keeps those"
            raise wrong_argument("stages", expected, "none in the manifest's source_names", hint)
    config = _config(found, base_model, transposed, rslora=adapters[0].rslora, dropout=adapters[0].dropout.p)
    return write_adapters(Path(os.path.abspath(path)), config, _tensors(found), force=force)


def merge_adapters(
    paths: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Join the adapters of several shards, each saved by ``save_lora``, in one directory that PEFT loads.

    Args:
        paths: the directories of the adapters.
        path: the directory to write.
        force: whether an adapter there is replaced.

    Returns:
        The directory.

    Raises:
        BundleError: ``input.value`` if two have the same layer, or if their scaling or base differs; ``output.*``; and
            the errors of reading them.
    """
    if isinstance(paths, str | os.PathLike):
        raise wrong_argument("paths", "a list of directories", quoted(paths))
    tensors: dict[str, SourceAdapter] = {}
    configs = []
    for one in paths:
        config, found, _ = read_adapters(Path(one))
        configs.append(config)
        both = tensors.keys() & found.keys()
        if both:
            raise wrong_argument(
                "paths", "each layer in one directory", f"{quoted(min(both))} in two, the second {quoted(one)}"
            )
        tensors |= found
    if not configs:
        raise wrong_argument("paths", "directories with adapters", "none")
    first = configs[0]
    for key in ("use_rslora", "fan_in_fan_out", "base_model_name_or_path", "lora_dropout"):
        if any(config.get(key) != first.get(key) for config in configs):
            raise wrong_argument(
                "paths", f"the same {key} in all", ", ".join(quoted(config.get(key)) for config in configs)
            )
    config = _config(
        tensors,
        str(first.get("base_model_name_or_path") or ""),
        bool(first.get("fan_in_fan_out")),
        rslora=bool(first.get("use_rslora")),
        dropout=float(first.get("lora_dropout") or 0.0),
    )
    return write_adapters(Path(os.path.abspath(path)), config, _tensors(tensors), force=force)


def load_lora(
    path: str | os.PathLike[str], stages: Stage | Sequence[Stage] | nn.Module, *, trainable: bool = True
) -> list[str]:
    """Load adapters for the source model, as PEFT or ``save_lora`` saved them, onto stages.

    Every adapter must be of a layer of the model. Those of layers that other stages have are left out.

    Args:
        path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        stages: the stages: one, several, or a pipeline. They have no adapters yet.
        trainable: whether the adapters take gradients. The layers themselves don't.

    Returns:
        The canonical names of the layers that got an adapter.

    Raises:
        BundleError: ``adapter.config`` for a kind of adapter that isn't plain LoRA; ``adapter.tensor`` for each tensor
            that no layer of the model has, or of another shape; ``file.*`` and ``json.*``.
    """
    config, found, bases = read_adapters(Path(path))
    given = stages_in(stages)
    rslora, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0.0)
    for stage in given:
        for part, _ in adapters_of(stage):
            raise wrong_argument("stages", "stages without adapters", f"{quoted(stage.name)} with one on {part}")
    plan: list[tuple[Stage, str, Tensor, Tensor, float]] = []
    known: set[str] = set()
    problems: list[Problem] = []
    for stage in given:
        sizes = stage.architecture.tensors()
        for entry in _weights(stage):
            source = entry.source.removesuffix(".weight")
            parts = canonical_layers(entry)
            if ROW in source:
                if parts and f"{parts[0]}.weight" in sizes:
                    names = _experts_named(source, sizes[f"{parts[0]}.weight"], found, problems)
                    known.update(names)
                    if names and not problems and parts[0] in linear_layers(stage):
                        a, b = (torch.stack([getattr(found[key], part) for key in names]) for part in ("a", "b"))
                        plan.append((stage, parts[0], a, b, found[names[0]].alpha))
                continue
            name = next((key for key in found if key == source or key.endswith(f".{source}")), None)
            if name is None or any(f"{part}.weight" not in sizes for part in parts):
                continue
            known.add(name)
            shapes = [sizes[f"{part}.weight"] for part in parts]
            adapter = found[name]
            expected = sum(rows for rows, _ in shapes), shapes[0][1]
            if (adapter.b.shape[0], adapter.a.shape[1]) != expected or adapter.b.shape[1] != adapter.rank:
                got = f"A {list(adapter.a.shape)}, B {list(adapter.b.shape)}"
                wanted = f"A [rank, {expected[1]}], B [{expected[0]}, rank]"
                problems.append(Problem(code="adapter.tensor", file=WEIGHTS, argument=name, expected=wanted, got=got))
                continue
            own = linear_layers(stage)
            problems += _wrong_bases(stage, name, parts, bases)
            for part, rows in zip(parts, _divided(adapter.b, entry, [rows for rows, _ in shapes]), strict=True):
                if part in own:
                    plan.append((stage, part, adapter.a, rows, adapter.alpha))
    for name in found:
        if name not in known:
            expected_text = f"a linear layer of the model, which has {len(given[0].architecture.layers)} layers"
            problems.append(
                Problem(
                    code="adapter.tensor",
                    file=WEIGHTS,
                    argument=name,
                    expected=expected_text,
                    got="a name that it doesn't have",
                    hint="The adapter was made for another model",
                )
            )
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])
    for stage, part, a, b, alpha in plan:
        add_lora(stage, a.shape[-2], alpha, [part], dropout=dropout, rslora=rslora)
        adapter_module = stage.get_submodule(part)
        with torch.no_grad():
            adapter_module.lora_a.copy_(a)  # type: ignore[operator]
            adapter_module.lora_b.copy_(b)  # type: ignore[operator]
    for stage in given:
        for _, adapter_of_stage in adapters_of(stage):
            adapter_of_stage.lora_a.requires_grad_(trainable)
            adapter_of_stage.lora_b.requires_grad_(trainable)
    return [part for _, part, *_ in plan]


def _wrong_bases(stage: Stage, name: str, parts: Sequence[str], bases: Mapping[str, Tensor]) -> list[Problem]:
    """Return a problem if the adapter was trained beside another weight than the stage has."""
    stored = bases.get(name)
    own = dict(stage.named_parameters(remove_duplicate=False)).get(f"{parts[0]}.weight")
    if stored is None or own is None or (len(parts) == 1 and torch.equal(stored.to(own.dtype), own.detach().cpu())):
        return []
    expected = f"the weight that {quoted(stage.name)} has"
    return [Problem(code="adapter.tensor", file=WEIGHTS, argument=name + BASE, expected=expected, got="another one")]


def _weights(stage: Stage) -> Iterator[SourceName]:
    """Yield the source's weights, one for each layer of the model, whether this stage has the layer or not."""
    for entry in stage.source_names:
        if not entry.source.endswith(".weight") or (ROW in entry.source and ".experts." not in entry.tensors[0]):
            continue
        if "{layer}" not in entry.source:
            yield entry
            continue
        for layer in range(len(stage.architecture.layers)):
            tensors = tuple(name.replace("{layer}", str(layer)) for name in entry.tensors)
            yield replace(entry, source=entry.source.replace("{layer}", str(layer)), tensors=tensors)


def _of_experts(name: str, adapter: LoraLinear) -> dict[str, SourceAdapter]:
    """Return the adapters of all experts of a projection, each under the name of the expert's own layer."""
    pairs = zip(adapter.lora_a.detach().float().cpu(), adapter.lora_b.detach().float().cpu(), strict=True)
    names = row_sources(name, len(adapter.lora_a))
    return {own: SourceAdapter(a=a, b=b, alpha=adapter.alpha) for own, (a, b) in zip(names, pairs, strict=True)}


def _experts_named(
    source: str, shape: tuple[int, ...], found: Mapping[str, SourceAdapter], problems: list[Problem]
) -> list[str]:
    """Return the names of the adapters of all experts of a projection, or none. Note what is missing or differs."""
    names = []
    for own in row_sources(source, shape[0]):
        names += [key for key in found if key == own or key.endswith(f".{own}")][:1]
    if not names:
        return []
    first = found[names[0]]
    count, outputs, inputs = shape
    wanted = f"{count} of them, each with A [{first.rank}, {inputs}] and B [{outputs}, {first.rank}]"
    same = [(each.a.shape, each.b.shape, each.alpha) for each in map(found.__getitem__, names)]
    if len(names) != count or set(same) != {((first.rank, inputs), (outputs, first.rank), first.alpha)}:
        got = f"{len(names)}, the first with A {list(first.a.shape)} and B {list(first.b.shape)}"
        problems.append(Problem(code="adapter.tensor", file=WEIGHTS, argument=source, expected=wanted, got=got))
    return names


def _to_source(stage: Stage, entry: SourceName, adapters: Sequence[LoraLinear | None]) -> SourceAdapter:
    """Join the adapters of the canonical layers of one source layer."""
    there = [adapter for adapter in adapters if adapter is not None]
    first = there[0]
    sizes = stage.architecture.tensors()
    outputs = [sizes[name][0] for name in entry.tensors]
    shared = all(torch.equal(one.lora_a, first.lora_a) and one.scaling == first.scaling for one in there)
    rank = first.rank if shared else sum(adapter.rank for adapter in there)
    blocks, column = [], 0
    for rows, adapter in zip(outputs, adapters, strict=True):
        block = torch.zeros(rows, rank, dtype=torch.float32)
        if adapter is not None:
            # One scaling serves all: the difference goes into B.
            own = adapter.lora_b.detach().float().cpu() * (adapter.scaling / first.scaling)
            at = 0 if shared else column
            block[:, at : at + adapter.rank] = own
            column += adapter.rank
        blocks.append(block)
    groups = entry.groups
    joined = torch.cat([block.reshape(groups, -1, rank) for block in blocks], dim=1).flatten(0, 1)
    a = first.lora_a if shared else torch.cat([adapter.lora_a for adapter in there])
    alpha = first.scaling * (math.sqrt(rank) if first.rslora else rank)
    return SourceAdapter(a=a.detach().float().cpu(), b=joined, alpha=alpha)


def _divided(b: Tensor, entry: SourceName, outputs: Sequence[int]) -> list[Tensor]:
    """Return the rows of B for each canonical layer: the inverse of the join in ``_to_source``."""
    grouped = b.reshape(entry.groups, -1, b.shape[1])
    parts = torch.split(grouped, [rows // entry.groups for rows in outputs], dim=1)
    return [part.flatten(0, 1) for part in parts]


def _config(
    found: Mapping[str, SourceAdapter], base_model: str, transposed: bool, *, rslora: bool, dropout: float
) -> dict[str, Any]:
    """Return ``adapter_config.json``. The most common rank and alpha are the default, and patterns name the others."""
    rank = Counter(adapter.rank for adapter in found.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in found.values()).most_common(1)[0][0]
    return {
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: one.rank for name, one in found.items() if one.rank != rank},
        "alpha_pattern": {name: _number(one.alpha) for name, one in found.items() if one.alpha != alpha},
        "target_modules": list(found),
        "task_type": "CAUSAL_LM",
        "use_rslora": rslora,
    }


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _tensors(found: Mapping[str, SourceAdapter]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, adapter in found.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.b.contiguous()
    return tensors
