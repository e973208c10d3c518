"""Drive splitbundle with onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy

import splitbundle
from splitbundle.backends.onnxruntime import pipeline as _loaded_with_the_import  # noqa: F401  (early, as for the peers' classes)


class Driver:
    """A pipeline and its session."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.capacity = task["capacity"]
        bundle = splitbundle.open(task["path"])
        self.pipeline = bundle.pipeline(backend="onnxruntime", threads=task["threads"], **task["options"])
        self.session: Any = None
        self.last: Any = None

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Compute the logits of the last position. The tokens follow the earlier ones, or start ``anew``."""
        if anew:
            self.session = self.pipeline.session(len(rows), self.capacity)
        self.last = self.pipeline(numpy.array(rows), session=self.session, logits="last")

    def logits(self) -> list[float]:
        """Return the logits of the first row. *Length:* vocabulary."""
        found: list[float] = self.last[0, -1].tolist()
        return found
