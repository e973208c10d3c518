"""Fixtures that test modules share, and the summary at the end of a run.

It needs only pytest, because all suites load it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

# No test reads or fills the cache of the user who runs it.
os.environ["SPLITBUNDLE_CACHE"] = tempfile.mkdtemp(prefix="splitbundle-cache-")
atexit.register(shutil.rmtree, os.environ["SPLITBUNDLE_CACHE"], ignore_errors=True)
# The processes of one run share the models that tests/support/models.py makes. The first process removes them.
if "SPLITBUNDLE_MODELS" not in os.environ:
    os.environ["SPLITBUNDLE_MODELS"] = tempfile.mkdtemp(prefix="splitbundle-models-")

    def remove(path: str = os.environ["SPLITBUNDLE_MODELS"], owner: int = os.getpid()) -> None:
        if os.getpid() == owner:  # a forked process has this registration too
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)

_COUNTED: Final = "model type"
_TALLIED: Final = "tally"


@pytest.fixture
def count_as(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Record the outcome of the one model type that a test is about; the run's last lines have the counts."""
    return lambda what: record_property(_COUNTED, what)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Add to a count in the run's last lines."""
    return lambda what, number: record_property(_TALLIED, (what, number))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread: models this small only lose by threads, and no result may depend on the machine.

    Modules ask for it by a mark, because not all suites use it.
    """
    import torch  # here, so that loading this file needs no backend

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the counts. The reports carry them, also from the processes of pytest-xdist."""
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
