"""Run the conformance kit: make each case's directory, ask an adapter, and report unexpected results.

    python tests/conformance/run.py [options] COMMAND …

COMMAND is the adapter: any program, with its first arguments. README.md has the protocol. This file uses only the
standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conformance import process
from conformance.case import TINY, Case
from conformance.cases import cases, number_cases, wire_cases
from conformance.process import Trouble, shown

Ask = Callable[[str, Path, bool], Any]
"""Step, directory, whether the case is limited -> the verdict."""
OK, USAGE, FAILED = 0, 2, 3
SECONDS, MEMORY = 10, 256 * 2**20
"""The limits of a reader for a limited case, beyond its figures for the small bundle.

The seconds are those of the processor, so that other programs don't count. They are generous, for slow machines. They
catch a reader whose time grows with the square of its input. ``--timeout`` catches one that doesn't end.
"""
TRIES = 3
LONGEST_TIMEOUT = 86400


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 if every verdict is as expected, 3 if not."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--schema", action="store_true", help="the adapter is a JSON Schema: no codes, documents only")
    parser.add_argument("--only", metavar="TEXT", action="append", help="cases whose name has this (repeatable)")
    parser.add_argument("--timeout", type=_duration, default=60, help="seconds for a case (default: %(default)s)")
    parser.add_argument(
        "--limit", type=_duration, default=SECONDS, help="seconds for a limited case (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, help="at once (default: %(default)s)")
    parser.add_argument("--wire", action="store_true", help="also frames of the protocol, and the bytes of encodings")
    parser.add_argument("--numbers", action="store_true", help="also the results of the original models")
    parser.add_argument("--failed", metavar="FILE", help="cases that were wrong in FILE, an earlier output of --json")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--list", action="store_true", help="print the cases and the expected verdicts, and ask no reader"
    )
    parser.add_argument("--write", metavar="DIRECTORY", help="write the cases' directories there, and ask no reader")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the adapter")
    args = parser.parse_args(argv)
    known = [*cases(), *(wire_cases() if args.wire else ()), *(number_cases() if args.numbers else ())]
    chosen = [case for case in known if not args.only or any(text in case.name for text in args.only)]
    if args.failed:
        names = _failed(parser, Path(args.failed))
        chosen = [case for case in chosen if case.name in names]
    command = [word for i, word in enumerate(args.command) if i or word != "--"]
    if args.list or args.write:
        for case in chosen:
            if args.write:
                make(case, Path(args.write))
            print(json.dumps(described(case)))
        return OK
    if not command or not chosen:
        parser.error("no adapter" if chosen else "no such case")
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max_workers=args.jobs) as pool:
        ask = Adapter(command, args.timeout, Path(temporary), args.limit)
        futures = [pool.submit(judge, case, Path(temporary), ask, schema=args.schema, clock=True) for case in chosen]
        progress = Progress(len(chosen))
        results = []
        for future in futures:
            results += future.result()
            progress.show(results)
        progress.end()
    return report(results, as_json=args.json)


def _failed(parser: argparse.ArgumentParser, place: Path) -> set[str]:
    """Return the names of the cases that were wrong in an earlier run."""
    try:
        return {result["name"] for result in json.loads(place.read_bytes())["results"] if result["wrong"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{place} isn't an output of --json ({type(error).__name__})")


class Progress:
    """Says on stderr how far a run is: on one line of a terminal, and otherwise every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.shown = total, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()

    def show(self, results: list[dict[str, Any]]) -> None:
        """Say it, if it is time."""
        self.done += 1
        now = time.monotonic()
        if now - self.shown > (0.2 if self.terminal else 10):
            self.shown = now
            wrong = sum(bool(result["wrong"]) for result in results)
            line = f"{self.done} of {self.total} cases, {wrong} not as expected"
            print(
                f"\r{line}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
            )

    def end(self) -> None:
        """Clear the line of a terminal."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def described(case: Case) -> dict[str, object]:
    """Return the line of ``--list`` for a case."""
    said = {key: getattr(case, key) for key in ("name", "about", "rules", "steps", "code", "file", "schema", "limited")}
    return said | ({"pointer": case.pointer} if case.points else {})


class Adapter:
    """Asks a program: ``COMMAND … STEP DIRECTORY``. For limited cases, it measures the program's time and memory."""

    def __init__(self, command: Sequence[str], timeout: float, parent: Path, limit: float = SECONDS) -> None:
        self.command, self.timeout, self.parent, self.limit = command, timeout, parent, limit
        self.lock = threading.Lock()
        self.small: dict[str, tuple[float, int]] = {}

    def __call__(self, step: str, directory: Path, limited: bool) -> Any:
        answer = process.ask([*self.command, step, str(directory)], self.timeout)
        seconds = answer.seconds
        if not limited or seconds is None or answer.memory is None:
            return answer.document
        usual_seconds, usual_memory = self.usual(step)
        for _ in range(TRIES - 1):  # on a shared machine, even the processor's time varies
            if seconds > usual_seconds + self.limit:
                again = process.ask([*self.command, step, str(directory)], self.timeout)
                seconds = min(seconds, again.seconds or seconds)
        if seconds > usual_seconds + self.limit:
            raise Trouble(f"took {seconds:.1f} s of the processor, and for the small bundle {usual_seconds:.1f} s")
        if answer.memory > usual_memory + MEMORY:
            raise Trouble(f"took {answer.memory >> 20} MiB, and for the small bundle {usual_memory >> 20} MiB")
        return answer.document

    def usual(self, step: str) -> tuple[float, int]:
        """Return the program's seconds of the processor and bytes for the small bundle, including its own start."""
        with self.lock:
            if step not in self.small:
                with tempfile.TemporaryDirectory(dir=self.parent, ignore_cleanup_errors=True) as fresh:
                    try:
                        small = shutil.copytree(TINY, Path(fresh, "tiny.splitbundle"))
                        answer = process.ask([*self.command, step, str(small)], self.timeout)
                    except Trouble:
                        self.small[step] = 0, 0
                    else:
                        self.small[step] = answer.seconds or 0, answer.memory or 0
            return self.small[step]


