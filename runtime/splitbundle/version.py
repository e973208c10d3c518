"""The version of this distribution, and the versions of the formats that it reads."""

from __future__ import annotations

__version__ = "0.1.0"

FORMAT_VERSION = (1, 0)
"""MAJOR, MINOR of the newest manifest that this reader knows."""

ARCHITECTURE_VERSION = 1
"""The newest ``version`` of a ``decoder`` architecture that this reader knows."""
