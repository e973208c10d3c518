"""onnxruntime-genai, on what its own builder made or on our bundle, driven by the benchmark."""

from __future__ import annotations

import json
from typing import Any

import numpy
import onnxruntime_genai


class Driver:
    """A model and the generator that holds its cache."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.capacity = task["capacity"]
        config = onnxruntime_genai.Config(task["path"])
        # By default it takes half of the processors.
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": task["threads"]}}}}
        config.overlay(json.dumps(options))
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None
        self.last: Any = None

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Computes the last position's logits of some tokens, after those before or anew."""
        if anew:
            parameters = onnxruntime_genai.GeneratorParams(self.model)
            # All of max_length is attended to where the bundle's graphs run: no more than is needed.
            parameters.set_search_options(max_length=self.capacity, do_sample=False, batch_size=len(rows))
            self.generator = onnxruntime_genai.Generator(self.model, parameters)
        self.generator.append_tokens(numpy.array(rows, dtype=numpy.int32))
        self.last = self.generator.get_logits()

    def logits(self) -> list[float]:
        """Of the first row."""
        found: list[float] = numpy.asarray(self.last)[0, -1].tolist()
        return found
