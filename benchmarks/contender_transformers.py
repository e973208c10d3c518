"""Drive transformers, eager or compiled, with a cache. It computes only the logits of the last position."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache


class Driver:
    """A model and its cache. The cache grows, or is static for a compiled model, as transformers' authors advise."""

    @staticmethod
    def imports(task: dict[str, Any]) -> None:
        """Import the class of the checkpoint. Otherwise loading the model would import it."""
        family = AutoConfig.from_pretrained(task["path"]).model_type
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    def __init__(self, task: dict[str, Any]) -> None:
        torch.set_num_threads(task["threads"])
        self.capacity = task["capacity"]
        dtype = getattr(torch, task["dtype"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(task["path"], dtype=dtype)
        self.static = task["options"].get("compile", False)
        # Each shape is compiled separately, because a graph for all lengths is slower.
        self.forward = torch.compile(self.model.forward, dynamic=False) if self.static else self.model.forward
        self.caches: dict[int, Any] = {}
        self.past: Any = None
        self.last: Any = None

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Compute the logits of the last position. The tokens follow the earlier ones, or start ``anew``."""
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
        """Return the logits of the first row. *Length:* vocabulary."""
        found: list[float] = self.last[0, -1].float().tolist()
        return found
