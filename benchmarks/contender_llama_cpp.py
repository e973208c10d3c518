"""Drive llama.cpp with llama-cpp-python: the weights are mapped, and the cache has the dtype of the weights.

It runs with the defaults of the binding, or with fused attention and whole prompts.
"""

from __future__ import annotations

from typing import Any, Final

import llama_cpp

_LLAMA: Any = llama_cpp.Llama  # it is only partly typed
_CACHE: Final = {"float32": 0, "bfloat16": 30}
"""The numbers of these dtypes in ggml. llama-cpp-python has no name for the second."""


class Driver:
    """A model and its single sequence."""

    def __init__(self, task: dict[str, Any]) -> None:
        cache = task["options"].get("cache", _CACHE[task["dtype"]])
        self.model: Any = _LLAMA(
            task["path"],
            n_ctx=task["capacity"],
            n_threads=task["threads"],
            n_threads_batch=task["threads"],
            type_k=cache,
            type_v=cache,
            n_batch=task["capacity"],
            n_ubatch=task["capacity"] if task["options"].get("whole") else 512,
            flash_attn=task["options"].get("flash", False),
            use_mmap=True,
            logits_all=False,
            verbose=False,
        )

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Compute the logits of the last position. The tokens follow the earlier ones, or start ``anew``."""
        (tokens,) = rows
        if anew:
            self.model.reset()
        self.model.eval(tokens)
        self.model._ctx.get_logits()  # waits until the logits are computed

    def logits(self) -> list[float]:
        """Return the logits of the last token. *Length:* vocabulary."""
        return list(self.model._ctx.get_logits()[: self.model.n_vocab()])
