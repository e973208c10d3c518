"""Drive onnxruntime-genai, with the files of its own builder or with our bundle."""

from __future__ import annotations

import json
from typing import Any

import numpy
import onnxruntime_genai


class Driver:
    """A model, and the generator that has its cache."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.capacity = task["capacity"]
        config = onnxruntime_genai.Config(task["path"])
        # By default it uses half of the processors.
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": task["threads"]}}}}
        config.overlay(json.dumps(options))
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None
        self.last: Any = None

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Compute the logits of the last position. The tokens follow the earlier ones, or start ``anew``."""
        if anew:
            parameters = onnxruntime_genai.GeneratorParams(self.model)
            # With the bundle's graphs, attention covers all of max_length, so it is no longer than necessary.
            parameters.set_search_options(max_length=self.capacity, do_sample=False, batch_size=len(rows))
            self.generator = onnxruntime_genai.Generator(self.model, parameters)
        self.generator.append_tokens(numpy.array(rows, dtype=numpy.int32))
        self.last = self.generator.get_logits()

    def logits(self) -> list[float]:
        """Return the logits of the first row. *Length:* vocabulary."""
        found: list[float] = numpy.asarray(self.last)[0, -1].tolist()
        return found
