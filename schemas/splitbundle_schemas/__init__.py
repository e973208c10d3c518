"""The JSON Schemas (draft 2020-12) of the format, as package data."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Final

NAMES: Final = (
    "manifest",
    "architecture",
    "checkpoint",
    "text",
    "signature",
    "statement",
    "image-manifest",
    "model-config",
    "cached-reference",
    "revoked-certificates",
    "wire-header",
    "weight-header",
    "genai-config",
    "source-configuration",
    "extensions",
    "problems",
    "adapter-config",
    "gateway",
    "peers",
)
"""The names of the schemas."""


def load(name: str, version: int = 1) -> dict[str, Any]:
    """Return the schema of ``name``.json.

    Args:
        name: one of ``NAMES``.
        version: the version of the format.

    Raises:
        ValueError: no schema has this name and version.
    """
    if name not in NAMES or version != 1:
        raise ValueError(f"no schema {name!r} of version {version}: there are {', '.join(NAMES)} of version 1")
    schema: dict[str, Any] = json.loads((files(__name__) / f"v{version}" / f"{name}.schema.json").read_text("utf-8"))
    return schema
