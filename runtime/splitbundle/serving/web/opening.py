"""Open a server over some models. The libraries of the extra ``serve`` are imported here, and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from splitbundle.errors import MissingExtra
from splitbundle.serving.web.access import Access
from splitbundle.serving.web.models import Models

if TYPE_CHECKING:
    from splitbundle.serving.web.web_server import WebServer

_LIBRARIES: Final = ("starlette", "uvicorn", "prometheus_client")


def open_web_server(
    models: Models,
    access: Access | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    certificate: str | None = None,
    key: str | None = None,
    log: Callable[[str], None] | None = None,
) -> WebServer:
    """Listen at an address. The server answers from ``start``, or from ``with``, on.

    Args:
        models: the models.
        access: the keys; None if everybody may ask.
        host: the host to listen at; by default a loopback address.
        port: the port; 0 for any free one.
        hosts: the names in the header ``Host`` that requests may have; None for all.
        origins: the origins of pages that may ask from a browser.
        certificate: the file of the server's certificate, for https.
        key: the file of its key.
        log: called with a line for each request, without content.

    Raises:
        BundleError: ``server.address``, ``keys.file``.
        MissingExtra: a library isn't installed.
    """
    try:
        from splitbundle.serving.web.app import Door
        from splitbundle.serving.web.web_server import WebServer
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _LIBRARIES:
            raise
        raise MissingExtra.of(library, "serve", "answer over HTTP") from None
    door = Door(models, access or Access(), hosts=hosts, origins=origins, log=log)
    return WebServer(door, host, port, certificate=certificate, key=key)
