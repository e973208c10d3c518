"""Fields of a configuration that select code. They never reach transformers, and never leave a bundle."""

from __future__ import annotations

import re
from typing import Any, Final

IMPLEMENTATION: Final = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
"""Fields that select the code of attention or experts. For some values, transformers fetches code from the hub and
runs it."""
REMOTE: Final = re.compile(r"auto_map|custom_pipelines|custom_generate")
"""Fields that name the source's own code. transformers runs it if its user allows that."""


def without_fields(value: Any, *left_out: re.Pattern[str]) -> Any:
    """Return a copy of a JSON value without the fields that match one of the patterns, at any depth."""
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if not any(own.fullmatch(name) for own in left_out)}
        return {name: without_fields(inner, *left_out) for name, inner in kept.items()}
    return [without_fields(inner, *left_out) for inner in value] if isinstance(value, list) else value
