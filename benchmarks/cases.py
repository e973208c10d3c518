"""Measure one case: find the contenders that can run, compare their logits, and then measure round by round."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import file_sets, machine, sets
from benchmarks.computing import CHECKED, point_name
from benchmarks.contenders import CONTENDERS, DEFAULT_WAITING, TRANSFORMERS
from benchmarks.files import Workshop
from benchmarks.goals import Goal
from benchmarks.processes import ROOT, Failed, beside, interleaved, measured, require, say, warm
from benchmarks.shapes import SHAPES

RATES: Final = "the machine"
"""A contender that measures the rates of the machine, before and after the others. The better rate is the limit."""
_AFTER: Final = "the machine, again"
TOLERANCE: Final = {"float32": 1e-3, "bfloat16": 0.05}
"""The largest difference from transformers that is allowed, as a share of the largest logit. The weights are random,
and contenders use different precisions internally. A wrong model, rotation or layout gives a larger difference. Without
one norm or bias of GPT-2's layers 0, 6 and 11, the difference is 0.0016 or more. Without all norms or biases of a kind,
it is 0.04 or more for GPT-2 and 0.07 or more for Qwen 2, but 0.019 without the key biases of Qwen 2. The rounding of
bfloat16 hides these; the check in float32 finds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """The settings of all measurements."""

    workshop: Workshop
    threads: int
    rounds: int | None
    only: tuple[str, ...] | None
    lock: str | None

    def of_models(self, case: sets.Case) -> dict[str, Any]:
        """Measure a case that computes a model. Return its document for the results.

        Raises:
            Failed: The model can't be made here, or no contender is left.
            Missing: torch or transformers is not installed.
            KeyboardInterrupt: The run was interrupted before one round was complete.
        """
        require("torch", "transformers")
        shape = SHAPES[case.model]
        if why := self.workshop.why_not(case.model, case.dtype):
            raise Failed(why)
        checkpoint = self.workshop.make("checkpoint", case.model, case.dtype)
        left_out: dict[str, str] = {}
        tasks: dict[str, dict[str, Any]] = {}
        asked = [name for name in case.contenders if self.only is None or name in self.only]
        for name in asked:
            contender = CONTENDERS[name]
            why = contender.why_not(shape, case.dtype)
            try:
                path = None if why else self.workshop.make(contender.reads, case.model, case.dtype)
            except Failed as error:
                why = str(error)
            if why is not None:
                left_out[name] = why
                say(f"left out: {name}: {why}")
                continue
            tasks[name] = self._task(case, name, str(path))
        differences = self._check(case, tasks, checkpoint, left_out)
        warm(checkpoint, *(Path(task["path"]) for task in tasks.values()))
        contenders = {name: _runner("computing", task, case) for name, task in tasks.items()}
        if not contenders:
            raise Failed("nobody can compute it here")
        if case.points and not case.sample_memory and not case.busy:
            weights = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
            rates = _runner("limits", {"threads": self.threads, "file": str(weights)})
            contenders = {RATES: rates, **contenders, _AFTER: rates}
        found = machine.facts()
        runs, failed = self._rounds(contenders, case.rounds)
        runs = [_best_rates(run) for run in runs]
        derived = [run | sets.derive(case, run, run.get(RATES)) for run in runs]
        document = self._document(case.set, case.model, case.dtype, derived, case.rounds, case.goals, case.reference)
        figures = [name for point in case.points for name in _names(point)] if not case.sample_memory else []
        return document | {
            "machine": found,
            "figures": [*dict.fromkeys([*figures, *case.columns.values(), *case.figures])],
            "columns": case.columns,
            "only": None if self.only is None else list(self.only),
            "not run": [name for name in case.contenders if name not in asked],
            "left out": self._without_paths(left_out | failed),
            "differences": differences,
        }

    def of_files(self, name: str, model: str) -> dict[str, Any]:
        """Measure a set that computes no model. Return its document for the results.

        Raises:
            Failed, Missing, KeyboardInterrupt: As for ``of_models``.
        """
        if model and (why := self.workshop.why_not(model, "float32")):
            raise Failed(why)
        plan = file_sets.plan(name, model, self.workshop)
        found = machine.facts()
        rounds = file_sets.ROUNDS[name]
        runs, failed = self._rounds(plan.contenders, rounds)
        document = self._document(name, model, "float32" if model else "", runs, rounds, plan.goals, plan.reference)
        figures = list(plan.figures)
        left_out = self._without_paths(plan.left_out | failed)
        return document | {"machine": found, "figures": figures, "left out": left_out, "differences": {}}

    def _without_paths(self, reasons: dict[str, str]) -> dict[str, str]:
        """Remove the paths of the models and of this checkout from reasons, so that the reasons can be published."""
        places = {str(self.workshop.directory): "DIRECTORY", str(ROOT): "CHECKOUT"}
        return {
            name: functools.reduce(lambda text, place: text.replace(*place), places.items(), why)
            for name, why in reasons.items()
        }

    def _rounds(
        self, contenders: dict[str, Callable[[], dict[str, Any]]], own: int
    ) -> tuple[list[dict[str, dict[str, Any]]], dict[str, str]]:
        """Run the rounds. At least one contender besides the machine must succeed.

        Raises:
            Failed: All contenders failed.
            KeyboardInterrupt: The run was interrupted before a contender succeeded.
        """
        rounds = self.rounds or own
        runs, failed = interleaved(contenders, rounds, self.lock)
        if not runs[0].keys() - {RATES, _AFTER}:
            if len(runs) < rounds:
                raise KeyboardInterrupt
            raise Failed("; ".join(f"{name}: {why}" for name, why in failed.items()) or "nobody can be measured here")
        return runs, failed

    def _document(
        self,
        name: str,
        model: str,
        dtype: str,
        runs: list[dict[str, Any]],
        rounds: int,
        goals: tuple[Goal, ...],
        reference: str,
    ) -> dict[str, Any]:
        return {
            "set": name,
            "model": model,
            "dtype": dtype,
            "threads": self.threads,
            "rounds": len(runs),
            "rounds of the set": rounds,
            "interrupted": len(runs) < (self.rounds or rounds),
            "reference": reference,
            "goals": [goal.outcome(runs) for goal in goals],
            "runs": runs,
        }

    def _task(self, case: sets.Case, name: str, path: str) -> dict[str, Any]:
        contender = CONTENDERS[name]
        return {
            "module": contender.module,
            "libraries": contender.libraries,
            "options": contender.options,
            "path": path,
            "dtype": case.dtype,
            "threads": contender.threads or self.threads,
            "environment": (DEFAULT_WAITING if case.busy else {}) | contender.environment,
            "vocabulary": min(SHAPES[case.model].vocabulary, 50000),
            "capacity": case.capacity,
            "points": [point.task() for point in case.points],
            "sample_memory": case.sample_memory,
            "logits": False,
        }

    def _check(
        self, case: sets.Case, tasks: dict[str, dict[str, Any]], checkpoint: Path, left_out: dict[str, str]
    ) -> dict[str, float]:
        """Compare each contender's logits with those of eager transformers, and remove contenders that differ.

        The result of another project is remembered for its version and the checkpoint. splitbundle is compared each
        time, because its code may have changed.
        """
        record = self.workshop.directory / "checked.json"
        known = _remembered(record)
        stamp = f"{case.model} {case.dtype} {CHECKED} {checkpoint.stat().st_mtime_ns}"
        versions = machine.facts()["libraries"]
        asking = {"points": [], "logits": True, "capacity": max(case.capacity, CHECKED + 64)}
        wanted: list[float] | None = None
        differences: dict[str, float] = {}
        for name, task in list(tasks.items()):
            if name == TRANSFORMERS:
                continue
            key = f"{name} {stamp} {Path(task['path']).stat().st_mtime_ns} {versions}"
            if name.startswith("splitbundle") or key not in known:
                say(f"checking: {name}")
                try:
                    if wanted is None:
                        reference = self._task(case, TRANSFORMERS, str(checkpoint))
                        wanted = measured("computing", reference | asking)["logits"]
                    got = measured("computing", task | asking)["logits"]
                except Failed as error:
                    left_out[name] = str(error)
                    say(f"left out: {name}: {error}")
                    del tasks[name]
                    continue
                known[key] = difference(got, wanted)
                record.write_text(json.dumps(known, indent=1), "utf-8")
            differences[name] = known[key]
            most = CONTENDERS[name].tolerance or TOLERANCE[case.dtype]
            if not known[key] <= most:
                told = f"{known[key]:.2g} of the largest logit, and may by {most:g}"
                left_out[name] = f"its logits differ from transformers' by {told}"
                say(f"left out: {name}: {left_out[name]}")
                del tasks[name]
        return differences


