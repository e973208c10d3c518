"""The JavaScript reader and decoder: their own tests, the conformance kit, and a decoder written from the text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import torch

from conformance import run
from conformance.cases import cases
from conformance.number_calls import number_cases
from conformance.wire_frames import wire_cases
from tests.support import javascript_reader
from tests.support.javascript_reader import ADAPTER
from tests.support.paths import TESTS
from tests.support.second_decoder import Reference, made
from tests.support.variants import VARIANTS, facts

SECONDS: Final = 120
TOLERANCE: Final = 1e-5
REASON: Final = javascript_reader.missing()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=REASON or ""), pytest.mark.usefixtures("one_thread")]


def test_its_own_tests() -> None:
    tests = sorted(str(path) for path in (TESTS / "browser").glob("*.test.mjs"))
    done = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


@pytest.fixture
def ask() -> Iterator[run.Ask]:
    """One process that answers every question of a test."""
    with javascript_reader.serving() as answer:
        yield answer


def test_the_conformance_kit(tmp_path: Path, ask: run.Ask, tally: Callable[[str, int], None]) -> None:
    results = [result for case in cases() for result in run.judge(case, tmp_path, ask)]
    assert [(r["name"], r["step"], r["wrong"]) for r in results if r["wrong"]] == []
    assert len(results) > 1000
    tally("verdicts of the conformance kit as expected, in JavaScript", sum(not r["skipped"] for r in results))


def test_the_frames_and_encodings_of_the_protocol(tmp_path: Path, ask: run.Ask) -> None:
    results = [result for case in wire_cases() for result in run.judge(case, tmp_path, ask)]
    assert [(r["name"], r["step"], r["wrong"]) for r in results if r["wrong"]] == []
    assert len(results) > 150


def test_the_results_of_the_original_models(tmp_path: Path, ask: run.Ask) -> None:
    results = [result for case in number_cases() for result in run.judge(case, tmp_path, ask)]
    assert [(r["name"], r["wrong"]) for r in results if r["wrong"]] == []
    assert len(results) > 20


def test_limited_cases_take_little_memory_and_time() -> None:
    """A few of them. The kit itself, run by hand, measures all."""
    chosen = ["large/files-500000", "large/values-600000", "header/many"]
    only = [word for name in chosen for word in ("--only", name)]
    command = [sys.executable, str(ADAPTER.parent / "run.py"), "--jobs", "1", *only, "node", str(ADAPTER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.rule("SB-C-001", "SB-C-002")
def test_the_decoder_computes_what_the_text_says() -> None:
    names = ["gpt2", "llama3", *VARIANTS]
    models = {name: (facts(name), *made(facts(name))) for name in names}
    given = [
        {
            "architecture": json.loads(architecture.to_bytes()),
            "tensors": {key: {"shape": list(t.shape), "data": t.flatten().tolist()} for key, t in tensors.items()},
            "ids": ids[0].tolist(),
        }
        for architecture, tensors, ids in models.values()
    ]
    command = ["node", str(TESTS / "browser" / "variants.mjs")]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True, timeout=SECONDS)
    worst: dict[str, float] = {}
    for (name, (architecture, tensors, ids)), results in zip(models.items(), json.loads(done.stdout), strict=True):
        largest = 0.0
        for got, wanted in zip(results, Reference(architecture, tensors).run(ids[0].tolist()), strict=True):
            expected = torch.tensor(wanted, dtype=torch.float64).flatten()
            # Logits are compared with logits alone, hidden states also with those before them (SB-C-001).
            logits = got is results[-1]
            largest = float(expected.abs().max()) if logits else max(largest, float(expected.abs().max()))
            off = float((torch.tensor(got, dtype=torch.float64) - expected).abs().max()) / largest
            worst[name] = max(worst.get(name, 0.0), off)
    assert {name: off for name, off in worst.items() if not off < TOLERANCE} == {}
