"""A checkpoint with quantized weights, seen as one with plain weights. Each is computed when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.errors import quoted
from splitbundle_converter.checkpoint.source import Checkpoint, Configuration, Reader
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.errors import MISSING, refusal
from splitbundle_converter.quantized.methods import METHODS, find, without_fields
from splitbundle_converter.quantized.packed_weights import PackedWeight, Quantization

EXTENSION: Final = "quantization"
"""The key in the manifest's ``extensions`` that describes the source's quantized weights."""
_TRANSFORMERS: Final = ("fp8", "mxfp4")
"""The methods that transformers dequantizes on a processor, without a library of the format."""
_HALF: Final = {"float16": "F16", "bfloat16": "BF16"}
_PLAIN: Final = (
    "If the weights were dequantized, remove the field from the configuration. Else fetch weights and configuration "
    "again, from one place"
)


class DequantizedCheckpoint(Checkpoint):
    """A checkpoint with the names, shapes and dtypes that it had before it was quantized."""

    rewritten = True

    def __init__(
        self,
        inner: Checkpoint,
        configuration: Configuration,
        packed: Mapping[str, PackedWeight],
        method: str,
        fields: Mapping[str, Any],
    ) -> None:
        self.directory, self.name, self.revision = inner.directory, inner.name, inner.revision
        self.naming, self.promised, self.cuts = inner.naming, inner.promised, inner.cuts
        self.packed, self.method, self.fields = packed, method, fields
        self.quantization = {"method": method, "formula": METHODS[method].formula, "weights": len(packed)}
        self._inner, self._configuration = inner, configuration
        self.tensors = _plain_tensors(inner.tensors, packed, method)

    def reads_alike(self) -> bool:
        """Return whether transformers itself can load the files on a processor, with the numbers of this reader.

        It takes the number of rows by the number of scales for the size of a block. It gives all tensors one dtype. It
        knows one name of FP8's scales, and leaves codes without a scale as they are.
        """
        if self.method not in _TRANSFORMERS or type(self._inner) is not Checkpoint:
            return False
        if self.method == "fp8" and find_spec("accelerate") is None:
            return False
        others = {tensor.dtype for name, tensor in self.tensors.items() if name not in self.packed}
        dtypes = {weight.dtype for weight in self.packed.values()}
        even = all(weight.even for weight in self.packed.values())
        if self.method == "fp8":
            even = even and all(weight.parts[1].endswith("_scale_inv") for weight in self.packed.values())
        return even and (dtypes == {"F32"} or (len(dtypes) == 1 and others <= dtypes))

    def configuration(self) -> Configuration:
        """Return the parsed configuration, without the fields that describe quantized weights."""
        return self._configuration

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open a reader of tensors for the duration of the block. It computes one weight at a time."""
        with self._inner.reader() as inner:
            yield _DequantizingReader(self, inner.get)


