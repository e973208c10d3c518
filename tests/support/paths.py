"""Paths of the files that tests read. It uses only the standard library, because every suite imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
"""The checkout."""
TESTS: Final = ROOT / "tests"
