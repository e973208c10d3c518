"""What of a stage differs from the bundle that it was loaded from. Bytes are compared: no counter sees every change."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from splitbundle.backends.torch.stage import Stage
from splitbundle.backends.torch.weights import MappedTensors, map_tensors, rounded
from splitbundle.errors import BundleError
from splitbundle.storage.documents import read_documents
from splitbundle.storage.reader import BundleReader


def loaded_weights(stage: Stage) -> MappedTensors | None:
    """Return the weights with which a stage was loaded, mapped from its bundle.

    Return None if the bundle isn't where it was, was replaced, or lacks a file.
    """
    path, identity = Path(stage.source[0]), stage.source[1]
    tensors = MappedTensors()
    try:
        documents = read_documents(path, identity)
        bundle = BundleReader(path, documents.manifest, documents.architecture, documents.id)
        for unit in documents.architecture.units_of(stage.layer_range, embeds=stage.embeds, head=stage.has_head):
            tensors.include(map_tensors(bundle, unit))
    except BundleError:
        return None
    return tensors


def unchanged(stage: Stage) -> set[int]:
    """Return the ``id()`` of each parameter without gradients that is as the bundle has it. Each is read for that."""
    frozen = {name: parameter for name, parameter in stage.named_parameters() if not parameter.requires_grad}
    loaded = loaded_weights(stage) if frozen else None
    if loaded is None:
        return set()
    found = set()
    for name, parameter in frozen.items():
        stored = loaded.get(name.replace(".base.", "."))  # a layer with an adapter holds the plain one as its base
        if stored is not None and same_bits(rounded(stored, parameter.dtype, name), parameter):
            found.add(id(parameter))
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits. NaN equals itself here."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(one, other))
