"""What the metadata of a part says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFiles:
    """The two files of a part."""

    metadata: str
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The metadata of a part."""

    files: PartFiles
    component: str
    start: int
    end: int
    config: dict[str, Any]
