"""Tell a bundle that a draft of the format wrote from a damaged one, after it was refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, VerificationError, quoted
from splitbundle.format import names, strict_json
from splitbundle.storage import files

_OF_THE_FORMAT: Final = ("field", "manifest", "architecture", "weights", "graph", "genai")
"""The first words of codes by which a draft's bundle can be refused: what a draft changed."""
_NAME: Final = "splitbundle"
FIRST: Final = "1.0.0rc1"
"""The first version of this distribution whose bundles have version 1.0 of the format. Those before begin with 0."""


@contextmanager
def telling_of_draft(root: Path, producer: Any = None) -> Iterator[None]:
    """If the block refuses a bundle that a draft wrote, say that as a further problem, ``format.version``.

    What wrote the bundle decides nothing: it only explains a refusal.

    Args:
        root: the bundle's directory.
        producer: that field of the manifest, if it is known.

    Raises:
        BundleError: the block's own, perhaps with the further problem.
    """
    try:
        yield
    except BundleError as error:
        if type(error) not in (BundleError, VerificationError) or not any(
            code.partition(".")[0] in _OF_THE_FORMAT for code in error.codes
        ):
            raise
        found = _producer(root) if producer is None else producer
        version = found.get("version") if isinstance(found, dict) and found.get("name") == _NAME else None
        if not isinstance(version, str) or not version.startswith("0."):
            raise
        problem = Problem(
            code="format.version",
            file=names.MANIFEST,
            pointer="/producer/version",
            expected=f"a bundle that splitbundle {FIRST} or later wrote, as its format isn't a draft",
            got=quoted(version),
            hint="Convert its source again",
        )
        raise type(error)([*error.problems, problem]) from error


def _producer(root: Path) -> Any:
    """Return the field of a manifest that was refused, or None if it can't be read."""
    try:
        document = strict_json.parse(files.read_file(root, names.MANIFEST, strict_json.MAX_BYTES), names.MANIFEST)
    except BundleError:
        return None
    return document.get("producer") if isinstance(document, dict) else None
