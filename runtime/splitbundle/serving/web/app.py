"""The HTTP application: OpenAI's interface over the models of a server, with a page, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from splitbundle import logs
from splitbundle.errors import BundleError, printable
from splitbundle.format import strict_json
from splitbundle.serving.web import answers
from splitbundle.serving.web.access import Access, Key
from splitbundle.serving.web.choices import Part
from splitbundle.serving.web.descriptions import describe, status
from splitbundle.serving.web.errors import RequestError, of_bundle_error
from splitbundle.serving.web.generating import THREADS, Job, parts_of
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.requests import Request, parse_chat, parse_completion
from splitbundle.serving.web.sending import EventStream, HungUp, unless_left
from splitbundle.serving.web.web_metrics import CONTENT_TYPE, WebMetrics

MAX_BODY: Final = 16 * 2**20
_MOST_DRAINED: Final = 64 * 2**20
_PATIENCE: Final = 60.0
"""The seconds in which a body has to come."""
IGNORED: Final = "Splitbundle-Ignored"
"""The header with the names of the fields that had no effect."""
_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The end of a name of a file of the page -> its media type."""
_INDEX: Final = "index.html"
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HUNG_UP: Final = 499
"""The status in the log for a client that went away, as nginx has it. Nobody receives it."""
Log = Callable[[str], None]
Handler = Callable[[HttpRequest], Awaitable[Any]]


