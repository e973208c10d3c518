"""A stage of a bundle behind a port: the stage, its service, gRPC, and the status server, put together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from splitbundle.backends import registry
from splitbundle.errors import BundleError, MissingExtra, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_number
from splitbundle.planning.costs import bundle_costs
from splitbundle.records import record
from splitbundle.serving.quotas import Quota
from splitbundle.serving.stage_service import Served, StageService
from splitbundle.serving.status_server import StatusServer
from splitbundle.wire.frames import MAX_FRAME
from splitbundle.wire.headers import MAX_BYTES, MAX_LEASE
from splitbundle.wire.messages import Limits
from splitbundle.wire.step_headers import MAX_ROWS

if TYPE_CHECKING:
    from types import TracebackType

    from splitbundle.bundle import Bundle

DEFAULT_SLOTS: Final = 65536
DEFAULT_CAPACITY: Final = 2**20
_MOST: Final = {
    **dict.fromkeys(("slots", "sessions", "tickets"), 2**40),
    **dict.fromkeys(("rows", "shared_rows"), MAX_ROWS),
    **dict.fromkeys(("max_bytes", "bytes_per_client"), 2**60),
    "sessions_per_client": 2**40,
    "message": MAX_FRAME,
}
_LEAST: Final = {"message": MAX_BYTES + 2**10, "shared_rows": 0}
"""The least value of a number, if it isn't 1. In the shortest message a header fits, and some tokens."""
_INNER: Final[Any] = {"embeds": False, "head": False}
"""Layers that are served have no ends, even the first and the last ones."""
_WAKE: Final = 0.25
"""The seconds after which a thread that waits looks whether a signal has come."""
_LAST: Final = 1.0
"""The seconds after the grace in which threads end that compute nothing any more."""
_SWEEP: Final = 0.5
"""The seconds between two looks for sessions whose lease ran out."""


