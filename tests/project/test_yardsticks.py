"""Limits on time are ratios to known work, and no test compares a clock with a constant."""

from __future__ import annotations

import ast

import pytest

from tests.support.paths import TESTS
from tests.support.yardsticks import at_most, parsing, seconds

CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "process_time_ns"}


def test_a_block_that_takes_longer_is_an_error() -> None:
    with at_most(10, parsing, 2**20):
        pass
    with pytest.raises(AssertionError, match="more than 10 times the yardstick"), at_most(10, lambda: 1e-9):
        parsing(2**20)
    assert parsing(2**22) > parsing(2**18)
    assert seconds(lambda: parsing(2**20)) > 0


def asserted_times(source: str) -> list[int]:
    """Return the lines of asserts that read a clock, or compare a number with a time that was read before."""
    found = []
    tree = ast.parse(source)
    for scope in (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.Module)):
        times: set[str] = set()

        def is_time(node: ast.AST, times: set[str] = times) -> bool:
            names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
            names |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
            return bool(names & (CLOCKS | times))

        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and is_time(node.value):
                times |= {each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            elif isinstance(node, ast.Assert):
                reads = {each.attr for each in ast.walk(node.test) if isinstance(each, ast.Attribute)} & CLOCKS
                compared = [
                    each
                    for each in ast.walk(node.test)
                    if isinstance(each, ast.Compare)
                    and any(isinstance(side, ast.Constant) for side in (each.left, *each.comparators))
                    and is_time(each)
                ]
                if (reads or compared) and node.lineno not in found:
                    found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("start = time.process_time()\nassert time.process_time() - start < 2", [2]),
        ("def f():\n    start = time.time_ns()\n    spent = time.perf_counter() - start\n    assert spent < 2", [4]),
        ("def f():\n    spent = time.monotonic()\n    share = spent / known\n    assert share < 1.5", [4]),
        ("def f():\n    size = len(data)\n    assert size < 2", []),
    ],
)
def test_a_time_against_a_constant_is_seen(source: str, lines: list[int]) -> None:
    assert asserted_times(source) == lines


def test_no_test_asserts_a_time_against_a_constant() -> None:
    """Each machine has its own speed, and the machines of others are slower."""
    found = [
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        for line in asserted_times(path.read_text("utf-8"))
    ]
    assert found == []
