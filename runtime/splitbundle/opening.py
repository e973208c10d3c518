"""Opening a bundle: its two documents, read and judged; no weights."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.manifest import document
from splitbundle.storage import files
from splitbundle.storage.documents import read_documents
from splitbundle.storage.recovery import recover


def open_bundle(
    path: str | os.PathLike[str],
    *,
    verify: Literal["never", "always"] = "never",
    id: str | None = None,  # noqa: A002
) -> Bundle:
    """Opens a bundle: reads its manifest and architecture, and no weights.

    Args:
        path: the bundle's directory.
        verify: ``"never"`` maps weights when they are needed, once their sizes and headers are known to be those that
            are listed; their digests are checked by ``Bundle.verify``. ``"always"`` reads each file that is needed into
            private memory, once, hashes it there, and computes on just those bytes: whatever happens to the file
            afterwards changes no number and ends no process. It takes memory for the weights, and time to hash them.
        id: the bundle id that it must have, ``sha256:`` and 64 digits; checked before anything is parsed.

    Raises:
        BundleError: what is wrong with either file; ``file.missing`` where there is no bundle; ``file.digest`` where it
            isn't the one with that id.
    """
    if verify not in ("never", "always"):
        expected = "never or always"
        raise BundleError(Problem(code="input.value", argument="verify", expected=expected, got=quoted(verify)))
    root = Path(os.path.abspath(path))  # so that it stays where it is when the process changes its directory
    there = ""
    try:
        recover(root)
        if not (root / document.FILE).exists():
            there = "a directory without it" if root.is_dir() else "a file" if root.exists() else "nothing there"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise BundleError(files.unreadable(str(path), error)) from error
        there = f"{error.strerror}"
    if there:
        raise BundleError(
            Problem(
                code="file.missing",
                file=str(path),
                expected=f"a bundle, a directory with a {document.FILE}",
                got=there,
                hint="splitbundle convert SOURCE -o NAME.splitbundle makes one",
            )
        )
    return Bundle(root, *read_documents(root, id), strict=verify == "always")
