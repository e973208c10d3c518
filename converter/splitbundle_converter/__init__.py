"""The converter of splitbundle: it converts a Hugging Face checkpoint into a bundle.

    splitbundle_converter.convert("gpt2", "gpt2.splitbundle", split=[2, 10])

Importing this package imports neither torch nor transformers. The functions import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitbundle_converter.conversion import convert
    from splitbundle_converter.exporting.huggingface import export
    from splitbundle_converter.resplitting import add_onnx, resplit
    from splitbundle_converter.translation.restore import source_tensors

__all__ = ["add_onnx", "convert", "export", "resplit", "source_tensors"]

_LATER = {
    "add_onnx": "splitbundle_converter.resplitting",
    "convert": "splitbundle_converter.conversion",
    "export": "splitbundle_converter.exporting.huggingface",
    "resplit": "splitbundle_converter.resplitting",
    "source_tensors": "splitbundle_converter.translation.restore",
}
"""A public name -> the module that defines it. The module is imported at the first use of the name."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
