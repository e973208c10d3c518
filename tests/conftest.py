"""What a run says at its end, besides how many tests passed. It needs pytest alone, as the runtime's own suite does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import pytest

_COUNTED: Final = "model type"


@pytest.fixture
def count_as(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says what became of the one model type that a test is about; the run's last lines have the counts."""
    return lambda what: record_property(_COUNTED, what)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Shows the counts. It is the reports that bring them, also from the processes of pytest-xdist."""
    counted = Counter(
        what
        for report in terminalreporter.stats.get("passed", ())
        for name, what in report.user_properties
        if name == _COUNTED
    )
    if counted:
        counts = ", ".join(f"{number} {what}" for what, number in sorted(counted.items()))
        terminalreporter.write_line(f"{sum(counted.values())} model types of transformers: {counts}")
