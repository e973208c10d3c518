"""What the figures are of: processor, memory, system, and the versions of what was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Final

_DISTRIBUTIONS: Final = (
    "torch",
    "onnxruntime",
    "numpy",
    "transformers",
    "safetensors",
    "onnxruntime-genai",
    "llama-cpp-python",
)
_SETS: Final = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "sha_ni",
    "asimd",
    "bf16",
    "sve",
)


def facts() -> dict[str, Any]:
    """As the system tells them; what it doesn't tell isn't there."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "libraries": {name: version for name in _DISTRIBUTIONS if (version := _version(name))},
    }
    if hasattr(os, "getloadavg"):
        found["load before"] = round(os.getloadavg()[0], 2)
    cpu = _lines("/proc/cpuinfo")
    if "model name" in cpu:
        found["processor"] = cpu["model name"]
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    found["instructions"] = [name for name in _SETS if name in flags]
    if "MemTotal" in (memory := _lines("/proc/meminfo")):
        found["memory"] = int(memory["MemTotal"].split()[0]) * 1024
    return found


def text(found: dict[str, Any]) -> str:
    """The same as a sentence."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    memory = f", {found['memory'] / 2**30:.0f} GiB" if "memory" in found else ""
    processor = f"{found.get('processor', 'unknown processor')} ({', '.join(found['instructions'])})"
    return f"{found['cores']} cores of {processor}{memory}; {found['system']}; Python {found['python']}; {libraries}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> dict[str, str]:
    """``name: value`` by name, the first of each."""
    if not Path(path).exists():
        return {}
    pairs = (line.partition(":") for line in Path(path).read_text("utf-8", "replace").splitlines())
    found: dict[str, str] = {}
    for name, _, value in pairs:
        found.setdefault(name.strip(), value.strip())
    return found
