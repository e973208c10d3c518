"""Stages of other machines, and pipelines with some of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from splitbundle.backends import registry
from splitbundle.errors import BundleError, MissingExtra, Problem, quoted, wrong_argument

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.stages.golden import Difference
    from splitbundle.storage.reader import BundleReader

OPTIONS: Final = ("tls", "token", "wire", "replay", "timeout", "step_timeout", "insecure", "same_weights")
"""The options of a remote stage, beside ``remote``."""
TOKEN: Final = "SPLITBUNDLE_STAGE_TOKEN"  # noqa: S105  # the name of a variable
_OF_STAGES: Final = {"torch": ("device", "trainable"), "onnxruntime": ()}
"""The options of a backend that a remote stage has, too. The others are the server's."""


def token_of_environment() -> str | None:
    """Return the token for servers that the environment has, or None."""
    return os.environ.get(TOKEN) or None


def take_options(given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take the options of remote stages out of those of a call. Return ``remote``, and its options.

    Raises:
        BundleError: ``input.value`` for an option without ``remote``.
    """
    remote = given.pop("remote", None)
    options: dict[str, Any] = {name: given.pop(name) for name in OPTIONS if name in given}
    if remote is None:
        for name, value in options.items():
            if value is not None:
                raise wrong_argument(name, "nothing without remote=", quoted(value))
    return remote, options


def load_stage(
    bundle: BundleReader,
    selection: Selection,
    backend: str,
    remote: Any,
    remote_options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Any:
    """Connect to a stage of another machine. See ``Bundle.stage``.

    Raises:
        BundleError: ``stage.range`` for a part that embeds or has the head; ``stage.backend`` for an option that is the
            server's; ``peer.*``.
    """
    own = registry.own_options(backend, given, "stage")
    for name, value in own.items():
        if name not in _OF_STAGES[backend]:
            hint = "The server that holds the stage sets it"
            problem = Problem(
                code="stage.backend", argument=name, expected="nothing for a remote stage", got=quoted(value), hint=hint
            )
            raise BundleError(problem)
    return _connect(bundle, selection, backend, _addresses(remote), remote_options, own)


def load_pipeline(
    bundle: BundleReader,
    backend: str | Mapping[str, str],
    remote: Any,
    remote_options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Any:
    """Load a pipeline of which some stages are on other machines. See ``Bundle.pipeline``.

    Raises:
        BundleError: as for ``Bundle.pipeline`` and ``load_stage``.
    """
    if not isinstance(remote, Mapping):
        raise wrong_argument("remote", "a mapping of shards to addresses", quoted(remote))
    mixed = isinstance(backend, Mapping)
    for name in (*remote, *(backend if mixed else ())):
        bundle.shard(name)
    local = [shard.name for shard in bundle.shards if shard.name not in remote]
    backend_of = {name: backend.get(name, "torch") if isinstance(backend, Mapping) else backend for name in local}
    used = dict.fromkeys(backend_of.values())
    arrays = "onnxruntime" in used or backend == "onnxruntime"
    kind = "onnxruntime" if arrays else "torch"
    stages: dict[str, Any] = {}
    for name, addresses in remote.items():  # before weights are read, which takes longer
        own = {key: given[key] for key in _OF_STAGES[kind] if given.get(key) not in (None, False)}
        stages[name] = _connect(bundle, bundle.select(name), kind, _addresses(addresses), remote_options, own)
    for each in used:
        named = [name for name in local if backend_of[name] == each]
        own = registry.own_options(each, given, "pipeline", others=used)
        loaded = registry.module(each, "stage").load_stages(bundle, [bundle.select(name) for name in named], **own)
        stages |= dict(zip(named, loaded, strict=True))
    same = remote_options.get("same_weights") is not False
    return registry.module(kind, "pipeline").Pipeline(
        [stages[shard.name] for shard in bundle.shards], same_weights=same
    )


def check_options(remote_options: Mapping[str, Any]) -> None:
    """Check the options of remote stages, with the certificate of this machine, before any server is asked.

    Raises:
        BundleError: ``input.value``; ``keys.file`` and ``file.*``.
    """
    remote = _network()
    remote.check_identity(_options(remote, remote_options))


def measure(address: str, remote_options: Mapping[str, Any], repeats: int) -> Any:
    """Return what a server is, and what a hop to it costs: ``remote.measuring.Measured``.

    Raises:
        BundleError: ``peer.unreachable``; ``peer.identity``; ``input.value``.
    """
    remote = _network()
    options = _options(remote, remote_options)
    wanted = remote.Expected(name=None, fingerprint=None, layers=None, width=None)
    peers = remote.Peers(address, wanted, options)
    try:
        return remote.measure(peers.peers[0], repeats, options.timeout)
    except remote.Lost as lost:
        peers.peers[0].failed(lost.reason)
        raise peers.unreachable() from None


def check(bundle: BundleReader, shard: str, remote: Any, remote_options: Mapping[str, Any]) -> list[Difference]:
    """Send the golden vectors of a shard through a server, and compare the results with those in the bundle.

    Raises:
        ParityError: for a difference above the tolerance of the dtype in which the server computes.
        BundleError: ``vectors.none``; the errors of ``load_stage``.
    """
    from splitbundle.stages import golden

    backend = registry.installed_backend()
    stage = load_stage(bundle, bundle.select(shard), backend, remote, remote_options, {})
    found: list[Difference] = registry.module(backend, "golden").check_stage(bundle, shard, stage)
    golden.check(found, golden.file_of(bundle))
    return found


def check_ends(selection: Selection, argument: str) -> None:
    """Check that a part may be on another machine. ``argument`` names where it was given.

    Raises:
        BundleError: ``stage.range`` for one that embeds or has the head.
    """
    if selection.embeds or selection.head:
        expected = "a part between the embedding and the head: token ids and logits stay here"
        got = f"{selection.name}, which {'embeds' if selection.embeds else 'has the head'}"
        hint = "Cut the bundle anew, so that this shard has layers alone, or name another shard"
        raise BundleError(Problem(code="stage.range", argument=argument, expected=expected, got=got, hint=hint))


def _addresses(given: Any) -> list[Any]:
    """Return the addresses of servers, each by itself. A carrier (``remote.carrier``) stands for an address, too."""
    found = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else None
    if not found or not all(isinstance(each, str) or hasattr(each, "step") for each in found):
        raise wrong_argument("remote", "an address such as grpcs://HOST:PORT, or a list of them", quoted(given))
    made: list[Any] = []
    for each in found:
        made += [address.strip() for address in each.split(",")] if isinstance(each, str) else [each]
    return made


def _connect(
    bundle: BundleReader,
    selection: Selection,
    backend: str,
    addresses: Sequence[Any],
    remote_options: Mapping[str, Any],
    own: Mapping[str, Any],
) -> Any:
    check_ends(selection, "remote")
    network = _network()
    options = _options(network, remote_options)
    wanted = network.Expected(
        name=selection.name,
        fingerprint=bundle.fingerprint if options.same_weights else None,
        layers=selection.layers,
        width=bundle.architecture.hidden_size,
        trains=bool(own.get("trainable")),
    )
    made = registry.module(backend, "remote").RemoteStage
    return made(bundle, selection, network.Peers(addresses, wanted, options), options, **own)


def _network() -> Any:
    """Return the names of ``remote`` that need gRPC.

    Raises:
        MissingExtra: ``grpcio`` isn't installed.
    """
    try:
        from splitbundle.remote import client
    except ModuleNotFoundError as error:
        if error.name != "grpc":
            raise
        raise MissingExtra.of("grpcio", "network", "compute with a stage of another machine") from None
    return client


def _options(network: Any, given: Mapping[str, Any]) -> Any:
    return network.RemoteOptions.of(**{"token": token_of_environment(), **_given(given)})


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
