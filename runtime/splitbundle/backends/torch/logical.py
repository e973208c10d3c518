"""The logical tensors of a unit, whatever is stored for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from splitbundle.backends.torch.quantized import dequantized
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.format.weight_layout import SCALE
from splitbundle.storage.reader import BundleReader


class LogicalTensors(Mapping[str, Tensor]):
    """The tensors of a unit by their logical names.

    A plain tensor is mapped, in its stored dtype. The numbers of a quantized one are made in float32 each time that it
    is asked for, and are exact.
    """

    def __init__(self, bundle: BundleReader, unit: str) -> None:
        """Map the files of the unit.

        Raises:
            BundleError: as for ``Bundle.weight_bytes``.
        """
        self._stored, self._storage = map_tensors(bundle, unit), bundle.manifest.storage
        self._names = list(bundle.architecture.tensors_of(unit))

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        encoding = self._storage.encoding_of(name)
        if encoding is None:
            return self._stored[name]
        return dequantized(self._stored[name], self._stored[f"{name}{SCALE}"], encoding, torch.float32)
