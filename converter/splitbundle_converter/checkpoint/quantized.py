"""Find weights that are quantized, even where the configuration does not say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from splitbundle.errors import quoted
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.errors import refusal

HINT: Final = "Convert the checkpoint that was quantized. Without the scales, the stored numbers are not the weights"
_UNSAID: Final = (
    "Fetch the configuration again from where these weights were published: it has to say how they are quantized"
)
_ANOTHER: Final = "A checkpoint whose weights are quantized in several ways can't be converted yet"
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


def check_plain(tensors: Mapping[str, SourceTensor], method: str | None) -> None:
    """Check that no weights are quantized, other than those that were dequantized already.

    Args:
        tensors: The tensors by name.
        method: How those are quantized that were dequantized, or None if there are none.

    Raises:
        BundleError: ``source.quantised``.
    """
    expected = "weights that aren't quantized" if method is None else f"weights quantized as {method}, or plain ones"
    for name, tensor in tensors.items():
        for end, format_name in _FORMATS.items():
            if name.endswith(end):
                got, hint = f"a tensor of {format_name}, {quoted(name)}", _UNSAID if method is None else _ANOTHER
                raise refusal("source.quantised", tensor.file, expected, got, hint, f"/{tensor.stored}")


def is_quantized(dtype: str) -> bool:
    """Return whether a dtype of safetensors is one that only quantized weights have."""
    return dtype not in _PLAIN
