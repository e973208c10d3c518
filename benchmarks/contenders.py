"""The contenders: for each, the module that drives it, the libraries it needs, and the models it can compute."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass, field, replace
from typing import Any, Final

from benchmarks.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to compute a model. ``reads`` names the files that it loads; see ``files.Workshop``."""

    module: str
    libraries: tuple[str, ...]
    """The libraries that are imported first, and timed. The first one gives the contender its name."""
    reads: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    families: tuple[str, ...] = ("gpt2", "llama", "qwen2", "qwen3_moe")
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    """The largest difference of its logits that quantization explains, or None for that of the dtype."""
    needs_compiler: bool = False
    threads: int | None = None
    """Its number of computing threads, or None for that of the run."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """The environment variables of its process. None removes a variable of this process."""

    def why_not(self, shape: Shape, dtype: str) -> str | None:
        """Return the reason why it can't compute this model here, or None if it can."""
        for library in self.libraries:
            if importlib.util.find_spec(library) is None:
                return f"{library} isn't installed"
        if dtype not in self.dtypes:
            return f"it doesn't compute in {dtype} here"
        if shape.family not in self.families:
            return f"it doesn't know {shape.family}"
        if self.needs_compiler and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "there is no C++ compiler"
        return None


TORCH: Final = "splitbundle torch"
ONNXRUNTIME: Final = "splitbundle onnxruntime"
PREPACKED: Final = "splitbundle onnxruntime prepacked"
TRANSFORMERS: Final = "transformers"
COMPILED: Final = "transformers compiled"
GENAI: Final = "onnxruntime-genai"
GENAI_BUNDLE: Final = "onnxruntime-genai on the bundle"
LLAMA: Final = "llama.cpp"
LLAMA_FLASH: Final = "llama.cpp with flash attention"
TORCH_SHARDS: Final = "splitbundle torch in three shards"
ONNXRUNTIME_SHARDS: Final = "splitbundle onnxruntime in three shards"
TORCH_COMMAND: Final = "splitbundle torch as the command runs it"
TORCH_WAITING: Final = "splitbundle torch with torch's waiting"
TORCH_ONE: Final = "splitbundle torch with one thread"
TORCH_INT8: Final = "splitbundle torch int8"
TORCH_INT4: Final = "splitbundle torch int4"
ONNXRUNTIME_INT8: Final = "splitbundle onnxruntime int8"
ONNXRUNTIME_INT4: Final = "splitbundle onnxruntime int4"
COMMANDS: Final = {
    own: f"{own} as the command runs it" for own in (TORCH_INT8, TORCH_INT4, ONNXRUNTIME_INT8, ONNXRUNTIME_INT4)
}
LLAMA_INT8: Final = "llama.cpp Q8_0"
LLAMA_INT4: Final = "llama.cpp Q4_0, table Q8_0"
GENAI_INT4: Final = "onnxruntime-genai int4"
DEFAULT_WAITING: Final[dict[str, str | None]] = dict.fromkeys(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
"""An environment in which OpenMP's threads wait as the libraries set it, whatever this process has."""

_TORCH: Final[dict[str, Any]] = {"module": "contender_torch", "libraries": ("torch", "splitbundle")}
_ONNXRUNTIME: Final[dict[str, Any]] = {
    "module": "contender_onnxruntime",
    "libraries": ("onnxruntime", "splitbundle"),
    "dtypes": ("float32",),
}
_TRANSFORMERS: Final[dict[str, Any]] = {
    "module": "contender_transformers",
    "libraries": ("torch", "transformers"),
    "reads": "checkpoint",
}
_GENAI: Final[dict[str, Any]] = {
    "module": "contender_genai",
    "libraries": ("onnxruntime_genai",),
    "dtypes": ("float32",),
}
_LLAMA: Final[dict[str, Any]] = {
    "module": "contender_llama_cpp",
    "libraries": ("llama_cpp",),
    "reads": "gguf",
    "families": ("gpt2", "llama", "qwen2"),
}
_QUANTIZED: Final[dict[str, Any]] = {"dtypes": ("bfloat16",)}
"""The source of quantized weights is in bfloat16."""
_COMMAND: Final[dict[str, str | None]] = {
    **DEFAULT_WAITING,
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
}
"""The environment that ``splitbundle/__main__.py`` sets."""
_GIVES_WAY: Final = {"gives_way": True}
"""The command also lets torch compute with fewer threads where that is faster."""
CONTENDERS: Final[dict[str, Contender]] = {
    TORCH: Contender(**_TORCH, reads="bundle"),
    ONNXRUNTIME: Contender(**_ONNXRUNTIME, reads="bundle"),
    PREPACKED: Contender(**_ONNXRUNTIME, reads="bundle", options={"prepack": True}),
    TORCH_SHARDS: Contender(**_TORCH, reads="shards"),
    TORCH_COMMAND: Contender(**_TORCH, reads="bundle", environment=_COMMAND, options=_GIVES_WAY),
    TORCH_WAITING: Contender(**_TORCH, reads="bundle", environment=DEFAULT_WAITING),
    TORCH_ONE: Contender(**_TORCH, reads="bundle", environment=DEFAULT_WAITING, threads=1),
    ONNXRUNTIME_SHARDS: Contender(**_ONNXRUNTIME, reads="shards"),
    TRANSFORMERS: Contender(**_TRANSFORMERS),
    COMPILED: Contender(**_TRANSFORMERS, options={"compile": True}, needs_compiler=True),
    GENAI: Contender(**_GENAI, reads="genai", families=("llama", "qwen2")),
    GENAI_BUNDLE: Contender(**_GENAI, reads="bundle"),
    LLAMA: Contender(**_LLAMA),
    LLAMA_FLASH: Contender(**_LLAMA, options={"flash": True, "whole": True}),
    TORCH_INT8: Contender(**_TORCH, reads="int8", tolerance=0.2),
    TORCH_INT4: Contender(**_TORCH, reads="int4", tolerance=1.0),
    ONNXRUNTIME_INT8: Contender(**_ONNXRUNTIME | _QUANTIZED, reads="int8", tolerance=0.2),
    ONNXRUNTIME_INT4: Contender(**_ONNXRUNTIME | _QUANTIZED, reads="int4", tolerance=1.0),
    # The cache of llama.cpp is in float16, as by default.
    LLAMA_INT8: Contender(**_LLAMA | {"reads": "gguf-int8"}, options={"cache": 1}, tolerance=0.2),
    LLAMA_INT4: Contender(**_LLAMA | {"reads": "gguf-int4"}, options={"cache": 1}, tolerance=1.0),
    GENAI_INT4: Contender(**_GENAI | _QUANTIZED, reads="genai-int4", families=("llama", "qwen2"), tolerance=1.0),
}
for _own, _name in COMMANDS.items():
    _options = _GIVES_WAY if _own in (TORCH_INT8, TORCH_INT4) else {}
    CONTENDERS[_name] = replace(CONTENDERS[_own], environment=_COMMAND, options=_options)
