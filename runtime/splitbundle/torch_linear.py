"""Products with weights that stay where they lie, by whichever of torch's kernels reads them fastest.

``spec/decisions/0012`` has the measurements. torch sends float32 to MKL, which computes one row on one thread and the
other sizes slowly too where the processor isn't Intel's, though oneDNN, which every x86 build of torch has, does both
well; and it sends one row in bfloat16 to oneDNN, which rearranges the whole weight first, though torch has a kernel of
its own that just reads it.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

SMALL: Final = 2**17
"""Elements of a weight below which oneDNN's preparations (some 15 µs) take longer than the product."""


def _onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """oneDNN's product as torch's compiler calls it; None where this torch hasn't got it as it is known here."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):
        return None

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operator(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]

    try:
        tried = product(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))
    except (RuntimeError, TypeError):
        return None
    return product if tried.tolist() == [[3.0]] else None


_product: Final = _onednn()


class _OwnKernels:
    """While entered, torch uses its own kernels and not oneDNN's.

    The switch is the process's, not a thread's: the first thread that enters turns it, the last one that leaves turns
    it back, and what others compute meanwhile stays right.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch.backends.mkldnn.enabled  # type: ignore[assignment]
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self.inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.mkldnn.enabled = self.before  # type: ignore[assignment]


_own_kernels: Final = _OwnKernels()


def _after_fork() -> None:
    """A thread of the parent may have been inside: here it never leaves."""
    if _own_kernels.inside:
        torch.backends.mkldnn.enabled = _own_kernels.before  # type: ignore[assignment]
    _own_kernels.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. *Shape:* (…, columns), (rows, columns), (rows) -> (…, rows)."""
    if _product is None or not _plain(x, weight):
        return functional.linear(x, weight, bias)
    if weight.dtype == torch.float32:
        if weight.numel() < SMALL or not torch.backends.mkldnn.enabled:
            return functional.linear(x, weight, bias)
        return _product(x, weight, bias)
    if weight.dtype == torch.bfloat16 and x.numel() == weight.shape[1]:  # one row
        with _own_kernels:
            return functional.linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def joined(x: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
    """Weights that multiply one input, as one, where they lie one after another in a storage; None where they don't.

    *Shape:* of the weights, (rows, columns) each with rows of its own -> (rows of all, columns).
    """
    first = weights[0]
    place, storage = first.data_ptr(), first.untyped_storage()._cdata
    for weight in weights:
        if (
            weight.data_ptr() != place
            or weight.untyped_storage()._cdata != storage
            or weight.dtype != first.dtype
            or weight.shape[1] != first.shape[1]
            or not weight.is_contiguous()
            or not _plain(x, weight)
        ):
            return None
        place += weight.nbytes
    return first.detach().as_strided((sum(len(weight) for weight in weights), first.shape[1]), (first.shape[1], 1))


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is nothing but a product on the processor.

    Gradients, transforms, compilers and tensors of other kinds have to see an operator that they know.
    """
    return (
        x.is_cpu
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_cpu
        and x.dtype == weight.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
        and not torch.compiler.is_compiling()
    )
