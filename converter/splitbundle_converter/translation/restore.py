"""Restore the source's tensors from a bundle with the table in its manifest. This needs no model zoo."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from splitbundle.backends.torch.weights import map_tensors
from splitbundle.bundle import Bundle
from splitbundle.format.manifest.document import expand
from splitbundle_converter.translation.translate import join


def source_tensors(bundle: Bundle) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of the source checkpoint with its original name and layout, one at a time.

    The tensors have the stored dtype. They are exact to the bit, except for the rounding of ``--dtype``.

    Raises:
        BundleError: A unit is absent, or differs from the manifest.
    """
    units = {name: unit for unit, tensors in bundle.architecture.unit_tensors().items() for name in tensors}
    mapped: dict[str, dict[str, torch.Tensor]] = {}  # mapped tensors are not read, so keeping them costs no memory

    def tensor(name: str) -> torch.Tensor:
        unit = units[name]
        if unit not in mapped:
            mapped[unit] = map_tensors(bundle, unit)
        return mapped[unit][name]

    for template in bundle.manifest.source_names:
        for entry in expand(template, len(bundle.architecture.layers)):
            yield from join(entry, tensor).items()
