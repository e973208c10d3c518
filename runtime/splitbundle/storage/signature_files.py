"""Find and read the signatures that lie in a bundle's directory. The manifest doesn't list them.

They are opened only to check them, or to copy them with the bundle.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError
from splitbundle.format import names
from splitbundle.storage import files

MAX_BYTES: Final = 16 * 2**20
"""The largest signature, in bytes."""
MAX_NUMBER: Final = 64
"""The largest number of signatures of a bundle. Of more, the first ones by name count."""


def signature_files(root: Path) -> tuple[str, ...]:
    """Return the paths of a bundle's signatures, sorted. Only regular files within the limits are signatures.

    Raises:
        BundleError: ``file.unreadable`` if the system can't tell.
    """
    found: list[str] = []
    try:
        if not stat.S_ISDIR(os.lstat(root / names.SIGNATURES).st_mode):
            return ()
        with os.scandir(root / names.SIGNATURES) as entries:
            for entry in entries:
                path = f"{names.SIGNATURES}/{entry.name}"
                if not names.is_signature(path):
                    continue
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
                    found.append(path)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise BundleError(files.unreadable(names.SIGNATURES, error)) from error
    return tuple(sorted(found)[:MAX_NUMBER])


def read_signature(root: Path, path: str) -> bytes:
    """Read a signature.

    Raises:
        BundleError: ``file.*``; ``json.size`` for one that is too large.
    """
    return files.read_file(root, path, MAX_BYTES)


def copy_signatures(old: Path, new: Path) -> None:
    """Copy the signatures of a bundle as they are. One that is there already stays: the first of two counts.

    Raises:
        BundleError: ``file.*``.
    """
    there = set(signature_files(new))
    for path in signature_files(old):
        if path not in there and len(there) < MAX_NUMBER:
            there.add(path)
            (new / names.SIGNATURES).mkdir(exist_ok=True)
            (new / path).write_bytes(read_signature(old, path))
