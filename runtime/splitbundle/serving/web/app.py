"""The HTTP application: OpenAI's interface over the models of a server, with a page, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, Final

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from splitbundle.errors import BundleError, printable
from splitbundle.format import strict_json
from splitbundle.serving.web import answers
from splitbundle.serving.web.access import Access
from splitbundle.serving.web.choices import Part
from splitbundle.serving.web.descriptions import describe, status
from splitbundle.serving.web.errors import RequestError, of_bundle_error
from splitbundle.serving.web.generating import THREADS, Job, parts_of
from splitbundle.serving.web.guard import Guard, Handler, Log
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.requests import Request, parse_chat, parse_completion
from splitbundle.serving.web.sending import EventStream, unless_left
from splitbundle.serving.web.web_metrics import CONTENT_TYPE, WebMetrics

MAX_BODY: Final = 16 * 2**20
_MAX_INTEGER: Final = 10**30
"""The largest integer of a body. Clients draw seeds of 64 bits, and an error names the parameter of a larger one."""
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
        self.models, self.access = models, access
        self.metrics = WebMetrics(models)
        self.guard = Guard(access, hosts=hosts, log=log, counted=self._counted)
        self.pool = ThreadPoolExecutor(THREADS, "splitbundle-text")
        self.draining = False
        self.running = 0
        """The requests that are answered."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/v1/models", self.guard.routed(self._list, "/v1/models"), methods=get),
            Route("/v1/models/{name:path}", self.guard.routed(self._model, "/v1/models"), methods=get),
            Route("/v1/completions", self.guard.routed(self._complete, "/v1/completions"), methods=post),
            Route("/v1/chat/completions", self.guard.routed(self._chat, "/v1/chat/completions"), methods=post),
            Route("/api/bundles", self.guard.routed(self._bundles, "/api/bundles"), methods=get),
            Route("/api/status", self.guard.routed(self._status, "/api/status"), methods=get),
            Route("/healthz", self.guard.routed(self._health, "/healthz", guarded=False), methods=get),
            Route("/metrics", self.guard.routed(self._metrics, "/metrics", guarded=False), methods=get),
            *(
                Route(path, self.guard.routed(_file(*file), "page", guarded=False), methods=get)
                for path, file in _page()
            ),
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
        self.app = Starlette(routes=routes, middleware=middleware, exception_handlers=self.guard.exception_handlers)

    def _counted(self, path: str, code: int) -> None:
        self.metrics.requests.labels(path, str(code)).inc()

    def close(self) -> None:
        """End all texts, and the threads."""
        self.models.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, work)

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
            self.guard.note_failure("a stream", error)
            yield answers.event(of_bundle_error(error).document)
        except Exception as error:  # noqa: BLE001  # likewise; a traceback is of no use to the client
            self.guard.note_failure("a stream", error)
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
    return strict_json.parse(bytes(data), "body", max_bytes=MAX_BODY, max_integer=_MAX_INTEGER)


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
