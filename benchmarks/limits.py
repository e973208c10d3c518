"""Measure the rates of the machine in a separate process: reading memory, and multiplying matrices, with N threads.

The limit is the best of several methods, from any library. A limit that is too low would flatter all contenders.
"""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

_REPETITIONS: Final = 5
_LEAST: Final = 2**26
_MOST: Final = 2**30
"""The minimum and maximum of bytes that are read at once. Between them, it is the size of the weights, which is larger
than the processor's caches."""
_SHAPES: Final = ((256, 896, 4864), (1024, 1024, 4096), (512, 2048, 2048))
"""The number of tokens, and the columns and rows of the weight."""


def measure(task: dict[str, Any]) -> dict[str, float]:
    """Return bytes per second, and operations per second in float32 and bfloat16."""
    torch.set_num_threads(task["threads"])
    size = min(max(os.path.getsize(task["file"]), _LEAST), _MOST) // 4096 * 4096  # rows of 1,024 numbers
    numbers = torch.ones(size // 4)
    figures = {"read memory": _reading(numbers)}
    if os.path.getsize(task["file"]) >= size:
        with open(task["file"], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
            count = size // 4
            # The file is mapped like weights. The first pass maps the pages, so it is not the fastest.
            mapped = torch.frombuffer(mapping, dtype=torch.int32, count=count)
            figures["read a mapped file"] = _reading(mapped)
            del mapped
    figures["read"] = max(figures.values())
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        figures[f"multiply {name}"] = max(_multiplying(*shape, dtype) for shape in _SHAPES)
    return figures


def _reading(numbers: Tensor) -> float:
    forms: list[Callable[[], object]] = [numbers.sum, numbers.amax, numbers.view(torch.int64).amax]
    if numbers.is_floating_point():
        matrix, vector = numbers.view(-1, 1024), torch.ones(1024)
        forms += [lambda: torch.mv(matrix, vector), lambda: torch.dot(numbers, numbers)]
        forms += [partial(form, vector[None], matrix) for form in _products()]
    return numbers.nbytes / min(map(_seconds, forms))


def _multiplying(tokens: int, columns: int, rows: int, dtype: torch.dtype) -> float:
    x, weight = torch.randn(tokens, columns).to(dtype), torch.randn(rows, columns).to(dtype)
    return 2 * tokens * columns * rows / min(_seconds(partial(form, x, weight)) for form in _products())


def _products() -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Return the matrix products: MKL's, and oneDNN's if this build of torch has a separate operator for it."""
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [torch.nn.functional.linear]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        forms.append(lambda x, weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    return forms


def _seconds(form: Callable[[], object]) -> float:
    """Return the least of several times in seconds, after one run that is not timed."""
    least = math.inf
    form()
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        form()
        least = min(least, time.perf_counter() - start)
    return least
