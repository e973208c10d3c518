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


def test_no_test_asserts_a_time_against_a_constant() -> None:
    """Each machine has its own speed, and the machines of others are slower."""
    found = []
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assert):
                names = {each.attr for each in ast.walk(node.test) if isinstance(each, ast.Attribute)}
                found += [f"{path.relative_to(TESTS)}:{node.lineno}"] * bool(names & CLOCKS)
    assert found == []
