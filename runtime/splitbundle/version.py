"""The version of this distribution, and the newest versions of the formats that it reads."""

from __future__ import annotations

__version__ = "1.0.0rc1"
"""The version of this distribution."""

FORMAT_VERSION = (1, 0)
"""MAJOR, MINOR: the newest version of a manifest that this reader knows."""

ARCHITECTURE_VERSION = 1
"""The newest ``version`` of a ``decoder`` architecture that this reader knows."""
