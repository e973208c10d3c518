"""Bundles on this machine, as a source of ``pull``: a copy goes the same checked way as a download."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from splitbundle.errors import BundleError
from splitbundle.format.manifest.document import File
from splitbundle.sharing.reference import Reference
from splitbundle.sharing.transport import Resolved
from splitbundle.storage import files
from splitbundle.storage.documents import find_bundle
from splitbundle.storage.signature_files import signature_files


class LocalStream:
    """An open file."""

    def __init__(self, file: BinaryIO, path: str, start: int) -> None:
        self._file, self._path, self.start = file, path, start

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes; 0 at the end."""
        try:
            count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        except OSError as error:
            raise BundleError(files.unreadable(self._path, error)) from error
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class LocalSource:
    """A bundle's directory."""

    def __init__(self, reference: Reference) -> None:
        self._path, self._pin = reference.path, reference.pin
        self._root = Path(os.path.abspath(reference.path))

    def resolve(self) -> Resolved:
        """Find the directory."""
        self._root = find_bundle(self._path)
        return Resolved(bundle_id=self._pin)

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file."""
        return files.read_file(self._root, path, limit)

    def open(self, path: str, listed: File, start: int) -> LocalStream:
        """Open a listed file."""
        file = files.open_file(self._root, path, listed)
        file.seek(start)
        return LocalStream(file, path, start)

    def signatures(self) -> list[str]:
        """Return the paths of the signatures."""
        return list(signature_files(self._root))

    def moved(self) -> str | None:
        """Return None: a directory has no revisions."""
        return None
