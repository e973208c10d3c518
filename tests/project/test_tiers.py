"""The configurations that stand for others in ``make test`` have what those have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY, bundle
from tests.support.tiers import EVERY_FACT, FEW, FEW_EXPERTS, TWO_PER_FAMILY, USUAL, WITH_EXPERTS


def facts(value: Any, pointer: str = "") -> Iterator[str]:
    """Yield each fact of an architecture. Of a number it is told only whether it is 0, 1 or another one."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from facts(inner, f"{pointer}/{'*' if pointer == '/layer_kinds' else name}")
    elif isinstance(value, bool | str | None):
        yield f"{pointer}={value}"
    elif isinstance(value, int | float):
        yield f"{pointer}={value if value in (0, 1) else 'another'}"


def facts_of(name: str) -> set[str]:
    return set(facts(json.loads((bundle(name).path / "architecture.json").read_text("utf-8"))))


def test_every_fact_is_among_the_few_that_stand_for_all() -> None:
    """Where this fails, add the configuration that has the fact to ``EVERY_FACT``."""
    stand = set().union(*map(facts_of, EVERY_FACT))
    assert {name: sorted(left) for name in USUAL if (left := facts_of(name) - stand)} == {}


def test_every_family_runs_in_make_test() -> None:
    """Parity runs for two configurations of each dense family, and for one of each family with experts."""
    families = {family for family, _ in CONFIGURATIONS.values()}
    assert {CONFIGURATIONS[name][0] for name in TWO_PER_FAMILY} == families
    assert {CONFIGURATIONS[name][0] for name in ONE_PER_FAMILY} == families
    assert set(ONE_PER_FAMILY) - set(USUAL) <= WITH_EXPERTS.keys()


def test_the_names_are_of_configurations() -> None:
    """A name with a typing mistake would move cases to the long run, and nobody would see it."""
    assert CONFIGURATIONS.keys() >= FEW | EVERY_FACT | FEW_EXPERTS
    assert set(USUAL) >= FEW | EVERY_FACT