def _remembered(record: Path) -> dict[str, float]:
    """Return the differences of earlier runs, or none if the file is absent or incomplete."""
    try:
        known: dict[str, float] = json.loads(record.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known


def difference(got: list[float], wanted: list[float]) -> float:
    """Return the greatest difference as a share of the largest logit. Return infinity for another length or NaN."""
    if len(got) != len(wanted) or not all(map(math.isfinite, (*got, *wanted))):
        return float("inf")
    largest = max(map(abs, wanted))
    return max(abs(a - b) for a, b in zip(got, wanted, strict=True)) / largest


def _best_rates(run: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = [run[name] for name in (RATES, _AFTER) if name in run]
    others = {name: own for name, own in run.items() if name not in (RATES, _AFTER)}
    return others | ({RATES: {name: max(each[name] for each in found) for name in found[0]}} if found else {})


def _names(point: sets.Point) -> list[str]:
    names = [point_name("prefill", point.context, point.batch)] if point.prefills > 1 else []
    return [*names, point_name("decode", point.context, point.batch)] if point.tokens else names


def _runner(module: str, task: dict[str, Any], case: sets.Case | None = None) -> Callable[[], dict[str, Any]]:
    """Return what measures a task, once for each number of busy processes of the case, each time in a fresh process."""

    def measure() -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for count in (case.busy if case else ()) or (0,):
            with beside(count):
                found = measured(module, task)
            figures |= {sets.beside_name(name, count): value for name, value in found.items()}
        return figures

    return measure
