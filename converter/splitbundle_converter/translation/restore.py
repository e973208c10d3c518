"""From a bundle back to its source's tensors, by the table that the manifest carries. No model zoo is asked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from splitbundle.backends.torch.weights import map_tensors
from splitbundle.bundle import Bundle
from splitbundle.format.manifest.document import expand
from splitbundle_converter.translation.translate import join


def source_tensors(bundle: Bundle) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the source checkpoint under its own name and in its own layout, one at a time.

    Exact to the bit, but for the rounding of ``--dtype``.

    Raises:
        BundleError: a unit that isn't there, or isn't what the manifest lists.
    """
    units = {name: unit for unit, tensors in bundle.architecture.unit_tensors().items() for name in tensors}
    mapped: dict[str, dict[str, torch.Tensor]] = {}  # mapped, not read: keeping them costs no memory

    def tensor(name: str) -> torch.Tensor:
        unit = units[name]
        if unit not in mapped:
            mapped[unit] = map_tensors(bundle, unit)
        return mapped[unit][name]

    for template in bundle.manifest.source_names:
        for entry in expand(template, len(bundle.architecture.layers)):
            yield from join(entry, tensor).items()
