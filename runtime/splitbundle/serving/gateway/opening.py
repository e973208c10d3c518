"""Open a gateway. The libraries of the extras ``serve`` and ``network`` are imported here, and not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, MissingExtra, Problem
from splitbundle.serving.gateway.page_files import onnxruntime_files, page_files
from splitbundle.serving.web.access import Access

if TYPE_CHECKING:
    from splitbundle.serving.gateway.relay import Relay
    from splitbundle.serving.web.web_server import WebServer

_EXTRAS: Final = {"starlette": "serve", "uvicorn": "serve", "grpc": "network"}
"""A library -> the extra that installs it."""


def open_relays(
    bundle: Bundle,
    remote: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
    log: Callable[[str], None] | None = None,
) -> dict[str, Relay]:
    """Return the ways to the remote stages of a bundle. Each has a server that answers.

    Args:
        bundle: the bundle.
        remote: the servers of each shard, by their addresses or by what brings frames to them.
        options: as for ``RemoteOptions.of``.
        log: called with a line where no server answers.

    Raises:
        BundleError: ``stage.name``; ``stage.range`` for a shard that embeds or has the head; ``input.value``;
            ``keys.file``; ``peer.*``.
        MissingExtra: a library isn't installed.
    """
    try:
        from splitbundle.remote.options import RemoteOptions
        from splitbundle.remote.peers import Expected, Peers
        from splitbundle.serving.gateway.relay import Relay
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    own = RemoteOptions.of(**options)
    made = {}
    for name, addresses in remote.items():
        shard = bundle.shard(name)
        if shard.embeds or shard.head:
            expected = "a shard between the embedding and the head: token ids and logits stay in the browser"
            got = f"{name}, which {'embeds' if shard.embeds else 'has the head'}"
            raise BundleError(Problem(code="stage.range", argument="remote", expected=expected, got=got))
        wanted = Expected(
            name=name,
            fingerprint=bundle.fingerprint if own.same_weights else None,
            layers=shard.layers,
            width=bundle.architecture.hidden_size,
        )
        peers = Peers(list(addresses), wanted, own)
        made[name] = Relay(name, peers, timeout=own.timeout, step_timeout=own.step_timeout, log=log)
    for relay in made.values():
        relay.check()
    return made


def open_gateway(
    bundle: Bundle,
    relays: Mapping[str, Relay],
    access: Access | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    hosts: Sequence[str] | None = None,
    origins: Sequence[str] = (),
    onnxruntime_web: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    log: Callable[[str], None] | None = None,
) -> WebServer:
    """Listen at an address. The gateway answers from ``start``, or from ``with``, on.

    Args:
        bundle: the bundle whose files are served.
        relays: what ``open_relays`` returns.
        access: the keys; None if everybody may ask.
        host: the host to listen at; by default a loopback address.
        port: the port; 0 for any free one.
        hosts: the names in the header ``Host`` that requests may have; None for all.
        origins: the origins of other servers whose bundles the page may read.
        onnxruntime_web: the directory of onnxruntime-web; by default where npm puts it, if it is there.
        certificate: the file of the server's certificate, for https.
        key: the file of its key.
        log: called with a line for each request, without content.

    Raises:
        BundleError: ``server.address``, ``keys.file``, ``file.missing``.
        MissingExtra: a library isn't installed.
    """
    try:
        from splitbundle.serving.gateway.app import Gateway
        from splitbundle.serving.web.web_server import WebServer
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    page, onnxruntime = page_files(), onnxruntime_files(onnxruntime_web)
    gateway = Gateway(bundle, relays, page, onnxruntime, access or Access(), hosts=hosts, origins=origins, log=log)
    return WebServer(gateway, host, port, certificate=certificate, key=key)


def _missing(error: ModuleNotFoundError) -> Exception:
    library = (error.name or "").partition(".")[0]
    if library not in _EXTRAS:
        return error
    return MissingExtra.of("grpcio" if library == "grpc" else library, _EXTRAS[library], "bring frames to a stage")
