"""The metrics of the HTTP server, for Prometheus. They hold no content, and no keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from splitbundle.serving.web.models import Models

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOTALS: Final = {
    "texts": ("texts", "Texts that were begun."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "reused_tokens": ("reused_tokens", "Tokens of prompts that were in a cache already."),
    "new_tokens": ("new_tokens", "Tokens that were drawn."),
    "calls": ("calls", "Calls of the model."),
    "call_rows": ("call_rows", "Rows of all calls; divided by the calls, it is the size of a batch."),
    "compute_seconds": ("compute_seconds", "Seconds that the model computed."),
    "queue_seconds": ("queue_seconds", "Seconds that texts waited for a row."),
}
_GAUGES: Final = {
    "rows": "Texts that can be continued at once.",
    "active": "Texts that are continued.",
    "waiting": "Texts that wait for a row.",
}


class WebMetrics:
    """What a server counts. Threads may share it."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfModels(models))
        self.requests = Counter(
            "splitbundle_http_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "splitbundle_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "splitbundle_first_token_seconds",
            "Seconds from a request to the first token of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.token_seconds = Histogram(
            "splitbundle_token_seconds",
            "Mean seconds between two tokens of an answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.cancelled = Counter(
            "splitbundle_cancelled_requests",
            "Requests whose client went away before the end.",
            ["model"],
            registry=self._registry,
        )

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text form."""
        return generate_latest(self._registry)


class _OfModels:
    """The numbers that shared pipelines count themselves."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterator[Any]:
        loaded = GaugeMetricFamily("splitbundle_model_loaded", "1 while a model is loaded.", labels=["model"])
        states = {}
        for model in self._models:
            pipeline = model.pipeline
            loaded.add_metric([model.name], float(pipeline is not None))
            if pipeline is not None:
                states[model.name] = (pipeline.state, getattr(pipeline, "stage_seconds", {}))
        yield loaded
        for name, help_text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"splitbundle_{name}", help_text, labels=["model"])
            for model_name, (state, _) in states.items():
                gauge.add_metric([model_name], state.get(name, 0))
            yield gauge
        for key, (name, help_text) in _TOTALS.items():
            total = CounterMetricFamily(f"splitbundle_{name}", help_text, labels=["model"])
            for model_name, (state, _) in states.items():
                total.add_metric([model_name], state.get(key, 0))
            yield total
        help_text = "Seconds of a stage's last call with one token a row."
        stage = GaugeMetricFamily("splitbundle_pipeline_stage_seconds", help_text, labels=["model", "stage"])
        for model_name, (_, seconds) in states.items():
            for stage_name, value in seconds.items():
                stage.add_metric([model_name, stage_name], value)
        yield stage
