"""Describe the machine of the figures: processor, memory, system, and the versions of the libraries."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import ROOT

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
_LEVELS: Final = {"amx_tile": "amx", "avx512f": "avx512", "avx2": "avx2", "sve": "sve", "asimd": "neon"}
"""The instructions that tell processors of one name apart -> their short name. The first present one counts."""
_MARKS: Final = re.compile(r"\((R|TM|C)\)|\b(\d+-Core|CPU|Processor)\b|@.*|\bwith .*", re.IGNORECASE)
"""What a processor's name has besides its name."""


def facts() -> dict[str, Any]:
    """Return the facts that the system tells. A fact that it does not tell is absent."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "libraries": {name: version for name in _DISTRIBUTIONS if (version := _version(name))},
    }
    found |= {"splitbundle": _splitbundle()}
    if said := _llama():
        found["llama.cpp"] = said
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
    """Return the facts as a sentence."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    memory = f", {found['memory'] / 2**30:.0f} GiB" if "memory" in found else ""
    processor = f"{found.get('processor', 'unknown processor')} ({', '.join(found['instructions'])})"
    own = found.get("splitbundle", {})  # documents of older versions lack it
    commit = f" of {own['commit'][:12]}{', changed' if own['changed'] else ''}" if "commit" in own else ""
    libraries = f"splitbundle {own['version']}{commit}, {libraries}" if own else libraries
    llama = f"; llama.cpp: {found['llama.cpp']}" if "llama.cpp" in found else ""
    system = f"{found['system']}; Python {found['python']}"
    return f"{found['cores']} cores of {processor}{memory}; {system}; {libraries}{llama}"


def processor(found: dict[str, Any]) -> str:
    """Return a short name of the processor: ``Intel Xeon (amx)``. Without a name, the system and its architecture."""
    system = found["system"].split()
    name = " ".join(_MARKS.sub(" ", found.get("processor", "")).split()) or f"{system[0]} {system[-1]}"
    level = next((short for flag, short in _LEVELS.items() if flag in found["instructions"]), None)
    return f"{name} ({level})" if level else name


def tag(found: dict[str, Any]) -> str:
    """Return the processor's name as a part of a file's name: ``intel-xeon-amx``."""
    return "-".join(re.findall(r"[a-z0-9]+", processor(found).lower()))


@functools.cache
def _splitbundle() -> dict[str, Any]:
    """Return the measured version. For a checkout, also return the commit, and whether its files differ from it."""
    import splitbundle

    found: dict[str, Any] = {"version": splitbundle.__version__}
    # A copy in site-packages has no commit.
    if not Path(splitbundle.__file__).is_relative_to(ROOT / "runtime") or not (ROOT / ".git").exists():
        return found
    commit = _said("git", "rev-parse", "HEAD")
    # The results of measurements are not a change of the measured code.
    changed = _said("git", "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return found if commit is None or changed is None else found | {"commit": commit, "changed": bool(changed)}


@functools.cache
def _llama() -> str | None:
    """Return the build information of llama.cpp, read in a separate process, or None."""
    if _version("llama-cpp-python") is None:
        return None
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    return _said(sys.executable, "-c", code)


def _said(*command: str) -> str | None:
    """Return the output of a command, or None if it fails or is not installed."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(path: str) -> dict[str, str]:
    """Return the lines ``name: value`` of a file by name. The first line of each name counts."""
    if not Path(path).exists():
        return {}
    pairs = (line.partition(":") for line in Path(path).read_text("utf-8", "replace").splitlines())
    found: dict[str, str] = {}
    for name, _, value in pairs:
        found.setdefault(name.strip(), value.strip())
    return found
