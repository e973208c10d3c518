"""Find weights that are quantized, even where the configuration does not say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from splitbundle.errors import BundleError, quoted
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.errors import refusal, source_json

HINT: Final = "Convert the checkpoint that was quantized. Without the scales, the stored numbers are not the weights"
MODELOPT: Final = "hf_quant_config.json"
_PLAIN: Final = ("F64", "F32", "F16", "BF16")
_FORMATS: Final[Mapping[str, str]] = {
    ".scales": "MLX",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or INT8",
    ".weight_scale_inv": "FP8",
    ".weight_scale_2": "ModelOpt's NVFP4",
    ".input_scale": "FP8",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_blocks": "MXFP4",
}
"""The end of a tensor's name -> the format of quantized weights that has such tensors."""


def check_plain(directory: CheckpointDirectory, tensors: Mapping[str, SourceTensor]) -> None:
    """Check that no weights are quantized.

    Raises:
        BundleError: ``source.quantised``; ``source.unreadable`` and ``json.*`` for ModelOpt's file.
    """
    if directory.has(MODELOPT):
        document = source_json(directory.read(MODELOPT), MODELOPT)
        inner = document.get("quantization") if isinstance(document, dict) else None
        algorithm = inner.get("quant_algo") if isinstance(inner, dict) else None
        if algorithm is not None:
            raise _quantized(MODELOPT, quoted(algorithm), "/quantization/quant_algo")
    for name, tensor in tensors.items():
        for end, format_name in _FORMATS.items():
            if name.endswith(end):
                raise _quantized(tensor.file, f"a tensor of {format_name}, {quoted(name)}", f"/{tensor.stored}")


def is_quantized(dtype: str) -> bool:
    """Return whether a dtype of safetensors is one that only quantized weights have."""
    return dtype not in _PLAIN


def _quantized(file: str, got: str, pointer: str) -> BundleError:
    return refusal("source.quantised", file, "weights that aren't quantized", got, HINT, pointer)
