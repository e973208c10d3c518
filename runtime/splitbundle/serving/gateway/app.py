"""The HTTP application of a gateway: the page, the files of a bundle, and a way for frames to its remote stages."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from splitbundle.bundle import Bundle
from splitbundle.serving.gateway.page_files import START, PageFile
from splitbundle.serving.gateway.relay import Relay
from splitbundle.serving.gateway.sent_files import BundleFiles
from splitbundle.serving.web.access import Access
from splitbundle.serving.web.errors import RequestError
from splitbundle.serving.web.guard import Guard, Log
from splitbundle.sharing.file_requests import has_tag
from splitbundle.version import __version__
from splitbundle.wire.frames import MAX_FRAME

FRAME: Final = "application/vnd.splitbundle.frame"
"""The media type of a frame. A page of another origin can't send it without asking first, and nobody allows it."""
CALLS: Final = 64
"""The frames that are answered at once. A further one is told to come back."""
MAX_HELD: Final = 4 * MAX_FRAME
"""The bytes of all frames that are answered at once. A frame beyond them is told to come back."""
THREADS: Final = 8
"""The threads that read files."""
_PATIENCE: Final = 60.0
"""The seconds in which a frame has to come."""
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'"
)
"""What the page may do. Where it connects to comes last, so that origins can follow."""
_HEADERS: Final = {
    "Cache-Control": "no-cache",
    # Without both, browsers give a page no threads.
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Gateway:
    """Answers browsers. ``WebServer`` gives it a port."""

    def __init__(
        self,
        bundle: Bundle,
        relays: Mapping[str, Relay],
        page: Mapping[str, PageFile],
        onnxruntime: Mapping[str, PageFile],
        access: Access,
        *,
        hosts: Sequence[str] | None = None,
        origins: Sequence[str] = (),
        log: Log | None = None,
    ) -> None:
        """Put a gateway together.

        Args:
            bundle: the bundle whose listed files are served, as far as they are there.
            relays: the remote stages by the names of their shards.
            page: the files of the page by their paths.
            onnxruntime: the files of onnxruntime-web by their names; none where there is none.
            access: the keys, which files and stages want.
            hosts: the names in ``Host`` that requests may have; None for all. See ``Guard``.
            origins: the origins of other servers whose bundles the page may read.
            log: called with a line for each request, without content.
        """
        self._bundle, self._relays, self._access = bundle, relays, access
        self._threads = ThreadPoolExecutor(THREADS, "splitbundle-files")
        self._calls = ThreadPoolExecutor(CALLS, "splitbundle-frames")
        self.draining, self.running = False, 0
        self._held = 0
        """The bytes of the frames that came and aren't answered."""
        self._has_onnxruntime = bool(onnxruntime)
        guard, files = Guard(access, hosts=hosts, log=log), BundleFiles(bundle.path, self._threads)
        get, post = ["GET"], ["POST"]
        policy = " ".join((_POLICY, *origins))
        held = {f"/{path}": file for path, file in page.items()}
        held |= {f"/onnxruntime-web/{name}": file for name, file in onnxruntime.items()}
        routes = [
            Route("/", guard.routed(_to_the_page, "page", guarded=False), methods=get),
            Route("/gateway.json", guard.routed(self._describe, "/gateway.json"), methods=get),
            Route("/healthz", guard.routed(self._health, "/healthz", guarded=False), methods=get),
            Route("/bundle/{path:path}", guard.routed(files.answer, "/bundle"), methods=get),
            Route("/stages/{name}", guard.routed(self._frame, "/stages"), methods=post),
            *(
                Route(path, guard.routed(_held(file, policy), "page", guarded=False), methods=get)
                for path, file in held.items()
            ),
        ]
        self.app = Starlette(routes=routes, exception_handlers=guard.exception_handlers)

    def close(self) -> None:
        """End the threads. A frame that is answered goes on by itself, to its deadline."""
        for pool in (self._threads, self._calls):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _describe(self, http: HttpRequest) -> Response:
        """Say which stages there are, for the page."""
        shards = {shard.name: list(shard.layers) for shard in self._bundle.shards}
        document = {
            "version": __version__,
            "bundle": self._bundle.id,
            "stages": {name: {"layers": shards[name]} for name in self._relays},
            "onnxruntime_web": self._has_onnxruntime,
        }
        return JSONResponse(document, headers={"Cache-Control": "no-store"})

    async def _health(self, http: HttpRequest) -> Response:
        return JSONResponse({"ok": not self.draining}, status_code=503 if self.draining else 200)

    async def _frame(self, http: HttpRequest) -> Response:
        """Answer a frame with a frame. Errors of the protocol are frames, too; those of HTTP have a status."""
        relay = self._relays.get(http.path_params["name"])
        if relay is None:
            raise RequestError(404, f"there is {', '.join(self._relays)}", reason="stage.name")
        if self.draining or self.running >= CALLS:
            reason, status = ("server.draining", 503) if self.draining else ("server.full", 429)
            message = "this gateway is ending" if self.draining else f"{CALLS} frames are answered already"
            raise RequestError(status, message, reason=reason, headers={"Retry-After": "1"})
        self.running += 1
        key = http.state.key
        try:
            with self._access.using(key):
                frame = bytearray()
                try:
                    await asyncio.wait_for(self._receive(http, frame), _PATIENCE)
                    owner = None if key is None else key.name
                    loop = asyncio.get_running_loop()
                    data = await loop.run_in_executor(self._calls, relay.answer, bytes(frame), owner)
                except asyncio.TimeoutError:
                    message = f"the frame didn't come within {_PATIENCE:g} s"
                    raise RequestError(408, message, reason="too_slow") from None
                finally:
                    self._held -= len(frame)
        finally:
            self.running -= 1
        return Response(data, media_type=FRAME, headers={"Cache-Control": "no-store"})

    async def _receive(self, http: HttpRequest, frame: bytearray) -> None:
        """Put the body of a request into a frame, as long as there is room for it."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != FRAME:
            raise RequestError(415, f"the body has to be a frame, with Content-Type: {FRAME}", reason="wrong_type")
        too_large = RequestError(413, f"a frame may have {MAX_FRAME} bytes", reason="wire.size")
        length = http.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > MAX_FRAME):
            raise too_large
        async for piece in http.stream():
            if len(frame) + len(piece) > MAX_FRAME:
                raise too_large
            if self._held + len(piece) > MAX_HELD:
                message, headers = "the gateway has no room for further frames now", {"Retry-After": "1"}
                raise RequestError(503, message, reason="server.full", headers=headers)
            self._held += len(piece)
            frame += piece


async def _to_the_page(http: HttpRequest) -> Response:
    return RedirectResponse(START, headers={"Cache-Control": "no-cache"})


def _held(file: PageFile, policy: str) -> Any:
    headers = {**_HEADERS, "Content-Security-Policy": policy, "Content-Type": file.kind, "ETag": file.tag}

    async def answer(http: HttpRequest) -> Response:
        if has_tag(http.headers.getlist("if-none-match"), file.tag):
            return Response(status_code=304, headers=headers)
        return Response(file.data, headers=headers)

    return answer
