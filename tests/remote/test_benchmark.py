"""The benchmark of the wire measures what it says."""

from __future__ import annotations

import pytest
from benchmarks import wire


@pytest.mark.long
def test_the_hop_is_measured_beside_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HOPS", {"small": (1, 3), "large": (8, 2)})
    found = wire.hop(2)
    assert found.keys() == {"small", "large"}
    for figures in found.values():
        assert [len(seconds) for seconds in figures.values()] == [2, 2]
        assert all(0 < each < 60 for seconds in figures.values() for each in seconds)