class _DequantizingReader(Reader):
    def __init__(self, source: DequantizedCheckpoint, get: Callable[[str], Tensor]) -> None:
        self._packed, self._get = source.packed, get

    def get(self, name: str) -> Tensor:
        """Return a tensor with the shape and the dtype that the checkpoint states for it."""
        if name not in self._packed:
            return self._get(name)
        pieces = list(self._packed[name].pieces(self._get))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def slices(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor of three dimensions in slices along the first."""
        return self._packed[name].pieces(self._get) if name in self._packed else super().slices(name)

    def close(self) -> None:
        """Do nothing: the reader of the codes is closed where it was opened."""


def dequantized(checkpoint: Checkpoint, *, exact: bool, notes: Callable[[str], None] | None) -> Checkpoint:
    """Return the checkpoint itself, or if its weights are quantized, a view of it with plain weights.

    Args:
        checkpoint: A checkpoint with any weights.
        exact: Whether formats that compute in float32 give their numbers in float32. Otherwise they are rounded to the
            dtype of 16 bits that the configuration states, or to bfloat16.
        notes: A function that is called with a sentence for each thing that the user should know.

    Raises:
        BundleError: ``source.quantised`` for a method or a value that isn't known, and for a configuration that
            describes quantized weights where there are none; ``source.tensor`` for parts of a weight that don't fit.
    """
    found = checkpoint.configuration()
    stated = find(checkpoint.directory, found) if isinstance(found.raw, dict) else None
    if stated is None:
        return checkpoint
    method, fields, file, pointer = stated
    target = "F32" if exact else _target(found.raw)
    for tensor in checkpoint.tensors.values():
        if 0 in tensor.shape:
            got = f"shape {list(tensor.shape)}"
            raise refusal("source.tensor", tensor.file, "sizes from 1", got, MISSING, f"/{tensor.stored}")
    with checkpoint.reader() as reader:
        quantization = Quantization(
            method=method,
            fields=fields,
            file=file,
            pointer=pointer,
            tensors=checkpoint.tensors,
            get=reader.get,
            target=target,
        )
        packed = METHODS[method].read(quantization)
    if not packed:
        expected = f"weights that are quantized with {method}, as the configuration says"
        raise refusal("source.quantised", file, expected, "none", _PLAIN, pointer)
    if notes is not None:
        notes(told(len(packed), method))
        rounds = METHODS[method].activations(fields)
        if rounds is not None:
            notes(f"The source also rounds {rounds} while it runs. The bundle computes without this rounding.")
    plain = replace(found, raw=without_fields(found.raw))
    return DequantizedCheckpoint(checkpoint, plain, packed, method, fields)


def extension(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the member for the manifest's ``extensions``; an empty dict for weights that weren't quantized."""
    return {} if checkpoint.quantization is None else {EXTENSION: dict(checkpoint.quantization)}


def checked_with(checkpoint: Checkpoint, *, by_layer: bool) -> str | None:
    """Return a sentence about the weights of the original in the check, or None for plain weights."""
    if checkpoint.quantization is None:
        return None
    if not isinstance(checkpoint, DequantizedCheckpoint):
        return f"The check gives the original class the numbers of the library {checkpoint.quantization['method']}."
    if not by_layer and checkpoint.reads_alike():
        return "The check loads the quantized weights with transformers' own reader."
    compared = METHODS[checkpoint.method].compared
    how = "follows the format's description" if compared is None else f"is tested against {compared}, equal to the bit"
    return f"The check gives the original class the numbers of splitbundle's reader of these weights, which {how}."


def _target(raw: dict[str, Any]) -> str:
    text = raw.get("text_config")
    fields = [raw, text] if isinstance(text, dict) else [raw]
    stated = (part.get(name) for part in fields for name in ("dtype", "torch_dtype"))
    return next((_HALF[value] for value in stated if isinstance(value, str) and value in _HALF), "BF16")


def told(weights: int, method: str) -> str:
    """Return a sentence about the weights that are dequantized."""
    return (
        f"{weights} weights of the source are quantized ({method}). They are dequantized: the bundle has plain numbers."
    )


def _plain_tensors(
    tensors: Mapping[str, SourceTensor], packed: Mapping[str, PackedWeight], method: str
) -> dict[str, SourceTensor]:
    """Return the tensors that the checkpoint had before it was quantized: plain ones, and computed ones."""
    parts = {name for weight in packed.values() for name in weight.parts}
    dropped = METHODS[method].dropped
    plain = {name: tensor for name, tensor in tensors.items() if name not in parts and not name.endswith(dropped)}
    for name, weight in packed.items():
        if name in plain:
            found = plain[name]
            got = f"both, as {quoted(weight.parts[0])}"
            raise refusal("source.tensor", found.file, "a plain weight, or a quantized one", got, None, f"/{name}")
        codes = tensors[weight.parts[0]]
        plain[name] = replace(codes, dtype=weight.dtype, shape=weight.shape)
    return plain
