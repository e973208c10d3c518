"""The few names of Ray that our side of a cluster needs, so that its errors are tested where Ray isn't installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

KEPT = ("splitbundle.remote.ray_channel", "splitbundle.serving.ray_texts")
"""The modules that import these names. They are imported anew, and forgotten afterwards."""


class RayError(Exception):
    """The base of Ray's errors."""


class RayTaskError(RayError):
    """Code in another process raised an error."""


class RayActorError(RayError):
    """An actor is dead, or being restarted."""


class GetTimeoutError(RayError, TimeoutError):
    """There is no result in time."""


class RayServeException(Exception):
    """The base of Serve's errors."""


class BackPressureError(RayServeException):
    """The queue is full."""


class DeploymentUnavailableError(RayServeException):
    """The deployment failed."""


def modules() -> dict[str, ModuleType]:
    """Return stand-ins for the modules of Ray. An answer of a fake actor is a function that is called by ``get``."""
    ray, exceptions, serve, serve_exceptions = (
        ModuleType(name) for name in ("ray", "ray.exceptions", "ray.serve", "ray.serve.exceptions")
    )
    for error in (RayError, RayTaskError, RayActorError, GetTimeoutError):
        setattr(exceptions, error.__name__, error)
    for error in (RayServeException, BackPressureError, DeploymentUnavailableError):
        setattr(serve_exceptions, error.__name__, error)

    def get(reference: Callable[[float], Any], timeout: float) -> Any:
        return reference(timeout)

    vars(ray).update(exceptions=exceptions, serve=serve, get=get, is_initialized=lambda: True)
    vars(serve).update(exceptions=serve_exceptions)
    return {each.__name__: each for each in (ray, exceptions, serve, serve_exceptions)}


def imported(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Import one of ``KEPT`` with the stand-ins, until the test ends."""
    for stand_in, module in modules().items():
        monkeypatch.setitem(sys.modules, stand_in, module)
    for each in KEPT:
        monkeypatch.delitem(sys.modules, each, raising=False)
    made = importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, made)  # so that the end of the test forgets it
    return made


def actor(answer: Callable[[bytes, float], Any], sent: list[bytes]) -> Any:
    """Return the handle of an actor whose method ``answer`` is this function of the frame and the seconds to wait."""

    def remote(frame: bytes) -> Callable[[float], Any]:
        sent.append(frame)
        return lambda timeout: answer(frame, timeout)

    return SimpleNamespace(answer=SimpleNamespace(remote=remote))