@record(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a server gives its clients."""

    slots: int = DEFAULT_SLOTS
    """The slots of all sessions together. A slot is the room for one token of a row."""
    sessions: int = 256
    rows: int = 64
    """The most rows of a session."""
    shared_rows: int = 8
    """The rows of a cache that sessions share: steps of several sessions that wait are computed together, and long ones
    in pieces between them. A client that is alone gets the same bits as without it; 0 for no such cache."""
    max_bytes: int | None = None
    """The bytes that the caches of all sessions may take; None for what the slots take."""
    sessions_per_client: int | None = None
    """The most sessions of one client; None for as many as there are."""
    bytes_per_client: int | None = None
    """The bytes that the caches of one client's sessions may take; None for as many as there are."""
    message: int = MAX_FRAME
    """The longest message, in bytes."""
    tickets: int = 64
    """The forward calls of a training step that may wait for a gradient."""
    lease: float = 60.0
    """The seconds that a session lives without a message."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            BundleError: ``input.value`` for one that clients couldn't use.
        """
        for name, most in _MOST.items():
            number, least = getattr(self, name), _LEAST.get(name, 1)
            if number is not None and (as_integer(number) is None or not least <= number <= most):
                raise wrong_argument(name, f"a number from {least} to {most}", quoted(number))
        lease = as_number(self.lease)
        if lease is None or not 0 < lease <= MAX_LEASE:
            raise wrong_argument("lease", f"seconds, above 0, at most {MAX_LEASE:g}", quoted(self.lease))


@record(frozen=True, slots=True, kw_only=True)
class Trainer:
    """How a server trains its stage."""

    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    lora_rank: int | None = None
    """Train a LoRA of this rank, and no weight of the bundle; None to train all weights."""
    lora_alpha: float | None = None
    """The scaling is alpha / rank; by default 2 · rank."""
    checkpoints: str | os.PathLike[str] | None = None
    """The directory of checkpoints, of which each step writes one."""


class StageServer:
    """A stage that other machines compute with. It serves from ``start``, or from ``with``, on."""

    def __init__(
        self,
        bundle: Bundle,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        backend: str | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: str | os.PathLike[str] | None = None,
        tokens: Mapping[str, str] | None = None,
        budget: Budget | None = None,
        trainer: Trainer | None = None,
        status: tuple[str, int] | None = None,
        log: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """Load a stage, and listen at an address.

        Args:
            bundle: the bundle. Its other shards may be missing.
            name: a shard's name. Give either ``name`` or ``layers``.
            layers: ``(start, stop)``, without the embedding and the head.
            backend: ``"torch"`` or ``"onnxruntime"``; by default torch if it is installed.
            host: the host to listen at; by default a loopback address.
            port: the port; 0 for any free one.
            tls: a directory with ``ca.pem``, ``cert.pem`` and ``key.pem``, as ``splitbundle keys server`` makes it.
                Without it, only a loopback address is allowed.
            tokens: a name -> a token, if clients show tokens; otherwise, with ``tls``, they show certificates.
            budget: what the server gives its clients.
            trainer: how it trains the stage; None if it only computes.
            status: the host and the port of ``/healthz`` and ``/metrics`` over HTTP; None for none.
            log: called with a line for each session, training step and refusal, and where the list of revoked
                certificates can't be read, from any thread. A line holds the name of a client, and no content; an
                ``OSError`` or ``ValueError`` of the function is passed over. None for ``logging``.
            options: those of ``Bundle.stage``, such as ``threads`` and ``dtype``. The kernels are torch's usual ones
                unless they are named, so that two servers give the same numbers.

        Raises:
            BundleError: ``stage.range`` for a part that embeds or has the head; ``server.address``; ``keys.file``;
                ``input.value``; the errors of loading.
            MissingExtra: ``grpcio`` isn't installed.
        """
        try:
            from splitbundle.remote.tls_files import read_identity
            from splitbundle.remote.tls_purpose import check_purpose
            from splitbundle.serving.grpc_server import GrpcServer
            from splitbundle.serving.revoked import RevokedCertificates
        except ModuleNotFoundError as error:
            if error.name != "grpc":
                raise
            raise MissingExtra.of("grpcio", "network", "serve a stage") from None
        check_ends(bundle, name, layers)
        given = Budget() if budget is None else budget
        _check_tokens(tokens)
        identity = None if tls is None else read_identity(tls)
        if identity is not None and identity.certificate is None:
            raise wrong_argument("tls", "a directory with cert.pem and key.pem", "ca.pem alone")
        if tls is not None:
            check_purpose(Path(tls), "server")
        self.service = load_service(bundle, name, layers, backend, given, trainer=trainer, log=log, **options)
        self.stage: Any = self.service.served.stage
        revoked = None if tls is None else RevokedCertificates(Path(tls), log=self.service.note)
        self._status = None
        try:
            self._server = GrpcServer(
                self.service.answer,
                host,
                _checked_port(port),
                max_message=given.message,
                tls=identity,
                tokens=tokens,
                refused=self.service.refused,
                **({} if revoked is None else {"is_revoked": revoked.has}),
            )
            if status is not None:
                self._status = StatusServer(self.service, *status)
        except BundleError:
            if hasattr(self, "_server"):
                self._server.stop(0).wait()
            self.service.stop()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'grpc' if identity is None else 'grpcs'}://{shown}:{self._server.port}"
        """The address for clients. If the host means all addresses of the machine, they need its name instead."""
        self.status_url = None if self._status is None or status is None else _http(status[0], self._status.port)
        self._begun, self._ended = False, threading.Event()
        self._sweeper = threading.Thread(
            target=_sweep, args=(self.service, self._ended), name="splitbundle-leases", daemon=True
        )

    def start(self) -> None:
        """Begin to serve, in threads of its own. A server that was stopped can't begin again.

        Raises:
            RuntimeError: it has begun already.
        """
        if self._begun:
            raise RuntimeError("this server has begun already: make another one")
        self._begun = True
        self._server.start()
        self._sweeper.start()
        if self._status is not None:
            self._status.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until ``stop`` is called, at most ``timeout`` seconds. Return whether it was called."""
        if timeout is not None:
            return self._ended.wait(timeout)
        # The system may hand a signal to another thread. Then Python handles it when the main thread wakes up.
        while not self._ended.wait(_WAKE):
            pass
        return True

    def stop(self, grace: float = 10.0) -> bool:
        """Begin nothing new, give the steps that are computed ``grace`` seconds, and end.

        A program that doesn't call it ends late: threads wait for clients that may still ask.

        Return whether every step has ended. Nothing can interrupt one that takes longer: its client is told that the
        server ends, its thread goes on, and the program can't end before it, except with ``os._exit``.
        """
        until = time.monotonic() + grace
        self.service.drain()
        self._ended.set()
        calls = self._server.stop(grace)
        while not calls.wait(_WAKE):  # as above: a second signal ends a command that drains
            pass
        ended = self.service.stop(max(_LAST, until - time.monotonic()))
        self._server.close(wait=ended)
        if self._begun:
            if self._status is not None:
                self._status.stop()
            self._sweeper.join(None if ended else _LAST)
        return ended

    def __enter__(self) -> StageServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def load_service(
    bundle: Bundle,
    name: str | None,
    layers: tuple[int, int] | None,
    backend: str | None,
    budget: Budget,
    *,
    trainer: Trainer | None = None,
    log: Callable[[str], None] | None = None,
    **options: Any,
) -> StageService:
    """Load a stage, and return what answers its frames. ``StageServer`` says what the arguments are.

    Raises:
        BundleError: ``stage.range``; the errors of loading.
    """
    chosen = backend or registry.installed_backend()
    if chosen == "torch" and options.get("kernels") is None:
        options["kernels"] = "torch"
    if trainer is not None:
        options["trainable"] = True
    if layers is not None:
        options |= _INNER
    stage = bundle.stage(name, layers=layers, backend=chosen, **options)
    training = None if trainer is None else _training(stage, trainer)
    served = registry.module(chosen, "served").ServedStage(stage)
    return StageService(served, _offer(bundle, stage, served.dtype, budget), training=training, log=log)


def _sweep(service: StageService, ended: threading.Event) -> None:
    while not ended.wait(_SWEEP):
        service.end_leases()


def check_ends(bundle: Bundle, name: str | None, layers: tuple[int, int] | None) -> None:
    """Check before weights are read that a part neither embeds nor has the head."""
    selection = bundle.select(name) if layers is None else bundle.select(layers=layers, **_INNER)
    if selection.embeds or selection.head:
        inner = [shard.name for shard in bundle.shards if not (shard.embeds or shard.head)]
        hint = f"This bundle has {', '.join(inner)}" if inner else "Cut the bundle anew, with a shard in the middle"
        expected = "a part between the embedding and the head: token ids and logits stay with the client"
        got = "one that embeds" if selection.embeds else "one that has the head"
        raise BundleError(Problem(code="stage.range", argument=selection.name, expected=expected, got=got, hint=hint))


def _http(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _checked_port(port: object) -> int:
    number = as_integer(port)
    if number is None or not 0 <= number < 2**16:
        raise wrong_argument("port", "a number from 0 to 65535", quoted(port))
    return number


def _check_tokens(tokens: Mapping[str, str] | None) -> None:
    if tokens is not None and not isinstance(tokens, Mapping):
        raise wrong_argument("tokens", "a mapping of names to tokens", quoted(tokens))
    for name, token in (tokens or {}).items():
        if (
            not isinstance(token, str)
            or len(token) < 16
            or not token.isascii()
            or not token.isprintable()
            or " " in token
        ):
            expected = "a token of at least 16 printable ASCII characters, without spaces"
            raise wrong_argument(f"the token of {quoted(name)}", expected, "another one")
    if tokens is not None and not tokens:
        raise wrong_argument("tokens", "at least one token", "none")


def _training(stage: Any, trainer: Trainer) -> Any:
    if trainer.lora_rank is not None:
        alpha = 2.0 * trainer.lora_rank if trainer.lora_alpha is None else trainer.lora_alpha
        stage.add_lora(trainer.lora_rank, alpha)
    return registry.module("torch", "served_training").ServedTraining(
        stage,
        optimizer=trainer.optimizer,
        learning_rate=trainer.learning_rate,
        weight_decay=trainer.weight_decay,
        checkpoints=trainer.checkpoints,
    )


def _offer(bundle: Bundle, stage: Any, dtype: str, budget: Budget) -> Served:
    costs = bundle_costs(bundle.manifest, bundle.architecture, dtype)
    slot = sum(layer.cache_bytes_per_token for layer in costs.layers[slice(*stage.layer_range)])
    limits = Limits(
        message=budget.message,
        rows=budget.rows,
        capacity=min(bundle.architecture.position_limit or DEFAULT_CAPACITY, budget.slots),
        slots=budget.slots,
        sessions=budget.sessions,
        tickets=budget.tickets,
        lease=budget.lease,
    )
    most = budget.slots * slot if budget.max_bytes is None else budget.max_bytes
    quota = Quota(sessions=budget.sessions_per_client, max_bytes=budget.bytes_per_client)
    return Served(
        bundle=bundle.id,
        limits=limits,
        max_bytes=most,
        slot_bytes=slot,
        shared_rows=budget.shared_rows,
        quota=quota,
    )
