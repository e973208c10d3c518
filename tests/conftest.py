"""What modules of tests share, and what a run says at its end. Loading it needs pytest alone: all suites do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

_COUNTED: Final = "model type"
_TALLIED: Final = "tally"


@pytest.fixture
def count_as(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says what became of the one model type that a test is about; the run's last lines have the counts."""
    return lambda what: record_property(_COUNTED, what)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Adds to a count that the run's last lines have."""
    return lambda what, number: record_property(_TALLIED, (what, number))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads; and what a test sees mustn't depend on the machine.

    Modules ask for it by a mark, as not all suites are to have it.
    """
    import torch  # here, so that loading this file needs no backend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows the counts. It is the reports that bring them, also from the processes of pytest-xdist."""
    properties = [each for report in terminalreporter.stats.get("passed", ()) for each in report.user_properties]
    counted = Counter(what for name, what in properties if name == _COUNTED)
    if counted:
        counts = ", ".join(f"{number} {what}" for what, number in sorted(counted.items()))
        terminalreporter.write_line(f"{sum(counted.values())} model types of transformers: {counts}")
    tallied: Counter[str] = Counter()
    for name, value in properties:
        if name == _TALLIED:
            tallied[value[0]] += value[1]
    for what, number in tallied.items():
        terminalreporter.write_line(f"{number} {what}")
