"""Send the listed files of a bundle over HTTP, whole or in ranges, and nothing that isn't listed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, Final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from splitbundle.serving.web.errors import RequestError
from splitbundle.serving.web.sending import PATIENCE
from splitbundle.sharing.file_requests import byte_range, has_tag
from splitbundle.sharing.served_files import ServedFiles

PIECE: Final = 2**20
"""The bytes that are read at once."""
MAX_SENT: Final = 64
"""The files that are sent at once. A further request is told to come back."""
_HEADERS: Final = {
    "Accept-Ranges": "bytes",
    "Cache-Control": "no-cache",
    # A bundle may come from strangers, and it is served beside the page: none of its files may act as a part of it.
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Content-Type": "application/octet-stream",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


class BundleFiles:
    """The files of one bundle."""

    def __init__(self, directory: str | os.PathLike[str], pool: ThreadPoolExecutor) -> None:
        """Look at a bundle.

        Args:
            directory: the bundle, which may be partial. It may be replaced while it is served.
            pool: the threads that read.

        Raises:
            BundleError: as ``ServedFiles``.
        """
        self._served, self._pool = ServedFiles(directory), pool
        self._name = self._served.bundles()[0].name
        self._sent = 0

    async def answer(self, http: HttpRequest) -> Response:
        """Answer a request for a file, whose path below the bundle is in ``path_params``.

        Raises:
            RequestError: 404 for what isn't listed or isn't there, 416 for a range beyond its end, 503 at the limit.
        """
        path: str = http.path_params["path"]
        if self._sent >= MAX_SENT:
            headers = {"Retry-After": "1"}
            raise RequestError(503, f"{MAX_SENT} files are sent already", reason="server.full", headers=headers)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._pool, self._served.open, f"{self._name}/{path}")
        if found is None:
            raise RequestError(404, "the bundle lists no such file, or it isn't there", reason="file.missing")
        with contextlib.ExitStack() as undo:
            undo.callback(found.file.close)
            tag = f'"{found.tag}"'
            headers = {**_HEADERS, "ETag": tag}
            if has_tag(http.headers.getlist("if-none-match"), tag):
                return Response(status_code=304, headers=headers)
            wanted = http.headers.get("range") if http.headers.get("if-range", tag) == tag else None
            part = byte_range(wanted, found.size)
            if part is not None and part[0] == part[1]:
                headers = {"Content-Range": f"bytes */{found.size}"}
                raise RequestError(416, "the file has no bytes there", reason="file.size", headers=headers)
            start, stop = part or (0, found.size)
            headers["Content-Length"] = str(stop - start)
            if part is not None:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.size}"
            if http.method == "HEAD":
                return Response(status_code=200 if part is None else 206, headers=headers)
            undo.pop_all()
        return _FileAnswer(self, found.file, start, stop, headers, 200 if part is None else 206)


class _FileAnswer(Response):
    """A part of a file. It is read piece by piece, while the client takes it."""

    def __init__(
        self, owner: BundleFiles, file: BinaryIO, start: int, stop: int, headers: Mapping[str, str], status: int
    ) -> None:
        super().__init__(status_code=status, headers=dict(headers))
        self._owner, self._file, self._start, self._stop = owner, file, start, stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Starlette calls this."""
        owner, loop, left = self._owner, asyncio.get_running_loop(), self._stop - self._start
        owner._sent += 1
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            self._file.seek(self._start)
            while left:
                piece = await loop.run_in_executor(owner._pool, self._file.read, min(PIECE, left))
                if not piece:
                    raise RuntimeError("a file got shorter while it was sent")  # the connection ends, and says so
                left -= len(piece)
                body = {"type": "http.response.body", "body": piece, "more_body": bool(left)}
                await asyncio.wait_for(send(body), PATIENCE)
            if self._start == self._stop:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.TimeoutError:
            return  # the client reads nothing; uvicorn closes the connection of an answer that isn't whole
        finally:
            owner._sent -= 1
            self._file.close()
