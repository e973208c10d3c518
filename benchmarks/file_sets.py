"""The sets of the benchmark that compute no model: importing, converting, verifying, and file sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.files import Workshop
from benchmarks.goals import Goal, Term
from benchmarks.processes import Failed, measured, require, say, seconds, warm
from benchmarks.shapes import ITEM, SHAPES

Measure = Callable[[], dict[str, Any]]
NAMES: Final = ("import", "convert", "size", "verify", "resplit")
MODELS: Final = {
    "import": ("",),
    "convert": ("gpt2", "qwen2-0.5b"),
    "size": ("gpt2",),
    "verify": ("qwen2-0.5b",),
    "resplit": ("qwen2-0.5b",),
}
"""The name of a set -> its default models. Importing reads no model."""
ROUNDS: Final = {"import": 10, "convert": 5, "size": 1, "verify": 7, "resplit": 5}

PASS: Final = "python -c pass"
CONFIGURATION: Final = "the configuration, by transformers"
COPY: Final = "cp, sync, openssl"
CONVERT: Final = "splitbundle convert"
COPY_AND_HASH: Final = "cp, openssl"
RESPLIT: Final = "splitbundle resplit"
PARAMETERS: Final = "the parameters"
BUNDLE: Final = "splitbundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The contenders of a set, their figures, and the goals."""

    contenders: dict[str, Measure]
    reference: str
    figures: tuple[str, ...]
    goals: tuple[Goal, ...]
    left_out: dict[str, str] = field(default_factory=dict)


def plan(name: str, model: str, workshop: Workshop) -> Plan:
    """Return the plan of a set.

    Raises:
        Failed: The set can't be measured here.
        Missing: A library is not installed.
    """
    plans = {"import": _import, "convert": _convert, "size": _size, "verify": _verify, "resplit": _resplit}
    return plans[name](model, workshop)


def _import(model: str, workshop: Workshop) -> Plan:
    codes = {
        PASS: "pass",
        "import splitbundle": "import splitbundle",
        "import torch": "import torch",
        "import onnxruntime": "import onnxruntime",
        "transformers, the class of a model": "from transformers import GPT2LMHeadModel",
    }
    left_out = {}
    for name, code in list(codes.items()):
        try:
            seconds([sys.executable, "-c", code])  # this writes the .pyc files, and reads all files once
        except Failed as error:
            del codes[name]
            left_out[name] = str(error)
            say(f"left out: {name}: {error}")
    goal = Goal(
        what="import splitbundle, more than python -c pass",
        own=Term("import splitbundle", "process"),
        less=(Term(PASS, "process"),),
        at_most=0.04,
    )
    contenders = {name: _timed("process", [sys.executable, "-c", code]) for name, code in codes.items()}
    return Plan(contenders=contenders, reference=PASS, figures=("process",), goals=(goal,), left_out=left_out)


def _timed(figure: str, command: list[str]) -> Measure:
    return lambda: {figure: seconds(command)}


def _convert(model: str, workshop: Workshop) -> Plan:
    _openssl()
    require("torch", "transformers")
    source = workshop.make("checkpoint", model, "float32")
    read = f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(source)!r})"
    output = workshop.directory / f"converting-{os.getpid()}.splitbundle"  # another run may use the same directory
    copy = workshop.directory / f"copying-{os.getpid()}"

    def convert() -> dict[str, float]:
        _remove(output)
        command = [
            sys.executable,
            "-m",
            "splitbundle",
            "convert",
            str(source),
            "-o",
            str(output),
            "--no-check",
            "--quiet",
        ]
        try:
            return {"process": seconds(command)}
        finally:
            _remove(output)

    def by_hand() -> dict[str, float]:
        """Copy and hash. ``sync`` gets the names of the files, so it does not wait for files of other programs."""
        _remove(copy)
        command = 'cp -r "$0" "$1" && sync "$1"/* && openssl dgst -sha256 "$1"/*.safetensors'
        try:
            return {"process": seconds(["sh", "-c", command, str(source), str(copy)])}
        finally:
            _remove(copy)

    warm(source)
    goal = Goal(
        what="converting without the check, less the time for transformers' configuration",
        own=Term(CONVERT, "process"),
        less=(Term(CONFIGURATION, "process"),),
        against=Term(COPY, "process"),
        share=True,
        at_most=1.5,
    )
    contenders = {COPY: by_hand, CONVERT: convert, CONFIGURATION: _timed("process", [sys.executable, "-c", read])}
    goals = (goal,) if model == "qwen2-0.5b" else ()  # the goal is for 2 GB: for less, the start-up time dominates
    return Plan(contenders=contenders, reference=COPY, figures=("process",), goals=goals)


