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
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

SMALL: Final = 2**17
"""Products of two numbers below which oneDNN's preparations (some 15 µs) take longer than all of them."""
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
    one, row = (torch.ones(shape, dtype=torch.float32, device="cpu") for shape in ((1,), (1, 2)))
    try:
        found = _OneDnn()
        tried = [found.product(row, row, one), found.product(row, -row, one, *_FUSED["relu"])]
        tried += [found.product(row, 1000 * row, one, *_FUSED[name]) for name in ("silu", "gelu", "gelu_tanh")]
        tried += [found.times(row, row, one, 2 * one[None])]
        right = torch.cat(tried).flatten().tolist() == [3, 0, 2001, 2001, 2001, 6]
    except (AttributeError, RuntimeError, TypeError):
        return None
    return found if right else None


_ONEDNN: Final = _onednn()
_SWITCHES: Final = _ONEDNN is not None and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
"""Whether torch would give one row of bfloat16 to oneDNN: where it wouldn't, there is nothing to switch."""


class _Switch:
    """``torch.backends.mkldnn.enabled``, off while one row is computed in bfloat16, and on for whoever has more rows.

    It is the process's, not a thread's, and torch's own kernel takes ten times as long for many rows. So a call with
    more rows waits until the calls with one row have ended, each a token of some thread, or for a second; what has one
    row and comes meanwhile leaves the switch alone.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock, self.before = threading.Lock(), True
        self.single, self.several = set[object](), set[object]()

    def allows_onednn(self) -> bool:
        """Whether oneDNN is on, but for this switch."""
        on = torch._C._get_mkldnn_enabled
        return bool(on() or (self.single and self.before) or on())  # the last call may end between two of these

    def enter(self, call: object, rows: int) -> None:
        with self.lock:
            if rows > 1:
                self.several.add(call)
            elif not self.several:
                if not self.single:
                    self.before = torch._C._get_mkldnn_enabled()
                self.single.add(call)
                torch._C._set_mkldnn_enabled(False)
        # Asleep, as an interrupt may break a Condition's lock; and no longer than a second, as a hook of a call with
        # one row may be what makes this one.
        until = time.monotonic() + 1.0
        while rows > 1 and self.single and time.monotonic() < until:
            time.sleep(0.0005)

    def leave(self, call: object) -> None:
        """Ends a call, as far as it had begun; once more does no harm."""
        with self.lock:
            if self.single == {call}:
                torch._C._set_mkldnn_enabled(self.before)
            self.single.discard(call)
            self.several.discard(call)


_switch: Final = _Switch()


def _after_fork() -> None:
    """A thread of the parent may have been computing: here it never ends."""
    if _switch.single:
        torch._C._set_mkldnn_enabled(_switch.before)
    _switch.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def with_kernels_for(x: Tensor, dtype: torch.dtype, compute: Callable[..., Tensor], *args: object) -> Tensor:
    """``compute(x, *args)``, where products with weights of a dtype are computed by the kernels that suit x's rows.

    *Shape:* of x, (batch, sequence, …).
    """
    if not _SWITCHES or torch.compiler.is_compiling() or dtype != torch.bfloat16 or not x.is_cpu:
        return compute(x, *args)
    call = object()
    try:
        try:
            _switch.enter(call, x.shape[0] * x.shape[1])
            return compute(x, *args)
        finally:
            _switch.leave(call)
    finally:
        _switch.leave(call)  # an interrupt may have come into the first one


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b. *Shape:* (…, columns), (rows, columns), (rows) -> (…, rows)."""
    onednn = _onednn_for(x, weight, bias)
    return functional.linear(x, weight, bias) if onednn is None else onednn.product(x, weight, bias)


def can_fuse(x: Tensor) -> bool:
    """Whether it is worth calling ``linear_activation`` and ``linear_times``."""
    return _ONEDNN is not None and x.dtype == torch.float32


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """An activation of x Wᵀ + b, if one kernel does both. *Shape:* as of ``linear``."""
    onednn = _onednn_for(x, weight, bias) if activation in _FUSED else None
    return None if onednn is None else onednn.product(x, weight, bias, *_FUSED[activation])


def linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor | None:
    """(x Wᵀ + b) · factor, if one kernel does both. *Shape:* as of ``linear``, and of the factor (…, rows)."""
    onednn = _onednn_for(x, weight, bias, factor)
    return None if onednn is None else onednn.times(x, weight, bias, factor)


def _onednn_for(x: Tensor, weight: Tensor, *others: Tensor | None) -> _OneDnn | None:
    """oneDNN, where it is the one to compute this."""
    # A compiler follows all of this, and has to stop where it can't: it is asked for before anything else.
    if _ONEDNN is None or torch.compiler.is_compiling():
        return None
    if weight.dtype != torch.float32 or not _switch.allows_onednn():
        return None
    if x.numel() * weight.shape[0] < SMALL:
        return None
    return _ONEDNN if _is_plain(x, weight, *others) else None


def _is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether this is nothing but a product on the processor.

    Gradients, transforms, compilers, modes and tensors of other kinds have to see an operator that they know.
    """
    if type(x) is not Tensor or not x.is_cpu:
        return False
    if (
        torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
    ):
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    tracked = torch.is_grad_enabled()
    if tracked and x.requires_grad:
        return False
    for tensor in others:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not tensor.is_cpu:
            return False
        # oneDNN takes a bias as if its numbers were side by side.
        if tensor.dtype != x.dtype or (tensor.ndim == 1 and not tensor.is_contiguous()):
            return False
        if tracked and tensor.requires_grad:
            return False
    return True
