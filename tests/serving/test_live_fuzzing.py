"""A server that listens goes on while strangers and clients send what they like."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

pytest.importorskip("grpc")
from tests.support import live_fuzzing

SECONDS = float(os.environ.get("SPLITBUNDLE_FUZZ_SECONDS", "60"))


@pytest.mark.rule("SB-X-012", "SB-X-026")
@pytest.mark.parametrize("seconds", [2, pytest.param(SECONDS, marks=pytest.mark.long, id="long")])
def test_a_server_outlives_what_it_is_sent(seconds: float, tally: Callable[[str, int], None]) -> None:
    counts = live_fuzzing.run(seconds)
    assert counts["answers ran"] > 0
    assert counts["connections with raw bytes"] > 0
    tally("requests and connections that a server outlived", counts.total())
