"""A server that stands in for ``splitbundle serve`` in tests of its page: its answers are written here, by question.

The last question chooses the answer; ``ANSWERS`` has those that stream to their end, and ``StandInDoor`` the failures.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.support.http_server import Exchange, LoopbackServer
from tests.support.paths import ROOT

PAGE: Final = ROOT / "runtime" / "splitbundle" / "serving" / "web" / "page"
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES: Final = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript"}
PAUSE: Final = 0.01
"""The seconds between two pieces of an answer."""
HOSTILE: Final = """\
<script>window.injected = 1</script>

<img src=x onerror="window.injected = 2"> and **<b onmouseover=alert(1)>bold</b>**

[click me](javascript:window.injected=3) and ![a picture](https://a.example/x.png)

- <iframe src="javascript:window.injected=4"></iframe>
- <svg onload="window.injected = 5">

# <style>body{display:none}</style>

```html"><script>window.injected=6</script>
<script>window.injected = 7</script>
```

`<a href="javascript:alert(1)">`"""
MARKDOWN: Final = """\
## A heading

A paragraph with **bold**, *italics*, ***both***, `code` and 2 * 3 * 4,
on two lines.

1. first
   - inner *one*
   - inner two
2. second

> a quote

```python
def f(x):
    return x * 2  # a line that is much longer than a phone is wide, so that it has to scroll inside its own box
```

The end: snake_case_name, **unclosed."""
ANSWERS: Final = {"markdown": MARKDOWN, "hostile": HOSTILE}
"""Questions, and the answers to them."""
DIGEST: Final = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def shard(name: str, start: int, stop: int, where: str, milliseconds: float | None) -> dict[str, Any]:
    """Return a shard as ``/api/bundles`` tells it."""
    files = [
        {"name": f"layer-{layer:03}.safetensors", "bytes": 14_165_000, "sha256": DIGEST} for layer in range(start, stop)
    ]
    if start == 0:
        files.insert(0, {"name": "embedding.safetensors", "bytes": 113_246_300, "sha256": DIGEST})
    return {
        "name": name,
        "layers": [start, stop],
        "embeds": start == 0,
        "head": stop == 30,
        "bytes": sum(file["bytes"] for file in files),
        "where": where,
        "milliseconds": milliseconds,
        "files": files,
    }


def bundle(name: str, *, chat: bool) -> dict[str, Any]:
    """Return a bundle as ``/api/bundles`` tells it."""
    shards = [
        shard("bottom", 0, 2, "here", 3.21),
        shard("trunk", 2, 28, "grpcs://trunk.example:7000", 41.7 if chat else None),
        shard("top", 28, 30, "here", 5.02),
    ]
    return {
        "id": name,
        "loaded": chat,
        "bundle_id": f"sha256:{DIGEST}",
        "format_version": "1.0",
        "architecture": "llama",
        "parameters": 134_515_008,
        "layers": 30,
        "hidden_size": 576,
        "vocab_size": 49_152,
        "context_length": 8192 if chat else None,
        "dtype": "float32",
        "backend": "torch" if chat else None,
        "bytes": sum(each["bytes"] for each in shards),
        "chat": chat,
        "verified": "hashes" if chat else "none",
        "shards": shards,
    }


class StandInDoor(LoopbackServer):
    """The server.

    Attributes:
        asked: the bodies of the questions that came, in order.
        left: is set when a client goes away in the middle of an answer.
        go_on: answers to "slow" wait for this after their first pieces.
    """

    def __init__(self, *, key: str | None = None, models: Iterable[str] = ("tiny-chat", "tiny-base")) -> None:
        """Take the API key that every request to the API needs, and the names of the models.

        Models whose name ends with ``-base`` have no chat template.
        """
        super().__init__()
        self.key, self.models = key, tuple(models)
        self.asked: list[dict[str, Any]] = []
        self.left, self.go_on = threading.Event(), threading.Event()

    def respond(self, exchange: Exchange) -> None:
        """Answer a request."""
        path = exchange.path
        if path.startswith(("/v1/", "/api/")):
            if self.key is not None and exchange.seen.authorization != f"Bearer {self.key}":
                self._error(exchange, 401, "An API key is needed.", "invalid_api_key")
            elif exchange.method == "POST":
                body = json.loads(exchange.body)
                self.asked.append(body)
                self._answer(exchange, body)
            else:
                self._json(exchange, 200, self._document(path))
            return
        file = PAGE / (path.lstrip("/") or "index.html")
        if file.parent != PAGE or not file.is_file():
            exchange.answer(404)
            return
        headers = {
            "Content-Type": TYPES[file.suffix],
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
        }
        exchange.answer(200, file.read_bytes(), headers)

    def _json(self, exchange: Exchange, status: int, document: Any, headers: dict[str, str] | None = None) -> None:
        exchange.answer(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, exchange: Exchange, status: int, message: str, code: str, retry_after: str | None = None) -> None:
        error = {"message": message, "type": "error", "code": code, "param": None}
        self._json(exchange, status, {"error": error}, {"Retry-After": retry_after} if retry_after else None)

    def _document(self, path: str) -> Any:
        if path == "/v1/models":
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "splitbundle"} for name in self.models]
            return {"object": "list", "data": data}
        if path == "/api/bundles":
            return {"bundles": [bundle(name, chat=not name.endswith("-base")) for name in self.models]}
        load = {"rows": 8, "active": 3, "waiting": 1, "tokens_per_second": 41.2, "uptime_seconds": 5.0}
        return {"models": dict.fromkeys(self.models, load)}

    def _answer(self, exchange: Exchange, body: dict[str, Any]) -> None:
        chat = exchange.path == "/v1/chat/completions"
        question = body["messages"][-1]["content"] if chat else body["prompt"]
        if chat and body["model"].endswith("-base"):
            self._error(exchange, 400, "The bundle has no chat template.", "text.chat_template")
        elif question == "busy":
            self._error(exchange, 429, "All 8 rows are busy.", "busy", "7")
        elif question == "proxy":
            exchange.answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
        else:
            self._stream(exchange, self._chunks(question, chat))

    def _stream(self, exchange: Exchange, chunks: Iterator[Any]) -> None:
        exchange.head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        try:
            for chunk in chunks:
                data = f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n".encode()
                exchange.raw(b"%x\r\n%s\r\n" % (len(data), data))
                exchange.pause(PAUSE)
            exchange.raw(b"0\r\n\r\n")
        except OSError:
            self.left.set()
            raise

    def _chunks(self, question: str, chat: bool) -> Iterator[Any]:
        def piece(text: Any, kind: str = "content") -> Any:
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            return {"choices": [choice | ({"delta": {kind: text}} if chat else {"text": text})]}

        def end(reason: str) -> Any:
            return {"choices": [{"index": 0, "finish_reason": reason, **({"delta": {}} if chat else {"text": ""})}]}

        written = 0
        if question == "tools":
            for name, given in (("look_up", '{"pla'), ("", 'ce": "<b>"}')):
                yield piece([{"index": 0, "function": {"name": name, "arguments": given}}], "tool_calls")
            yield end("tool_calls")
            yield "[DONE]"
            return
        if question == "think":
            for word in ("Let me ", "see. ", "<b>2</b> "):
                yield piece(word, "reasoning_content")
        for word in ANSWERS.get(question, f"You said: {question}").split(" "):
            written += 1
            yield piece(f"{word} ")
            if question == "break" and written == 3:
                yield {
                    "error": {"message": "The stage “trunk” went away.", "type": "server_error", "code": "remote.gone"}
                }
                return
            if question == "cut" and written == 3:
                return
        while question == "slow" and not self.go_on.is_set():
            written += 1
            yield piece(f"word{written} ")
        yield end("length" if question == "length" else "stop")
        details = {"cached_tokens": 12}
        yield {
            "choices": [],
            "usage": {"prompt_tokens": 20, "completion_tokens": written, "prompt_tokens_details": details},
        }
        yield "[DONE]"


def page_files() -> list[Path]:
    """Return the files of the page."""
    return sorted(PAGE.iterdir())
