"""The cluster of a deployment: start or join one, demand tokens, and tell what is free in it."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Sequence
from typing import Any, Final

import grpc
import ray
from ray._private.authentication.authentication_token_setup import _enable_token_auth

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.serving.ray_settings import told

AUTO, LOCAL = "auto", "local"
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_PROBE: Final = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""A harmless request to the head of a cluster. Without a token, a cluster that demands one refuses it."""
_PROBE_SECONDS: Final = 10.0


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, *, connected: bool, started: bool) -> None:
        self.connected, self.started = connected, started
        """Whether this connection was made here, and whether the cluster was started here."""

    def close(self) -> None:
        """End the connection, and the cluster if it was started here."""
        if self.connected and ray.is_initialized():
            ray.shutdown()

    @property
    def free(self) -> str:
        """Return what is free, in words, for each machine."""
        found = ray._private.state.available_resources_per_node()
        each = [told(resources) for resources in found.values()]
        return f"{len(each)} machines with {'; '.join(each)} free" if len(each) != 1 else f"{each[0]} free"


def join(address: str | None, *, object_store_bytes: int | None = None, cpus: int | None = None) -> Cluster:
    """Connect this process to a cluster that demands a token from everybody.

    Args:
        address: ``"local"`` to start one on this machine alone; ``"auto"`` or ``"HOST:PORT"`` for one that is up; None
            for the one that this process is connected to.
        object_store_bytes: for a cluster that is started here, the memory for large messages.
        cpus: for a cluster that is started here, the processors that it gives; by default those of the machine.

    Raises:
        BundleError: ``cluster.address``; ``cluster.token``.
    """
    if address is not None and (not isinstance(address, str) or "://" in address):
        raise wrong_argument("address", f'"{AUTO}", "{LOCAL}", "HOST:PORT", or None', quoted(address))
    if ray.is_initialized():
        if address == LOCAL:
            hint = "Call ray.shutdown() first, or give address=None to use that cluster"
            raise wrong_argument("address", "a process that isn't connected to a cluster", "one that is", hint)
        _demand_tokens()
        return Cluster(connected=False, started=False)
    if address is None:
        raise wrong_argument("address", f'"{AUTO}" or "{LOCAL}"', "None, in a process without a cluster")
    _prepare_token(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address == LOCAL:
        options |= {"include_dashboard": False, "object_store_memory": object_store_bytes, "num_cpus": cpus}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except ray.exceptions.AuthenticationError:
        raise _no_token("a cluster that doesn't know this process's token") from None
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        got = " ".join(str(error).split())[:300]
        hint = (
            f"Compare the address and the token ({TOKEN}) with those of the cluster, and the versions of Ray and Python"
        )
        expected = "a cluster that takes this process"
        problem = Problem(code="cluster.address", argument=address, expected=expected, got=got, hint=hint)
        raise BundleError(problem) from None
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own there, which would end the process without ``close``
    try:
        _demand_tokens()
    except BaseException:
        ray.shutdown()
        raise
    return Cluster(connected=True, started=address == LOCAL)


def _prepare_token(address: str) -> None:
    """Let this process show a token. For a cluster that is started here, make one if there is none."""
    mode = os.environ.get(MODE, "")
    if mode.lower() not in ("", "token"):
        raise _no_token(f"{MODE}={mode}")
    has_file = os.path.exists(os.environ.get(TOKEN_PATH) or os.path.expanduser("~/.ray/auth_token"))
    if not (os.environ.get(TOKEN) or has_file):
        if address != LOCAL:
            raise _no_token(f"no token of this process: neither {TOKEN} nor {TOKEN_PATH} nor ~/.ray/auth_token")
        os.environ[TOKEN] = secrets.token_hex(32)  # Ray hands it to the processes that it starts
    _enable_token_auth()  # it also sets the variable of the mode, which Ray may have read before


def _demand_tokens() -> None:
    """Ask the head of the cluster something without a token. It has to refuse.

    Raises:
        BundleError: ``cluster.token`` if it answers.
    """
    target = ray.get_runtime_context().gcs_address
    with _channel(target) as channel:
        try:
            channel.unary_unary(_PROBE)(b"", timeout=_PROBE_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
            raise _no_token(f"an answer that doesn't tell: {error.code().name}") from None
    raise _no_token("a cluster that answers without one")


def _channel(target: str) -> Any:
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(target, options)
    from ray._common.tls_utils import load_certs_from_env

    certificate, key, authority = load_certs_from_env()
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(authority, key, certificate), options)


def _no_token(got: str) -> BundleError:
    return BundleError(
        Problem(
            code="cluster.token",
            argument="address",
            expected=f"a cluster that demands a token ({MODE}=token): whoever reaches another one runs code in it",
            got=got,
            hint=f"Set {MODE}=token, and one {TOKEN} for all, before ray start on each machine and before this process",
        )
    )


def no_room(asked: Sequence[dict[str, float]], cluster: Cluster, timeout: float) -> BundleError:
    """Return the error of a deployment that doesn't fit into a cluster."""
    each = [told(resources) for resources in asked]
    words = "; ".join(f"{each.count(one)} × {one}" for one in dict.fromkeys(each))
    return BundleError(
        Problem(
            code="cluster.placement",
            argument="replicas",
            expected=f"room for each replica's processes within {timeout:g} s: {words}",
            got=cluster.free,
            hint='Add machines, or ask for less: fewer replicas, rows or tokens, or stages="inside"',
        )
    )
