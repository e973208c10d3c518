"""What the routes of an HTTP server share: who may ask, the log, and errors as documents."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from splitbundle import logs
from splitbundle.errors import BundleError, printable
from splitbundle.serving.web.access import Access, Key
from splitbundle.serving.web.errors import RequestError, of_bundle_error
from splitbundle.serving.web.sending import EventStream, HungUp

_HUNG_UP: Final = 499
"""The status in the log for a client that went away, as nginx has it. Nobody receives it."""
Log = Callable[[str], None]
Handler = Callable[[HttpRequest], Awaitable[Any]]


class Guard:
    """Stands before the routes of a server."""

    def __init__(
        self,
        access: Access,
        *,
        hosts: Sequence[str] | None = None,
        log: Log | None = None,
        counted: Callable[[str, int], None] = lambda path, code: None,
    ) -> None:
        """Put a guard before routes.

        Args:
            access: the keys.
            hosts: the names in ``Host`` that requests may have; None for all. A server without keys that only this
                machine reaches needs it: otherwise a page of the web could make its own name mean this machine.
            log: called with a line for each request, without content.
            counted: called with the path of a route and the status, for each request.
        """
        self._access, self._hosts, self._log, self._counted = access, hosts, log, counted
        self.exception_handlers: dict[Any, Any] = {404: self._missing, 405: self._wrong_method}
        """What starlette does for a path or a method that no route has."""

    def routed(self, handler: Handler, path: str, *, guarded: bool = True) -> Handler:
        """Return a handler that checks who asks, counts and logs, and turns errors into documents.

        A guarded one wants a key, if there are keys. The key is in ``http.state.key``.
        """

        async def handle(http: HttpRequest) -> Any:
            began, key = time.perf_counter(), None
            try:
                self._check_host(http)
                if guarded:
                    key = http.state.key = self._access.identify(http.headers.get("authorization", ""))
                answer = await handler(http)
            except RequestError as error:
                answer = failed(error)
            except BundleError as error:
                answer = failed(of_bundle_error(error))
            except (HungUp, ClientDisconnect):
                answer = Response(status_code=_HUNG_UP)
            except Exception as error:  # noqa: BLE001  # the client gets an answer, and the log the place
                self.note_failure(path, error)
                answer = failed(RequestError(500, f"{type(error).__name__} in the server", reason="server.failed"))
            if isinstance(answer, EventStream):  # it is logged at its end
                answer.on_end = functools.partial(self._stream_ended, answer.on_end, http, key, path, began)
            else:
                self._count(http, key, path, answer.status_code, began)
            return answer

        return handle

    def _stream_ended(
        self, end: Callable[[bool], None], http: HttpRequest, key: Key | None, path: str, began: float, complete: bool
    ) -> None:
        end(complete)
        self._count(http, key, path, 200 if complete else _HUNG_UP, began)

    def note_failure(self, path: str, error: Exception) -> None:
        """Log where an error came from. Its text may hold what a client wrote, so that goes to the debug log alone."""
        logs.debug("%s failed:\n%s", path, "".join(traceback.format_exception(error)))
        last = traceback.extract_tb(error.__traceback__)[-1]
        if self._log is not None:
            self._log(f"{path} failed: {type(error).__name__} at {last.filename.rpartition('/')[2]}:{last.lineno}")

    def _count(self, http: HttpRequest, key: Key | None, path: str, code: int, began: float) -> None:
        """Count and log a request that was answered."""
        self._counted(path, code)
        line = (
            f"{http.client.host if http.client else '-'} {key.name if key else '-'} {http.method} {path} {code} "
            f"{1000 * (time.perf_counter() - began):.0f} ms"
        )
        logs.debug("%s", line)
        if self._log is not None:
            self._log(printable(line))

    def _check_host(self, http: HttpRequest) -> None:
        host = http.headers.get("host", "").rpartition(":")[0] or http.headers.get("host", "")
        if self._hosts is not None and host.strip("[]").lower() not in self._hosts:
            message = f"this server answers requests to {', '.join(self._hosts)} alone"
            raise RequestError(403, message, reason="wrong_host")

    async def _missing(self, http: HttpRequest, error: Exception) -> Response:
        self._count(http, None, "other", 404, time.perf_counter())
        return failed(RequestError(404, "there is nothing at this path", reason="not_found"))

    async def _wrong_method(self, http: HttpRequest, error: Exception) -> Response:
        self._count(http, None, "other", 405, time.perf_counter())
        return failed(RequestError(405, "this path has another method", reason="wrong_method"))


def failed(error: RequestError) -> Response:
    """Return the answer that says an error."""
    return JSONResponse(error.document, status_code=error.status, headers=error.headers)
