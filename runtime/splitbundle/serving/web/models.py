"""The bundles that a server has: each is loaded when it is first asked for, and the idle ones make room for others."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from splitbundle import logs
from splitbundle.errors import BundleError, Problem
from splitbundle.planning.costs import bundle_costs
from splitbundle.stages.shared_pipeline import SharedPipeline

_FRESH: Final = 1.0
"""The seconds for which the result of a health check holds. So requests can't keep the model busy."""


class Model:
    """One bundle of a server: its name, how it is loaded, and its shared pipeline while it is."""

    def __init__(self, name: str, bundle: Any, load: Callable[[], Any]) -> None:
        """Describe a model. Nothing is loaded yet.

        Args:
            name: the name that clients give.
            bundle: the bundle.
            load: returns a new ``SharedPipeline``, or an object like it.
        """
        self.name, self.bundle, self._load = name, bundle, load
        self.created = int(time.time())
        self.pipeline: SharedPipeline | None = None
        self.users = 0
        self.is_loading = False
        """Whether room was made for it, and it isn't loaded yet."""
        self.last_used = time.monotonic()
        self.loaded_at = 0.0
        self.lock = threading.RLock()
        self._checking = threading.Lock()
        self._checked, self._healthy = -_FRESH, False

    @property
    def bytes(self) -> int:
        """Return about how many bytes the model takes while it is loaded: its weights."""
        architecture = self.bundle.architecture
        costs = bundle_costs(self.bundle.manifest, architecture)
        return costs.of_range((0, len(architecture.layers)), embeds=True, head=True).weight_bytes

    @functools.cached_property
    def has_template(self) -> bool:
        """Return whether the bundle has a chat template."""
        try:
            document = self.bundle.tokenizer().document
        except BundleError:
            return False
        return document is not None and bool(document.templates)

    def load(self) -> SharedPipeline:
        """Return the pipeline, and load it first if need be. The caller holds ``lock``."""
        if self.pipeline is None:
            self.pipeline, self.loaded_at = self._load(), time.monotonic()
            logs.debug("%s was loaded", self.name)
        return self.pipeline

    def unload(self) -> None:
        """Free the pipeline. The caller holds ``lock``."""
        pipeline, self.pipeline = self.pipeline, None
        if pipeline is not None:
            pipeline.close()
            logs.debug("%s was unloaded", self.name)

    def is_healthy(self) -> bool:
        """Compute a token, between the calls of others, and return whether the logits are finite."""
        with self.lock:
            pipeline = self.pipeline
        if pipeline is None:
            return True
        with self._checking:  # those who ask meanwhile share the result
            if time.monotonic() - self._checked >= _FRESH:
                try:
                    (scores,) = pipeline.log_probabilities([[0, 0]])
                    self._healthy = all(abs(score) < float("inf") for score in scores)
                except Exception as error:  # noqa: BLE001  # whatever it is, the model doesn't answer
                    logs.debug("%s failed its health check: %s", self.name, error)
                    self._healthy = False
                self._checked = time.monotonic()
            return self._healthy


class Models:
    """The models of a server. Threads may share it."""

    def __init__(self, models: Mapping[str, Model], max_bytes: int | None = None) -> None:
        """Take some models.

        Args:
            models: the models by name. The first one answers requests without a name of a model.
            max_bytes: the bytes that loaded models may take together; None for no limit.

        Raises:
            BundleError: ``server.memory`` for a model that is larger than the limit.
        """
        self._models, self._max_bytes, self._lock = dict(models), max_bytes, threading.Lock()
        for model in self:
            if max_bytes is not None and model.bytes > max_bytes:
                raise _no_room(model, f"{max_bytes} bytes, the limit", f"{model.bytes} bytes")

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def __getitem__(self, name: str) -> Model:
        return self._models[name]

    def __contains__(self, name: object) -> bool:
        return name in self._models

    @property
    def first(self) -> Model:
        """Return the first model."""
        return next(iter(self))

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[tuple[Model, SharedPipeline]]:
        """Give a model with its pipeline, which stays loaded for as long.

        Raises:
            BundleError: ``server.memory`` if other models are busy and leave no room; what loading raises.
        """
        model = self._models[name]
        with self._lock:
            model.users += 1
        try:
            with model.lock:
                if model.pipeline is None:
                    self._make_room(model)
                try:
                    pipeline = model.load()
                finally:
                    model.is_loading = False
            yield model, pipeline
        finally:
            with self._lock:
                model.users -= 1
                model.last_used = time.monotonic()

    def _make_room(self, wanted: Model) -> None:
        """Unload the models that have rested longest, until there is room for another one."""
        if self._max_bytes is None:
            return
        with self._lock:
            while True:
                others = [model for model in self if model is not wanted]
                loaded = [model for model in others if model.pipeline is not None or model.is_loading]
                if sum(model.bytes for model in loaded) + wanted.bytes <= self._max_bytes:
                    wanted.is_loading = True
                    return
                idle = [model for model in loaded if not model.users]
                if not idle:
                    busy = ", ".join(model.name for model in loaded)
                    raise _no_room(wanted, f"room for {wanted.bytes} bytes", f"models that are busy: {busy}")
                oldest = min(idle, key=lambda model: model.last_used)
                oldest.unload()  # nobody uses it, and nobody can begin to: that takes this lock

    def close(self) -> None:
        """Unload all models."""
        for model in self:
            with model.lock:
                model.unload()


def _no_room(model: Model, expected: str, got: str) -> BundleError:
    return BundleError(
        Problem(code="server.memory", argument=model.name, expected=expected, got=got, hint="Try again later")
    )
