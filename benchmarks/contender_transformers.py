"""transformers, eager or compiled, driven by the benchmark: with a cache, and the last position's logits alone."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache


class Driver:
    """A model and its cache: the one that grows, or a static one where it is compiled, as its authors advise."""

    @staticmethod
    def imports(task: dict[str, Any]) -> None:
        """The class of the checkpoint, which would otherwise be imported while it is loaded."""
        family = AutoConfig.from_pretrained(task["path"]).model_type
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    def __init__(self, task: dict[str, Any]) -> None:
        torch.set_num_threads(task["threads"])
        self.capacity = task["capacity"]
        dtype = getattr(torch, task["dtype"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(task["path"], dtype=dtype)
        self.static = task["options"].get("compile", False)
        # Every shape is compiled for itself: a graph for any length is slower.
        self.forward = torch.compile(self.model.forward, dynamic=False) if self.static else self.model.forward
        self.caches: dict[int, Any] = {}
        self.past: Any = None
        self.last: Any = None

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Computes the last position's logits of some tokens, after those before or anew."""
        if anew:
            self.past = self._static(len(rows)) if self.static else None
        with torch.no_grad():
            out = self.forward(torch.tensor(rows), past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.last = out.past_key_values, out.logits

    def _static(self, batch: int) -> Any:
        cache = self.caches.get(batch)
        if cache is None:
            cache = self.caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.capacity)
        else:
            cache.reset()
        return cache

    def logits(self) -> list[float]:
        """Of the first row."""
        found: list[float] = self.last[0, -1].float().tolist()
        return found
