"""llama.cpp, by llama-cpp-python, driven by the benchmark: weights mapped, and a cache of the weights' precision.

As its binding has it by default; or with its fused attention, and prompts as a whole.
"""

from __future__ import annotations

from typing import Any, Final

import llama_cpp

_LLAMA: Any = llama_cpp.Llama  # half of it is typed
_CACHE: Final = {"float32": 0, "bfloat16": 30}
"""ggml's numbers for these types; llama-cpp-python has no name for the second."""


class Driver:
    """A model and its one sequence."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.model: Any = _LLAMA(
            task["path"],
            n_ctx=task["capacity"],
            n_threads=task["threads"],
            n_threads_batch=task["threads"],
            type_k=_CACHE[task["dtype"]],
            type_v=_CACHE[task["dtype"]],
            n_batch=task["capacity"],
            n_ubatch=task["capacity"] if task["options"].get("whole") else 512,
            flash_attn=task["options"].get("flash", False),
            use_mmap=True,
            logits_all=False,
            verbose=False,
        )

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Computes the last position's logits of some tokens, after those before or anew."""
        (tokens,) = rows
        if anew:
            self.model.reset()
        self.model.eval(tokens)
        self.model._ctx.get_logits()  # waits for them

    def logits(self) -> list[float]:
        """Of the last token."""
        return list(self.model._ctx.get_logits()[: self.model.n_vocab()])