class Door:
    """What the routes share: the models, who may ask, the threads and the metrics."""

    def __init__(
        self,
        models: Models,
        access: Access,
        *,
        hosts: Sequence[str] | None = None,
        origins: Sequence[str] = (),
        log: Log | None = None,
    ) -> None:
        """Put a door together.

        Args:
            models: the models.
            access: the keys.
            hosts: the names in ``Host`` that requests may have; None for all. A server without keys that only this
                machine reaches needs it: otherwise a page of the web could make its own name mean this machine.
            origins: the origins of other pages that may ask from a browser; by default none.
            log: called with a line for each request, without content.
        """
        self.models, self.access, self.hosts, self.log = models, access, hosts, log
        self.metrics = WebMetrics(models)
        self.pool = ThreadPoolExecutor(THREADS, "splitbundle-text")
        self.draining = False
        self.running = 0
        """The requests that are answered."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/v1/models", self._routed(self._list, "/v1/models"), methods=get),
            Route("/v1/models/{name:path}", self._routed(self._model, "/v1/models"), methods=get),
            Route("/v1/completions", self._routed(self._complete, "/v1/completions"), methods=post),
            Route("/v1/chat/completions", self._routed(self._chat, "/v1/chat/completions"), methods=post),
            Route("/api/bundles", self._routed(self._bundles, "/api/bundles"), methods=get),
            Route("/api/status", self._routed(self._status, "/api/status"), methods=get),
            Route("/healthz", self._routed(self._health, "/healthz", guarded=False), methods=get),
            Route("/metrics", self._routed(self._metrics, "/metrics", guarded=False), methods=get),
            *(Route(path, self._routed(_file(*file), "page", guarded=False), methods=get) for path, file in _page()),
        ]
        middleware = []
        if origins:
            middleware = [
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],  # clients send headers of their own
                    expose_headers=[IGNORED, "Retry-After"],
                )
            ]
        self.app = Starlette(
            routes=routes, middleware=middleware, exception_handlers={404: self._missing, 405: self._wrong_method}
        )

    def _routed(self, handler: Handler, path: str, *, guarded: bool = True) -> Handler:
        """Return a handler that checks who asks, counts and logs, and turns errors into documents."""

        async def handle(http: HttpRequest) -> Any:
            began, key = time.perf_counter(), None
            try:
                self._check_host(http)
                if guarded:
                    key = http.state.key = self.access.identify(http.headers.get("authorization", ""))
                answer = await handler(http)
            except RequestError as error:
                answer = _failed(error)
            except BundleError as error:
                answer = _failed(of_bundle_error(error))
            except (HungUp, ClientDisconnect):
                answer = Response(status_code=_HUNG_UP)
            except Exception as error:  # noqa: BLE001  # the client gets an answer, and the log the place
                self._note_failure(path, error)
                answer = _failed(RequestError(500, f"{type(error).__name__} in the server", reason="server.failed"))
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

    def _note_failure(self, path: str, error: Exception) -> None:
        """Log where an error came from. Its text may hold what a client wrote, so that goes to the debug log alone."""
        logs.debug("%s failed:\n%s", path, "".join(traceback.format_exception(error)))
        last = traceback.extract_tb(error.__traceback__)[-1]
        if self.log is not None:
            self.log(f"{path} failed: {type(error).__name__} at {last.filename.rpartition('/')[2]}:{last.lineno}")

    def _count(self, http: HttpRequest, key: Key | None, path: str, code: int, began: float) -> None:
        """Count and log a request that was answered."""
        self.metrics.requests.labels(path, str(code)).inc()
        line = (
            f"{http.client.host if http.client else '-'} {key.name if key else '-'} {http.method} {path} {code} "
            f"{1000 * (time.perf_counter() - began):.0f} ms"
        )
        logs.debug("%s", line)
        if self.log is not None:
            self.log(printable(line))

    def _check_host(self, http: HttpRequest) -> None:
        host = http.headers.get("host", "").rpartition(":")[0] or http.headers.get("host", "")
        if self.hosts is not None and host.strip("[]").lower() not in self.hosts:
            message = f"this server answers requests to {', '.join(self.hosts)} alone"
            raise RequestError(403, message, reason="wrong_host")

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

    async def _missing(self, http: HttpRequest, error: Exception) -> Response:
        self._count(http, None, "other", 404, time.perf_counter())
        return _failed(RequestError(404, "there is nothing at this path", reason="not_found"))

    async def _wrong_method(self, http: HttpRequest, error: Exception) -> Response:
        self._count(http, None, "other", 405, time.perf_counter())
        return _failed(RequestError(405, "this path has another method", reason="wrong_method"))

    # Models, health, metrics

    async def _list(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [_listed(model) for model in self.models]})

    async def _model(self, http: HttpRequest) -> Response:
        return JSONResponse(_listed(self._named(http.path_params["name"])))

    async def _bundles(self, http: HttpRequest) -> Response:
        return JSONResponse({"bundles": await self._in_thread(lambda: [describe(model) for model in self.models])})

    async def _status(self, http: HttpRequest) -> Response:
        found = await self._in_thread(lambda: {model.name: status(model) for model in self.models})
        return JSONResponse({"models": found})

    async def _health(self, http: HttpRequest) -> Response:
        """Compute a token with each model that is loaded."""
        if self.draining:
            return JSONResponse({"ok": False, "reason": "ending"}, status_code=503)
        checks = [self._in_thread(model.is_healthy) for model in self.models]
        try:
            healthy = await asyncio.wait_for(asyncio.gather(*checks), 30)
        except asyncio.TimeoutError:
            return JSONResponse({"ok": False, "reason": "no token in 30 s"}, status_code=503)
        failed = [model.name for model, fine in zip(self.models, healthy, strict=True) if not fine]
        document = {"ok": not failed, "failed": failed} if failed else {"ok": True}
        return JSONResponse(document, status_code=503 if failed else 200)

    async def _metrics(self, http: HttpRequest) -> Response:
        return Response(await self._in_thread(self.metrics.render), headers={"Content-Type": CONTENT_TYPE})

    # Texts

    async def _complete(self, http: HttpRequest) -> Any:
        return await self._answer(http, parse_completion)

    async def _chat(self, http: HttpRequest) -> Any:
        return await self._answer(http, parse_chat)

    async def _answer(self, http: HttpRequest, parse: Callable[[Any], Request]) -> Any:
        """Answer a request for text. Whatever happens, the model, the key and the rows are free afterwards."""
        asked = time.perf_counter()
        if self.draining:
            raise RequestError(503, "this server is ending", reason="server.draining", headers={"Retry-After": "5"})
        with contextlib.ExitStack() as stack:
            use = stack.enter_context(self.access.using(http.state.key))  # before the body, which takes memory
            try:
                request = parse(await asyncio.wait_for(_body(http), _PATIENCE))
            except asyncio.TimeoutError:
                message = f"the body didn't come within {_PATIENCE:g} s"
                raise RequestError(408, message, reason="too_slow") from None
            model = self._named(request.model) if request.model is not None else self.models.first
            request = request.named(model.name)
            headers = {IGNORED: _spelled(request.ignored)} if request.ignored else {}
            most = request.max_tokens if request.max_tokens is not None else model.bundle.manifest.model.context_length
            use.reserve((most or 0) * request.number * len(request.prompts))
            self.running += 1
            stack.callback(self._ended)
            using = self.models.using(model.name)
            loop = asyncio.get_running_loop()
            _, pipeline = await loop.run_in_executor(self.pool, using.__enter__)
            stack.callback(using.__exit__, None, None, None)
            client = http.state.key.name if http.state.key else (http.client.host if http.client else "")
            job = Job(model, pipeline, request, client)
            stack.callback(lambda: use.spend(job.prompt_tokens + job.new_tokens))
            stack.callback(lambda: self._measure(job, asked))
            stack.callback(job.cancel)
            await unless_left(loop.run_in_executor(self.pool, job.begin), http.receive)
            if not request.stream:
                return JSONResponse(await unless_left(self._whole(job), http.receive), headers=headers)
            # What fails before the first token still has a status of its own.
            parts = parts_of(job, self.pool)
            first = await unless_left(_next(parts), http.receive)
            # The rest of the stack belongs to the stream, which ends later.
            closing = stack.pop_all()

            def end(complete: bool) -> None:
                if not complete:
                    self.metrics.cancelled.labels(model.name).inc()
                closing.close()

            return EventStream(self._events(job, first, parts), headers, end)

    async def _whole(self, job: Job) -> Any:
        parts: list[list[Part]] = [[] for _ in job.choices]
        async for part in parts_of(job, self.pool):
            parts[part.index].append(part)
        generations = [choice.generation for choice in job.choices]
        return answers.Answer(job.request, job.tokenizer).whole(parts, generations, job.echoes)

    async def _events(self, job: Job, head: Part | None, parts: AsyncIterator[Part]) -> AsyncIterator[bytes]:
        answer, request = answers.Answer(job.request, job.tokenizer), job.request
        try:
            for choice in job.choices:
                if (first := answer.first_chunk(choice.index)) is not None:
                    yield answers.event(first)
            for echo in job.echoes:
                for chunk in answer.chunks(echo):
                    yield answers.event(chunk)
            if head is not None:
                for chunk in answer.chunks(head):
                    yield answers.event(chunk)
            async for part in parts:
                for chunk in answer.chunks(part):
                    yield answers.event(chunk)
            if request.usage_in_stream:
                yield answers.event(answer.usage_chunk(choice.generation for choice in job.choices))
            yield answers.DONE
        except BundleError as error:  # the status is sent already, so the stream itself says what happened
            self._note_failure("a stream", error)
            yield answers.event(of_bundle_error(error).document)
        except Exception as error:  # noqa: BLE001  # likewise; a traceback is of no use to the client
            self._note_failure("a stream", error)
            failure = RequestError(500, f"{type(error).__name__} in the server", reason="server.failed")
            yield answers.event(failure.document)

    def _ended(self) -> None:
        self.running -= 1

    def _measure(self, job: Job, asked: float) -> None:
        name, now, tokens = job.model.name, time.perf_counter(), job.new_tokens
        self.metrics.seconds.labels(name).observe(now - asked)
        if job.first_token is not None:
            self.metrics.first_token.labels(name).observe(job.first_token - asked)
            if job.last_token is not None and tokens > 1 and len(job.choices) == 1:
                self.metrics.token_seconds.labels(name).observe((job.last_token - job.first_token) / (tokens - 1))

    def _named(self, name: str) -> Model:
        if name not in self.models:
            known = ", ".join(model.name for model in self.models)
            raise RequestError(
                404,
                f"there is no model {printable(name)[:100]!a}; there is {known}",
                reason="model_not_found",
                param="model",
            )
        return self.models[name]


def _page() -> Iterator[tuple[str, tuple[bytes, str]]]:
    """Yield the path of each file of the page, with its bytes and its media type."""
    for file in (resources.files("splitbundle.serving.web") / "page").iterdir():
        kind = _KINDS.get(file.name[file.name.rfind(".") :])
        if kind is not None:
            yield "/" if file.name == _INDEX else f"/{file.name}", (file.read_bytes(), kind)


def _file(data: bytes, kind: str) -> Handler:
    headers = {
        "Content-Type": kind,
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def answer(http: HttpRequest) -> Response:
        return Response(data, headers=headers)

    return answer


async def _body(http: HttpRequest) -> Any:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of the web can send other kinds without asking first
        raise RequestError(415, "the body has to be JSON, with Content-Type: application/json", reason="wrong_type")
    data, size = bytearray(), 0
    async for piece in http.stream():
        size += len(piece)
        if size <= MAX_BODY:
            data += piece
        elif size > _MOST_DRAINED:
            break
    if size > MAX_BODY:  # the rest was read, as a client that still sends would see a lost connection in place of this
        raise RequestError(413, f"the body may have {MAX_BODY} bytes", reason="too_large")
    return strict_json.parse(bytes(data), "body", max_bytes=MAX_BODY)


async def _next(parts: AsyncIterator[Part]) -> Part | None:
    """Return the first part, or None if there is none."""
    async for part in parts:
        return part
    return None


def _spelled(names: Sequence[str]) -> str:
    """Return names for a header, which has only ASCII."""
    return ", ".join(name.encode("ascii", "backslashreplace").decode()[:64] for name in map(printable, names[:32]))


def _listed(model: Model) -> Mapping[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "splitbundle"}


def _failed(error: RequestError) -> Response:
    return JSONResponse(error.document, status_code=error.status, headers=error.headers)
