"""Results of the original models, from the bundles and the files of calls in ``numbers/``."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import HERE, Case

NUMBERS = HERE / "numbers"
TOLERANCE = 1e-5
"""Of the largest magnitude of the tensor that is compared (SB-C-001)."""


def number_cases() -> Iterator[Case]:
    """Yield one case for each file of calls."""
    for path in sorted(NUMBERS.glob("*/calls.json")):
        document = json.loads(path.read_text("utf-8"))
        yield Case(
            name=f"numbers/{path.parent.name}",
            about=document["about"],
            rules=tuple(document["rules"]),
            steps=("numbers",),
            make=_copier(path.parent, document),
            compare=_comparer(document),
        )


def _copier(source: Path, document: dict[str, Any]) -> Callable[[Path], None]:
    """Write the bundle, and the calls without what is expected of them."""

    if not (source / "model.splitbundle" / "manifest.json").is_file():
        raise ValueError(f"{source} has no model.splitbundle: the copy of the kit isn't whole")

    def make(root: Path) -> None:
        shutil.copytree(source / "model.splitbundle", root / "model.splitbundle")
        asked = [
            {
                "cuts": case["cuts"],
                "calls": [{k: v for k, v in call.items() if k != "expect"} for call in case["calls"]],
            }
            for case in document["cases"]
        ]
        (root / "calls.json").write_text(json.dumps({"cases": asked}), "ascii")

    return make


def _comparer(document: dict[str, Any]) -> Callable[[Any], str | None]:
    def compare(answer: Any) -> str | None:
        cases = answer.get("cases") if isinstance(answer, dict) else None
        if not isinstance(cases, list) or len(cases) != len(document["cases"]):
            return f"expected {len(document['cases'])} cases, got {str(answer)[:100]}"
        for i, (case, given) in enumerate(zip(document["cases"], cases, strict=True)):
            if not isinstance(given, list) or len(given) != len(case["calls"]):
                return f"case {i}: expected {len(case['calls'])} calls"
            for j, (call, got) in enumerate(zip(case["calls"], given, strict=True)):
                found = _call_wrong(call["expect"], got)
                if found is not None:
                    return f"case {i} ({case['about']}), call {j}: {found}"
        return None

    return compare


def _call_wrong(expect: dict[str, Any], got: Any) -> str | None:
    """Compare a call: a refusal by its code; otherwise hidden states at each cut and logits, row by row."""
    if not isinstance(got, dict):
        return f"expected an object, got {str(got)[:100]}"
    if "code" in expect or "code" in got:
        found = got.get("code", "results")
        return None if found == expect.get("code") else f"expected {expect.get('code', 'results')}, got {found}"
    if not expect:
        return None
    hidden = got.get("hidden")
    if not isinstance(hidden, list) or len(hidden) != len(expect["hidden"]):
        return f"hidden: expected the states at {len(expect['hidden'])} cuts"
    largest = 0.0  # of the hidden states so far: layers add to them, so each keeps the rounding of the largest
    for cut, (wanted, given) in enumerate(zip(expect["hidden"], hidden, strict=True)):
        largest = max([largest, *map(abs, _flat(wanted))])
        if (found := _off(wanted, given, largest)) is not None:
            return f"hidden at cut {cut}: {found}"
    found = _off(expect["logits"], got.get("logits"), max(map(abs, _flat(expect["logits"])), default=0.0))
    return found and f"logits: {found}"


def _off(wanted: Any, given: Any, largest: float) -> str | None:
    numbers, others = list(_flat(wanted)), list(_flat(given))
    if len(numbers) != len(others) or not all(isinstance(n, int | float) and math.isfinite(n) for n in others):
        return f"expected {len(numbers)} finite numbers, got {len(others)} values"
    off = max((abs(a - b) for a, b in zip(numbers, others, strict=True)), default=0.0)
    return f"differs by {off / largest:.2e} of the largest value" if off > TOLERANCE * largest else None


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value
