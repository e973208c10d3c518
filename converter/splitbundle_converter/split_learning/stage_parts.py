"""Parts that were saved from the stages of a bundle: state dicts with canonical names and global layer numbers.

They are rewritten with the names of the family, as other parts have them, with layers counted from the part's first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import EMBEDDING
from splitbundle.format.manifest.row_names import ROW
from splitbundle.records import replace
from splitbundle_converter.errors import refusal
from splitbundle_converter.families.row import Family
from splitbundle_converter.split_learning.part import Part
from splitbundle_converter.translation.restore import join

LAYER: Final = "{layer}"


def with_source_names(
    parts: list[Part], rewritten: dict[str, Path], family: Family, architecture: Architecture
) -> dict[str, Path]:
    """Return the safetensors file of each part, with the family's names. Only one part at a time is in memory.

    Args:
        parts: The parts in order.
        rewritten: The name of each pickle -> the path of its safetensors file.
        family: The family of the model.
        architecture: Its architecture.

    Raises:
        BundleError: ``source.tensor`` for a table that both ends hold with different values, and for a source tensor
            of which a part has only some pieces.
    """
    known = architecture.tensors().keys()
    found = dict(rewritten)
    table: Tensor | None = None
    for part in parts:
        path = rewritten[part.files.weights]
        with safe_open(path, framework="pt") as file:
            if not set(file.keys()) <= known:
                continue
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if part.component == "bottom":
            table = tensors.get(EMBEDDING)
        elif architecture.head.tied and table is not None and not torch.equal(tensors.pop(EMBEDDING, table), table):
            expected, got = "the table that the bottom has", "another: it was trained at both ends"
            hint = "Sum the gradients of both ends while you train: splitbundle.training.sum_tied_gradients"
            raise refusal("source.tensor", part.files.weights, expected, got, hint, f"/{EMBEDDING}")
        target = path.with_name(f"{path.stem}-named.safetensors")
        save_file(_source_tensors(part, tensors, family, architecture), target)
        found[part.files.weights] = target
    return found


def _source_tensors(
    part: Part, tensors: dict[str, Tensor], family: Family, architecture: Architecture
) -> dict[str, Tensor]:
    restored: dict[str, Tensor] = {}
    left = set(tensors)
    for row in family.names(architecture):
        layers = range(len(architecture.layers)) if LAYER in row.source else [0]
        for layer in layers:
            names = tuple(name.replace(LAYER, str(layer)) for name in row.tensors)
            there = [name for name in names if name in tensors]
            if not there:
                continue
            if len(there) < len(names) or ROW in row.source:
                expected = f"all of {', '.join(names)}, which are one tensor of {family.model_type}"
                raise refusal("source.tensor", part.files.weights, expected, f"only {', '.join(there)}")
            source = row.source.replace(LAYER, str(layer - part.start))
            restored |= join(replace(row, source=source, tensors=names), tensors.__getitem__)
            left -= set(names)
    if left:
        name = min(left)
        got = f"{tensors[name].dtype} {list(tensors[name].shape)}"
        raise refusal("source.tensor", part.files.weights, "tensors that the family stores", got, None, f"/{name}")
    return {name: tensor.contiguous().clone() for name, tensor in restored.items()}
