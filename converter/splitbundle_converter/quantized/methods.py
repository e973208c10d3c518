"""Find out how the weights of a checkpoint are quantized: from its configuration, or from ModelOpt's file beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from splitbundle.errors import quoted
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.quantized import MODELOPT
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.errors import refusal, source_json
from splitbundle_converter.quantized import bitsandbytes, compressed_tensors, floats, integers
from splitbundle_converter.quantized.packed_weights import NOT_YET, PackedWeight, Quantization

FIELDS: Final = ("quantization_config", "compression_config", "quantization")
"""The fields of a configuration that describe quantized weights."""
INNER: Final = ("text_config",)
"""The parts of a configuration that may have these fields too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A format of quantized weights."""

    read: Callable[[Quantization], dict[str, PackedWeight]]
    formula: str
    """How a number is computed, for the manifest."""
    compared: str | None
    """The library whose numbers the tests compare with, and its version. None if no library has the formula."""
    activations: Callable[[Mapping[str, Any]], str | None] = lambda fields: None
    """The fields -> what the source also rounds while it runs, in a sentence's words."""
    dropped: tuple[str, ...] = ()
    """The ends of the names of tensors that only serve this rounding."""


_PRODUCTS: Final = "the inputs of its products"
_FP8: Final = "W = float32(code) * scale of its block"
_CACHE: Final = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")
_INPUTS: Final = (".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point")
METHODS: Final[Mapping[str, Method]] = {
    "fp8": Method(
        read=floats.fp8,
        formula=_FP8,
        compared="transformers",
        activations=lambda fields: _PRODUCTS,
        dropped=(".activation_scale", *_INPUTS, *_CACHE),
    ),
    "fbgemm_fp8": Method(
        read=floats.fbgemm_fp8,
        formula=_FP8,
        compared=None,
        activations=lambda fields: _PRODUCTS,
        dropped=(".input_scale_ub",),
    ),
    "mxfp4": Method(
        read=floats.mxfp4, formula="W = e2m1(code) * 2^(scale - 127), groups of 32", compared="transformers"
    ),
    "modelopt": Method(
        read=floats.modelopt,
        formula="W = code * scale (FP8), or e2m1(code) * (scale * scale_2) in groups of 16 (NVFP4)",
        compared="nvidia-modelopt 0.47.0",
        activations=lambda fields: _PRODUCTS if fields.get("quant_algo") != "W4A16_NVFP4" else None,
        dropped=(*_INPUTS, *_CACHE),
    ),
    "compressed-tensors": Method(
        read=compressed_tensors.compressed_tensors,
        formula="W = (code - zero) * scale of its group; for nvfp4: e2m1(code) * (scale / global scale)",
        compared="compressed-tensors 0.20.1",
        activations=compressed_tensors.activations,
        dropped=(*_INPUTS, *_CACHE),
    ),
    "gptq": Method(
        read=integers.gptq,
        formula="W = scale[g] * (code - zero[g]), with the stored zero plus 1 in the format gptq",
        compared="gptqmodel 7.7.0",
    ),
    "awq": Method(read=integers.awq, formula="W = (code - zero[g]) * scale[g]", compared="autoawq 0.2.9"),
    "bitsandbytes": Method(
        read=bitsandbytes.bitsandbytes,
        formula="4 bits: W = number(code) * absmax of its block; 8 bits: W = code * absmax of its row / 127",
        compared="bitsandbytes 0.50.2",
    ),
    "mlx": Method(
        read=integers.mlx, formula="W = scale of its group * code + offset of its group", compared="mlx 0.32.4"
    ),
}
"""The name of a format, as ``quant_method`` has it -> how it is read. MLX has no such name."""


def find(directory: CheckpointDirectory, found: Configuration) -> tuple[str, dict[str, Any], str, str] | None:
    """Return the method, its fields, their file and their JSON pointer; or None if nothing says that it is quantized.

    Raises:
        BundleError: ``source.quantised`` for a method that isn't known; ``source.unreadable`` and ``json.*`` for
            ModelOpt's file.
    """
    stated = _of_configuration(found)
    if stated is None and directory.has(MODELOPT):
        stated = _of_modelopt(directory)
    if stated is None:
        return None
    fields, file, pointer = stated
    method = fields.get("quant_method")
    if method is None and "bits" in fields and "group_size" in fields:
        method = "mlx"
    if not isinstance(method, str) or method not in METHODS:
        expected = f"weights that aren't quantized, or one of the methods {', '.join(METHODS)}"
        got = quoted(fields if method is None else method)
        raise refusal("source.quantised", file, expected, got, NOT_YET, pointer)
    return method, fields, file, pointer


def without_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the fields that describe quantized weights."""
    plain = {name: value for name, value in raw.items() if name not in FIELDS}
    for part in INNER:
        if isinstance(plain.get(part), dict):
            plain[part] = {name: value for name, value in plain[part].items() if name not in FIELDS}
    return plain


def _of_configuration(found: Configuration) -> tuple[dict[str, Any], str, str] | None:
    stated = []
    for place, fields in [("", found.raw), *((f"/{part}", found.raw.get(part)) for part in INNER)]:
        for name in FIELDS if isinstance(fields, dict) else ():
            value = fields.get(name)
            if value not in (None, {}, False, [], ""):
                stated.append((value, found.file, f"{found.pointer}{place}/{name}"))
    if not stated:
        return None
    for value, file, pointer in stated:
        if not isinstance(value, dict):
            raise refusal("source.quantised", file, "an object", quoted(value), NOT_YET, pointer)
    # MLX writes the same object under two names. Any other pair says two things.
    named = [entry for entry in stated if entry[0].get("quant_method") is not None] or stated
    for value, file, pointer in named[1:]:
        if value != named[0][0]:
            expected = f"one description of the quantized weights, as {named[0][2]} has it"
            raise refusal("source.quantised", file, expected, quoted(value), NOT_YET, pointer)
    value, file, pointer = named[0]
    return value, file, pointer


def _of_modelopt(directory: CheckpointDirectory) -> tuple[dict[str, Any], str, str] | None:
    document = source_json(directory.read(MODELOPT), MODELOPT)
    inner = document.get("quantization") if isinstance(document, dict) else None
    if not isinstance(inner, dict) or inner.get("quant_algo") is None:
        return None  # only the cache of keys and values is quantized, or nothing
    return {**inner, "quant_method": "modelopt"}, MODELOPT, "/quantization"
