"""The cache: hard links, several processes, damage, and what prune leaves."""

from __future__ import annotations

from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
