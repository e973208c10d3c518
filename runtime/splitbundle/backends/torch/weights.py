"""Map weight files as tensors, without a copy and without numpy."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import dtypes
from splitbundle.storage.scales import check_scales_in

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in dtypes.TENSORS}
"""Names of the stored dtypes -> the dtypes of torch."""


class MappedTensors(dict[str, Tensor]):
    """Tensors over the mapped bytes of files, by name. Each keeps its bytes alive."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[str, tuple[mmap.mmap, int]] = {}

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int], data: mmap.mmap, offset: int) -> None:
        """Add the tensor that begins at a byte of ``data``."""
        count = math.prod(shape)
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=offset) if count else torch.empty(0, dtype=dtype)
        self[name] = flat.view(tuple(shape))
        self._places[name] = data, offset

    def include(self, others: MappedTensors) -> None:
        """Add all tensors of another collection."""
        self.update(others)
        self._places.update(others._places)

    def joined(self, names: Sequence[str]) -> Tensor | None:
        """Return tensors that lie one after another as one tensor over the same memory, else None.

        *Shape:* (r1, …), (r2, …) … -> (r1 + r2 + …, …).
        """
        parts = [self[name] for name in names]
        data, offset = self._places[names[0]]
        end = offset
        for name, part in zip(names, parts, strict=True):
            if self._places[name] != (data, end) or part.shape[1:] != parts[0].shape[1:]:
                return None
            end += part.nbytes
        count = sum(part.numel() for part in parts)
        return torch.frombuffer(data, dtype=parts[0].dtype, count=count, offset=offset).view(-1, *parts[0].shape[1:])


def map_tensors(bundle: BundleReader, group: str) -> MappedTensors:
    """Return the tensors of a unit, or of the golden vectors. Each keeps its mapped bytes alive.

    Raises:
        BundleError: as for ``Bundle.weight_bytes``; ``weights.scale``.
    """
    if sys.byteorder != "little":
        raise BundleError(
            Problem(
                code="backend.byteorder",
                expected="a little-endian machine",
                got=f"a {sys.byteorder}-endian one",
            )
        )
    tensors = MappedTensors()
    for path, (data, found) in zip(bundle.weight_groups()[group], bundle.weight_bytes(group), strict=True):
        check_scales_in(bundle, path, data, found)
        for name, (tensor, offset) in found.layout.items():
            tensors.add(name, DTYPES[tensor.dtype], tensor.shape, data, found.start + offset)
    return tensors


def compute_dtype(bundle: BundleReader, dtype: str | torch.dtype | None) -> torch.dtype:
    """Return the dtype to compute in: the given one, or the stored one if none is given.

    Raises:
        BundleError: ``input.dtype`` if the weights can't be used in this dtype.
    """
    floats = {name: value for name, value in DTYPES.items() if value.is_floating_point}
    if dtype is None:
        return floats[bundle.manifest.storage.dtype]
    known = floats.get(dtype) if isinstance(dtype, str) else dtype
    if known is None or known not in floats.values():
        expected = f"one of {', '.join(floats)}"
        raise BundleError(Problem(code="input.dtype", argument="dtype", expected=expected, got=quoted(str(dtype))))
    return known


def rounded(tensor: Tensor, dtype: torch.dtype, name: str, file: str | None = None) -> Tensor:
    """Return a weight in ``dtype``, or the weight itself if it has this dtype.

    Raises:
        BundleError: ``input.overflow`` if a finite value would become infinite. float16 ends at 65,504.
    """
    result = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and bool((result.isinf() & ~tensor.isinf()).any()):
        finite = tensor[~tensor.isinf()].abs().max().item()
        raise BundleError(
            Problem(
                code="input.overflow",
                file=file,
                pointer=f"/{name}",
                expected=f"values that {str(dtype).removeprefix('torch.')} can hold",
                got=f"{finite:g}",
                hint="bfloat16 holds larger ones",
            )
        )
    return result


def assign(module: nn.Module, mapped: Mapping[str, nn.Parameter]) -> None:
    """Do the same as ``module.load_state_dict(mapped, assign=True)``.

    The extra work in ``load_state_dict`` would take a quarter of the loading time.
    """
    for prefix, part in module.named_modules():
        for name, empty in part._parameters.items():
            if empty is not None:
                full = f"{prefix}.{name}"
                if mapped[full].shape != empty.shape:
                    raise RuntimeError(
                        f"{full}: {tuple(empty.shape)} in the architecture, {tuple(mapped[full].shape)} here"
                    )
                part._parameters[name] = mapped[full]


def check_device(device: str | torch.device | None) -> None:
    """Check that torch can compute on a device.

    Raises:
        BundleError: ``input.device``.
    """
    try:
        torch.empty(0, device=device).sum().item()  # "meta" can make tensors, but can't compute
    except (RuntimeError, AssertionError) as error:  # an unknown name, no driver, or a torch build without this device
        got = f"{quoted(str(device))}: {str(error).splitlines()[0]}"
        raise BundleError(
            Problem(code="input.device", argument="device", expected="a device that torch has here", got=got)
        ) from error
