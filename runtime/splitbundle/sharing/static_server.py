"""Bundles on a static HTTP server: the files lie under one URL, as in the directory."""

from __future__ import annotations

from functools import partial

from splitbundle.format.manifest.document import File
from splitbundle.sharing.credentials import bearer
from splitbundle.sharing.http_client import HttpClient
from splitbundle.sharing.http_files import HttpStream, open_from, read_small
from splitbundle.sharing.network import Patience
from splitbundle.sharing.reference import Reference
from splitbundle.sharing.transport import Resolved


class StaticServer:
    """A bundle under a URL."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._pin = reference.pin
        self._url = f"{reference.scheme}://{reference.host}/{reference.path}"
        self._client = HttpClient(patience)
        self._ask = partial(self._client.ask, authorization=bearer())

    def resolve(self) -> Resolved:
        """Return the pin: a static server has no revisions."""
        return Resolved(bundle_id=self._pin)

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file."""
        return read_small(self._ask, self._place(path), limit, self._client.patience)

    def open(self, path: str, listed: File, start: int) -> HttpStream:
        """Open a listed file."""
        return open_from(self._ask, self._place(path), listed, start)

    def signatures(self) -> list[str]:
        """Return nothing: a static server has no list of its files."""
        return []

    def moved(self) -> str | None:
        """Return None. If the manifest was replaced, a digest of a file differs."""
        return None

    def _place(self, path: str) -> str:
        return f"{self._url}/{path}" if self._url[-1] != "/" else f"{self._url}{path}"
