"""The certificates that a server refuses: ``revoked.json`` beside its own, read again whenever it changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from splitbundle import logs
from splitbundle.errors import BundleError
from splitbundle.format.revoked_certificates import FILE, MAX_BYTES, parse_revoked
from splitbundle.records import replace
from splitbundle.remote.tls_files import fingerprint_of
from splitbundle.storage import files

_Version = tuple[int, int, int, int]
"""What changes with a file: the time of its content and of its status, its size, its number in the file system."""
_ABSENT: Final = (-1, -1, -1, -1)


class RevokedCertificates:
    """The list of one server. Threads may share it.

    Without the file, no certificate is revoked. A list that was read stays in force while the file is damaged,
    unreadable or gone.
    """

    def __init__(self, directory: str | os.PathLike[str], *, log: Callable[[str], None] = logs.debug) -> None:
        """Read the list of a directory.

        Args:
            directory: the directory with the file.
            log: a function that is told why a changed file isn't used.

        Raises:
            BundleError: ``json.*``, ``field.*``, ``file.*``.
        """
        self._root = Path(directory)
        self._log = log
        self._lock = threading.Lock()
        self._told = ""
        self._version: _Version | None = self._look()
        self._revoked: frozenset[str] = frozenset(() if self._version == _ABSENT else read_revoked(self._root))

    def has(self, certificate: bytes | str) -> bool:
        """Return whether a certificate, in PEM or DER, is revoked.

        Raises:
            BundleError: ``keys.file`` for anything that isn't a certificate.
        """
        fingerprint = fingerprint_of(certificate)
        self._reload()
        return fingerprint in self._revoked

    def _reload(self) -> None:
        with self._lock:
            try:
                version = self._look()
                if version == self._version:
                    return
                self._version = version
                if version != _ABSENT:
                    self._revoked = frozenset(read_revoked(self._root))
                    self._told = ""
                    return
                problem = f"{self._root / FILE} is gone"
            except BundleError as error:
                problem = str(error)
                if any(code.startswith("file.") for code in error.codes):
                    self._version = None  # the system may let it be read later, though it doesn't change
            if problem != self._told:
                self._told = problem
                self._log(f"{problem}. What was revoked before stays revoked, and nothing else is")

    def _look(self) -> _Version:
        try:
            status = os.lstat(self._root / FILE)
        except (FileNotFoundError, NotADirectoryError):
            return _ABSENT
        except OSError as error:
            raise BundleError(replace(files.unreadable(FILE, error), file=str(self._root / FILE))) from error
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def read_revoked(directory: Path) -> tuple[str, ...]:
    """Return the fingerprints in the list of a directory.

    Raises:
        BundleError: ``json.*``, ``field.*``, ``file.*``.
    """
    try:
        data = files.read_file(directory, FILE, MAX_BYTES)
    except BundleError as error:
        raise BundleError(replace(each, file=str(directory / FILE)) for each in error.problems) from error
    return parse_revoked(data, str(directory / FILE))
