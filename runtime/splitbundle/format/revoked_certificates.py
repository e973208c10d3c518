"""The document ``revoked.json``: the certificates that a server refuses. It is no part of a bundle."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from splitbundle.format import names, strict_json
from splitbundle.format.fields import Field, Problems

FILE: Final = "revoked.json"
VERSION: Final = 1
MAX_CERTIFICATES: Final = 2**16
MAX_BYTES: Final = 8 * 2**20
"""The largest document, in bytes. One with all of its fingerprints takes 4.6 MB."""


def parse_revoked(data: bytes, file: str) -> tuple[str, ...]:
    """Return the fingerprints of the certificates that the document lists, in its order.

    Args:
        data: the document.
        file: its path, for messages.

    Raises:
        BundleError: ``json.*``, ``field.*``: every problem.
    """
    problems = Problems(file)
    members = Field(strict_json.parse(data, file, max_bytes=MAX_BYTES), problems).members(["version", "certificates"])
    members["version"].integer(VERSION, VERSION)
    found: dict[str, None] = {}
    for item in members["certificates"].items(maximum=MAX_CERTIFICATES):
        fingerprint = item.string(names.SHA256, "64 digits of 0-9a-f")
        if fingerprint in found:
            item.refuse("each certificate once")
        found[fingerprint] = None
    problems.raise_if_any()
    return tuple(found)


def make_revoked(fingerprints: Collection[str]) -> bytes:
    """Return the document that lists these fingerprints."""
    return strict_json.dump({"version": VERSION, "certificates": list(fingerprints)})
