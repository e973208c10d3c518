"""A plain static HTTP server for tests, with and without ranges."""

from __future__ import annotations

import hashlib
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from tests.support.http_server import Exchange, LoopbackServer
from tests.support.lies import Lie


class StaticFiles(LoopbackServer):
    """Serves the files under a directory. Lies are bound to paths such as ``/b.splitbundle/layer-000.safetensors``."""

    def __init__(
        self,
        root: Path,
        *,
        ranges: bool = True,
        lies: Mapping[str, Lie | str] | None = None,
        token: str | None = None,
    ) -> None:
        """Take the directory.

        Args:
            root: the directory.
            ranges: whether the server knows ranges.
            lies: a pattern of paths -> a lie, or its name.
            token: the bearer token that every request needs.
        """
        super().__init__(lies)
        self.root, self.ranges, self.token = root.resolve(), ranges, token

    def respond(self, exchange: Exchange) -> None:
        """Answer a request."""
        place = (self.root / urllib.parse.unquote(exchange.path).lstrip("/")).resolve()
        if exchange.method not in ("GET", "HEAD"):
            exchange.answer(405)
        elif self.token is not None and exchange.seen.authorization != f"Bearer {self.token}":
            exchange.answer(401, b"log in", {"WWW-Authenticate": 'Bearer realm="static"'})
        elif not place.is_relative_to(self.root) or not place.is_file():
            exchange.answer(404, b"not found")
        else:
            data = place.read_bytes()
            exchange.content(data, ranges=self.ranges, tag=f'"{hashlib.md5(data).hexdigest()}"')


def static_server(
    root: Path, *, ranges: bool = True, lies: Mapping[str, Lie | str] | None = None, token: str | None = None
) -> StaticFiles:
    """Return a server, a context manager: ``with static_server(root) as server: server.url``."""
    return StaticFiles(root, ranges=ranges, lies=lies, token=token)
