"""The paths of signatures in a bundle."""

from __future__ import annotations


def is_signature(path: str) -> bool:
    """Return whether a path may be that of a signature."""
    return path.startswith("signatures/") and path.endswith(".sigstore.json")
