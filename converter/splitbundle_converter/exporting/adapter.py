"""Merge a LoRA into the logical tensors of a bundle, one unit at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from splitbundle.backends.torch.stage import load_stages
from splitbundle.backends.torch.training.adapter_files import WEIGHTS, read_adapters
from splitbundle.backends.torch.training.lora_files import load_lora
from splitbundle.backends.torch.weights import DTYPES, rounded
from splitbundle.bundle import Bundle
from splitbundle_converter.errors import refusal


def with_adapter(
    bundle: Bundle, adapter: str | os.PathLike[str], tensors: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """Return a function that gives a logical tensor by its name, with the adapter merged into it.

    The sum is computed in float32 and rounded once to the stored dtype, as ``Stage.merge_lora`` does.

    Args:
        bundle: The bundle.
        adapter: A directory as PEFT or ``save_lora`` writes it.
        tensors: Returns a logical tensor without the adapter.
    """
    units = {name: unit for unit, own in bundle.architecture.unit_tensors().items() for name in own}
    storage = bundle.manifest.storage
    merged: dict[str, Tensor] = {}
    at = ""

    def tensor(name: str) -> Tensor:
        nonlocal at
        if units[name] != at:
            at = units[name]
            merged.clear()  # the tensors come unit by unit
            merged.update(_merged(bundle, adapter, at))
        if name not in merged:
            return tensors(name)
        return rounded(merged[name], DTYPES[storage.dtype_of(name)], name)

    return tensor


def check_adapter(bundle: Bundle, adapter: str | os.PathLike[str]) -> None:
    """Check an adapter before anything is written: each tensor of it must belong to a layer of the model.

    Raises:
        BundleError: ``adapter.config``, ``adapter.tensor``, ``file.*``, ``json.*``.
    """
    _, found, _ = read_adapters(Path(adapter))
    if not found:
        expected, hint = "at least one layer with an adapter", "Save it again with PEFT, or with save_lora"
        raise refusal("adapter.tensor", WEIGHTS, expected, "none", hint)
    first = next(iter(bundle.architecture.unit_tensors()))
    _merged(bundle, adapter, first)


def _merged(bundle: Bundle, adapter: str | os.PathLike[str], unit: str) -> dict[str, Tensor]:
    """Return the weights of a unit's layers that have an adapter, merged, in float32.

    Raises:
        BundleError: ``adapter.tensor`` if a merged weight isn't finite, and as for ``load_lora``.
    """
    layers = len(bundle.architecture.layers)
    number = int(unit.removeprefix("layer-")) if unit.startswith("layer-") else None
    around = (number, number + 1) if number is not None else (0, 0) if unit == "embedding" else (layers, layers)
    selection = bundle.select(layers=around, embeds=unit == "embedding", head=unit == "head")
    (stage,) = load_stages(bundle, [selection], dtype="float32", kernels="torch")
    chosen = load_lora(Path(adapter), stage, trainable=False)
    stage.merge_lora()
    parameters = dict(stage.named_parameters(remove_duplicate=False))
    merged = {f"{name}.weight": parameters[f"{name}.weight"].detach() for name in chosen}
    for name, weight in merged.items():
        if not bool(weight.isfinite().all()):
            expected, hint = f"finite numbers where it is merged into {name}", "Train the adapter again"
            raise refusal("adapter.tensor", WEIGHTS, expected, "NaN or an infinity", hint)
    return merged