def make(case: Case, parent: Path) -> Path | None:
    """Make the case's directory; None if this system can't have it."""
    place = parent / case.name.replace("/", "-")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    root = place / "tiny.splitbundle"
    try:
        case.make(root)
    except (OSError, NotImplementedError, AttributeError):  # devices, pipes, links, files of terabytes
        return None
    return root


def judge(case: Case, parent: Path, ask: Ask, *, schema: bool = False, clock: bool = False) -> list[dict[str, Any]]:
    """Return one result for each step of a case: its name, the step, ``wrong`` (the fault, or None), seconds.

    Each step has its own directory, so an adapter that changes it changes no other result.
    """
    results = []
    for step in case.steps:
        if schema and step != "open":
            continue
        with tempfile.TemporaryDirectory(prefix="", dir=parent, ignore_cleanup_errors=True) as fresh:
            root = make(case, Path(fresh))
            result: dict[str, Any] = {"name": case.name, "step": step, "wrong": None, "skipped": root is None}
            start = time.monotonic()
            if root is not None:
                try:
                    verdict = ask(step, root, case.limited and not schema)
                    judged = case.compare if case.compare is not None and not schema else None
                    result["wrong"] = (
                        judged(verdict) if judged else _schema_wrong(case, verdict) if schema else wrong(case, verdict)
                    )
                except Trouble as trouble:
                    result["wrong"] = str(trouble)
            result["seconds"] = round(time.monotonic() - start, 3) if clock else None
        results.append(result)
    return results


def wrong(case: Case, verdict: Any) -> str | None:
    """Return why a reader's verdict is unexpected."""
    kind = verdict.get("verdict") if isinstance(verdict, dict) else None
    problems = verdict.get("problems") if kind == "refused" else []
    listed = isinstance(problems, list) and all(isinstance(problem, dict) for problem in problems)
    if kind not in ("accepted", "refused") or not listed or (kind == "refused" and not problems):
        return f"expected a verdict, got {shown(verdict)}"
    if case.code is None:
        return f"expected accepted, got {_short(problems[0])}" if problems else None
    if not problems:
        return f"expected {case.code}, got accepted"
    first = problems[0]
    good = (
        first.get("code") == case.code
        and (case.file is None or first.get("file") == case.file)
        and (not case.points or first.get("pointer") == case.pointer)
        and (case.argument is None or first.get("argument") == case.argument)
    )
    at = f" at {case.pointer!r}" if case.points else ""
    return None if good else f"expected {case.code} of {case.file}{at}, got {_short(first)}"


def _schema_wrong(case: Case, verdict: Any) -> str | None:
    said = verdict.get("verdict") if isinstance(verdict, dict) else None
    wanted = {"accept": {"accepted"}, "reject": {"refused"}, "silent": {"accepted", "unable"}}[case.schema]
    if case.limited or (case.code or "").startswith("json.") or not case.name.startswith(("accept/", "reject/")):
        wanted = {"accepted", "refused", "unable"}  # parsers may make anything of a document that isn't strict JSON
    good = isinstance(said, str) and said in wanted
    return None if good else f"expected {' or '.join(sorted(wanted))}, got {shown(said)}"


def _short(problem: Any) -> str:
    return " ".join(shown(problem.get(key)) for key in ("code", "file", "pointer") if problem.get(key) is not None)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _duration(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise ValueError(text)
    return seconds


def report(results: list[dict[str, Any]], *, as_json: bool) -> int:
    """Print the results, and return the exit status."""
    failed = [result for result in results if result["wrong"]]
    skipped = [result for result in results if result["skipped"]]
    if as_json:
        print(json.dumps({"ok": not failed, "verdicts": len(results) - len(skipped), "results": results}))
        return FAILED if failed else OK
    for result in failed:
        print(f"{result['name']} ({result['step']}): {result['wrong']}")
    for group in sorted({result["name"].partition("/")[0] for result in results}):
        own = [result for result in results if result["name"].startswith(f"{group}/")]
        counts = Counter("skipped" if r["skipped"] else "wrong" if r["wrong"] else "right" for r in own)
        print(f"{group:10} " + ", ".join(f"{counts[what]} {what}" for what in ("right", "wrong", "skipped")))
    print(f"{len(results) - len(skipped)} verdicts, {len(failed)} not as expected")
    return FAILED if failed else OK


if __name__ == "__main__":
    sys.exit(main())
