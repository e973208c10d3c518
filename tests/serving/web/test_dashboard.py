"""The dashboard of ``monitoring``: each metric that it draws is one that a server has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import splitbundle
from splitbundle import SharedPipeline
from splitbundle.serving.metrics import render
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.web_metrics import WebMetrics
from tests.serving.test_torch_service import service
from tests.support.paths import ROOT

DASHBOARD = json.loads((ROOT / "monitoring" / "grafana-dashboard.json").read_text("utf-8"))
FUNCTIONS = {"histogram_quantile", "sum", "rate", "by", "le", "label_values"}
pytestmark = pytest.mark.usefixtures("one_thread")


def names(text: str) -> set[str]:
    """Return the names of samples in Prometheus' text form."""
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}


def test_every_metric_exists(chat_bundle: splitbundle.Bundle, pipeline: Any, tmp_path: Path) -> None:
    model = Model("m", chat_bundle, lambda: SharedPipeline(pipeline, rows=1))
    models = Models({"m": model})
    metrics = WebMetrics(models)
    metrics.requests.labels("/", "200").inc()
    metrics.cancelled.labels("m").inc()
    for histogram in (metrics.seconds, metrics.first_token, metrics.token_seconds):
        histogram.labels("m").observe(1.0)
    with models.using("m") as (_, shared):
        shared.complete_text("You may", max_new_tokens=2)
        known = names(metrics.render().decode())
    stage = service(tmp_path / "checkpoints")
    known |= names(render(stage)) | {"splitbundle_stage_requests_total"}  # no request has come yet
    stage.stop()
    models.close()
    asked = set()
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            asked |= set(re.findall(r"splitbundle_[a-z_]+", target["expr"]))
    for variable in DASHBOARD["templating"]["list"][1:]:
        asked |= set(re.findall(r"splitbundle_[a-z_]+", variable["definition"]))
    assert asked - known == set()
    assert len(asked) > 25


def test_the_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
