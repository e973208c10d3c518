"""Weights that a checkpoint stores as codes and scales: the record of one, and what the readers of formats share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.backends.torch.weights import DTYPES
from splitbundle.errors import BundleError, quoted
from splitbundle.format.dtypes import SAFETENSORS_CODES, WEIGHTS
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.errors import MISSING, refusal

Get = Callable[[str], Tensor]
"""The name of a source tensor -> the tensor, mapped."""
TORCH: Final[Mapping[str, torch.dtype]] = {SAFETENSORS_CODES[name]: DTYPES[name] for name in WEIGHTS}
"""The dtype of plain weights, as safetensors names it -> torch's."""
NOT_YET: Final = "Convert the checkpoint that was quantized, or dequantize this one with the library that made it"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight that is stored as codes and scales."""

    parts: tuple[str, ...]
    """The source tensors that it is made of, the codes first."""
    shape: tuple[int, ...]
    dtype: str
    """The dtype of its numbers, as safetensors names it."""
    even: bool = True
    """Whether no block of codes at an edge is smaller than the others."""
    pieces: Callable[[Get], Iterator[Tensor]]
    """Computes the numbers. It yields a tensor of two dimensions as a whole, and one of three dimensions in slices
    along the first, so that the weights of one expert at a time are in memory. *Shape:* (1, …) each, or the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What a checkpoint says of its quantized weights, and its tensors."""

    method: str
    """The name of the format, as the checkpoint gives it."""
    fields: Mapping[str, Any]
    file: str
    pointer: str
    """The place of the fields in their file."""
    tensors: Mapping[str, SourceTensor]
    get: Get
    target: str
    """The dtype of the numbers of a format that computes them in float32."""

    def names(self, end: str, *dtypes: str) -> Iterator[tuple[str, str]]:
        """Yield the name of each tensor with this end and one of these dtypes, with the name without the end."""
        for name, tensor in self.tensors.items():
            if name.endswith(end) and tensor.dtype in dtypes:
                yield name, name.removesuffix(end)

    def part(self, name: str, *shapes: tuple[int, ...], dtypes: tuple[str, ...], of: str) -> SourceTensor:
        """Return the tensor ``name``, a part of the weight ``of``. Check its shape, if there are any, and its dtype.

        Raises:
            BundleError: ``source.tensor``.
        """
        found = self.tensors.get(name)
        if found is None:
            expected = f"a tensor {quoted(name)} for the quantized weight {quoted(of)}"
            raise refusal("source.tensor", self.tensors[of].file, expected, "none", MISSING, f"/{of}")
        if found.dtype not in dtypes:
            self.refuse(name, f"dtype {' or '.join(dtypes)}", found.dtype)
        if shapes and found.shape not in shapes:
            self.refuse(name, f"shape {' or '.join(str(list(shape)) for shape in shapes)}", str(list(found.shape)))
        return found

    def sizes(self, name: str, *dimensions: int) -> tuple[int, ...]:
        """Return the shape of a tensor. Check that it has one of these numbers of dimensions.

        Raises:
            BundleError: ``source.tensor``.
        """
        shape = self.tensors[name].shape
        if len(shape) not in dimensions:
            self.refuse(name, f"{' or '.join(map(str, dimensions))} dimensions", f"shape {list(shape)}")
        return shape

    def refuse(self, name: str, expected: str, got: str, hint: str = MISSING) -> None:
        """Raise ``source.tensor`` for a tensor."""
        found = self.tensors[name]
        raise refusal("source.tensor", found.file, expected, got, hint, f"/{found.stored}")

    def unsupported(self, name: str, expected: str) -> BundleError:
        """Return ``source.quantised`` for the value of a field."""
        got = quoted(self.fields.get(name))
        return refusal("source.quantised", self.file, expected, got, NOT_YET, f"{self.pointer}/{name}")

    def number(self, name: str, default: int | None = None) -> int:
        """Return a field that is a whole number from 1, or ``default`` if the field is absent or null.

        Raises:
            BundleError: ``source.quantised``.
        """
        value = self.fields.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.unsupported(name, "a whole number from 1")
        return value

    def product_dtype(self, scale: SourceTensor) -> str:
        """Return the dtype of products with a scale: its own one if that has 16 bits, and else ``target``."""
        return scale.dtype if scale.dtype in ("F16", "BF16") else self.target


def whole(formula: Callable[[Get], Tensor]) -> Callable[[Get], Iterator[Tensor]]:
    """Return ``pieces`` of a weight that is computed as a whole."""

    def pieces(get: Get) -> Iterator[Tensor]:
        yield formula(get)

    return pieces


def group_of(columns: int, size: int) -> Tensor:
    """Return the number of the group of each column, if groups of ``size`` columns follow each other."""
    return torch.arange(columns) // size


def checked_groups(quantization: Quantization, name: str, index: Tensor, count: int) -> Tensor:
    """Return ``index``, a tensor ``name`` with the group of each column. Check that each is one of ``count`` groups.

    Raises:
        BundleError: ``source.tensor``.
    """
    wrong = index[(index < 0) | (index >= count)]
    if len(wrong):
        quantization.refuse(name, f"numbers of groups from 0 to {count - 1}", str(int(wrong[0])))
    return index.long()


def words(count: int, bits: int) -> int:
    """Return how many words of 32 bits hold ``count`` integers of ``bits`` bits."""
    return math.ceil(count * bits / 32)


def patterns_of(quantization: Quantization, name: str, value: object) -> list[str]:
    """Return the names of modules in a field: names, and regular expressions after ``re:``.

    An expression comes from outside, and some take time that grows with a power of a name's length. So one that
    repeats a group, or has many repetitions, is refused.

    Raises:
        BundleError: ``source.quantised``.
    """
    named = [] if value is None else value
    if not isinstance(named, list) or not all(isinstance(pattern, str) for pattern in named):
        raise quantization.unsupported(name, "a list of names")
    for pattern in named:
        if pattern.startswith("re:") and not _is_quick(pattern[3:]):
            expected = "regular expressions with at most three repetitions, and none of a group"
            raise refusal(
                "source.quantised",
                quantization.file,
                expected,
                quoted(pattern),
                NOT_YET,
                f"{quantization.pointer}/{name}",
            )
    return list(named)


def is_named(module: str, patterns: list[str]) -> bool:
    """Return whether a list that ``patterns_of`` gave names a module."""
    return any(
        re.match(pattern[3:], module) is not None if pattern.startswith("re:") else module == pattern
        for pattern in patterns
    )


def _is_quick(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    plain = re.sub(r"\\.|\[[^]]*\]", "x", pattern)
    return len(pattern) <= 500 and len(re.findall(r"[*+{]", plain)) <= 3 and not re.search(r"\)[*+{]", plain)
