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
from collections.abc import Sequence
from types import TracebackType
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

SMALL: Final = 2**17
"""Products of two numbers below which oneDNN's preparations (some 15 µs) take longer than all of them."""
FEW: Final = 16
"""Tokens up to which it pays to multiply with several weights at once: with more, each product is long by itself."""
_FUSED: Final = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""Activations that oneDNN applies while it has the product at hand, as it calls them."""


class _OneDnn:
    """oneDNN's product as torch's compiler calls it."""

    def __init__(self) -> None:
        self.operator = torch.ops.mkldnn._linear_pointwise

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", how: str = ""
    ) -> Tensor:
        """An activation of x Wᵀ + b."""
        return self.operator.default(x, weight, bias, activation, [], how)  # type: ignore[no-any-return]

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
        """(x Wᵀ + b) · factor."""
        return self.operator.binary(x, factor, weight, bias, "mul")  # type: ignore[no-any-return]


def _onednn() -> _OneDnn | None:
    """None where this torch hasn't got it as it is known here."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    one, row = torch.ones(1), torch.ones(1, 2)
    try:
        found = _OneDnn()
        tried = [found.product(row, row, one), found.product(row, -row, one, *_FUSED["relu"])]
        tried += [found.product(row, 1000 * row, one, *_FUSED[name]) for name in ("silu", "gelu", "gelu_tanh")]
        tried += [found.times(row, row, one, 2 * torch.ones(1, 1))]
    except (AttributeError, RuntimeError, TypeError):
        return None
    return found if torch.cat(tried).flatten().tolist() == [3, 0, 2001, 2001, 2001, 6] else None


_ONEDNN: Final = _onednn()


class _OwnKernels:
    """While entered, torch uses its own kernels and not oneDNN's: ``torch.backends.mkldnn.enabled`` is off.

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
                self.before = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self.inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch._C._set_mkldnn_enabled(self.before)


_own_kernels: Final = _OwnKernels()


def _after_fork() -> None:
    """A thread of the parent may have been inside: here it never leaves."""
    if _own_kernels.inside:
        torch._C._set_mkldnn_enabled(_own_kernels.before)
    _own_kernels.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. *Shape:* (…, columns), (rows, columns), (rows) -> (…, rows)."""
    onednn = _for(x, weight)
    if onednn is not None:
        return onednn.product(x, weight, bias)
    if weight.dtype == torch.bfloat16 and x.numel() == weight.shape[1] and _ONEDNN is not None and _plain(x, weight):
        with _own_kernels:  # one row
            return functional.linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """An activation of x Wᵀ + b, if one kernel does both. *Shape:* as of ``linear``."""
    onednn = _for(x, weight) if activation in _FUSED else None
    return None if onednn is None else onednn.product(x, weight, bias, *_FUSED[activation])


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor | None:
    """(x Wᵀ + b) · factor, if one kernel does both. *Shape:* as of ``linear``, and of the factor (…, rows)."""
    onednn = _for(x, weight)
    return onednn.times(x, weight, bias, factor) if onednn is not None and _plain(x, factor) else None


def _for(x: Tensor, weight: Tensor) -> _OneDnn | None:
    """oneDNN, where it is the one to compute this."""
    if _ONEDNN is None or weight.dtype != torch.float32 or not torch._C._get_mkldnn_enabled():
        return None
    if x.numel() * weight.shape[0] < SMALL:
        return None
    return _ONEDNN if _plain(x, weight) else None


def joined(x: Tensor, weights: Sequence[Tensor]) -> Tensor | None:
    """Weights that multiply one input, as one, where they lie one after another in a storage and tokens are few.

    *Shape:* of the weights, (rows, columns) each with rows of its own -> (rows of all, columns).
    """
    first = weights[0]
    if x.numel() > FEW * x.shape[-1]:
        return None
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