def _size(model: str, workshop: Workshop) -> Plan:
    import splitbundle

    bundle = splitbundle.open(workshop.make("bundle", model, "float32"))
    files = [path for path in bundle.manifest.files if path.endswith(".safetensors")]
    size = sum(bundle.manifest.files[path].size for path in files)
    found = {PARAMETERS: SHAPES[model].parameters() * ITEM["float32"], BUNDLE: size}
    goal = Goal(
        what="weight files, of the bytes of the parameters",
        own=Term(BUNDLE, "bytes"),
        against=Term(PARAMETERS, "bytes"),
        share=True,
        at_most=1.001,
    )
    contenders = {name: _constant(value) for name, value in found.items()}
    return Plan(contenders=contenders, reference=PARAMETERS, figures=("bytes",), goals=(goal,))


def _constant(value: float) -> Measure:
    return lambda: {"bytes": value}


def _verify(model: str, workshop: Workshop) -> Plan:
    _openssl()
    if not hasattr(os, "sched_setaffinity"):
        raise Failed("this system doesn't say on which cores a process runs")
    bundle = workshop.make("bundle", model, "float32")
    warm(bundle)
    cores = sorted(os.sched_getaffinity(0))
    counts = (1, len(cores)) if len(cores) > 1 else (1,)
    contenders: dict[str, Measure] = {}
    goals = []
    for count in counts:
        names = [f"{what} on {count} core{'s' if count > 1 else ''}" for what in ("openssl", "verify")]
        for name in names:
            task = {"what": name.partition(" ")[0], "bundle": str(bundle), "cores": cores[:count]}
            contenders[name] = _in_process(task)
        goals.append(
            Goal(
                what=names[1]
                + ("" if count == 1 else ", against as many processes of openssl with shares of the files"),
                own=Term(names[1], "files"),
                against=Term(names[0], "files"),
                at_least=0.9,
            )
        )
    return Plan(contenders=contenders, reference="openssl on 1 core", figures=("files",), goals=tuple(goals))


def _resplit(model: str, workshop: Workshop) -> Plan:
    """Copy a bundle without graphs to other cuts, and hash each copy. A peer that waits for the disk does as much."""
    _openssl()
    import splitbundle_converter

    bundle = workshop.directory / f"without-graphs-{model}.splitbundle"
    # Graphs are written anew, which takes seconds for importing torch and onnx. Small models would measure that.
    made = workshop.make("bundle", model, "float32")
    splitbundle_converter.resplit(made, bundle, onnx=False, genai=False, force=True)
    output = workshop.directory / f"cutting-{os.getpid()}.splitbundle"
    copy = workshop.directory / f"copying-{os.getpid()}"
    command = [sys.executable, "-m", "splitbundle", "resplit", str(bundle), "-o", str(output), "--split", "3,9", "-q"]

    def resplit() -> dict[str, float]:
        _remove(output)
        try:
            return {"process": seconds(command)}
        finally:
            _remove(output)

    def by_hand(flush: str) -> dict[str, float]:
        _remove(copy)
        script = f'cp -r --reflink=never "$0" "$1" {flush} && find "$1" -type f -exec openssl dgst -sha256 {{}} +'
        try:
            return {"process": seconds(["sh", "-c", script, str(bundle), str(copy)])}
        finally:
            _remove(copy)

    warm(bundle)
    goals = tuple(
        Goal(
            what=f"cutting again, with the digest of each copy, against {other}",
            own=Term(RESPLIT, "process"),
            against=Term(other, "process"),
            share=True,
            at_most=1.0,
        )
        for other in (COPY_AND_HASH, COPY)
    )
    contenders: dict[str, Measure] = {
        COPY_AND_HASH: lambda: by_hand(""),
        COPY: lambda: by_hand('&& find "$1" -type f -exec sync {} +'),
        RESPLIT: resplit,
    }
    # The goals are for 2 GB: for less, the start-up time dominates.
    goals = goals if model == "qwen2-0.5b" else ()
    return Plan(contenders=contenders, reference=COPY_AND_HASH, figures=("process",), goals=goals)


def _in_process(task: dict[str, Any]) -> Measure:
    return lambda: measured("file_sets", task)


def measure(task: dict[str, Any]) -> dict[str, float]:
    """Return the seconds to hash a bundle's files on some cores, with ``verify`` in this process or with openssl."""
    import splitbundle

    os.sched_setaffinity(0, task["cores"])
    bundle, count = splitbundle.open(task["bundle"]), len(task["cores"])
    # The largest file comes first, and each file goes to the smallest share. So the shares have about the same size.
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for path, file in sorted(bundle.manifest.files.items(), key=lambda item: -item[1].size):
        least = loads.index(min(loads))
        shares[least].append(str(Path(task["bundle"]) / path))
        loads[least] += file.size
    start = time.perf_counter()
    if task["what"] == "verify":
        bundle.verify()
    else:
        running = [
            subprocess.Popen(["openssl", "dgst", "-sha256", *share], stdout=subprocess.DEVNULL) for share in shares
        ]
        if any(process.wait() for process in running):
            raise Failed("openssl failed")
    return {"files": time.perf_counter() - start}


def cases(name: str, models: tuple[str, ...] | None) -> Iterator[str]:
    """Return the models of a set."""
    yield from MODELS[name] if models is None or name == "import" else models


def _openssl() -> None:
    if shutil.which("openssl") is None:
        raise Failed("there is no openssl to compare with")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
