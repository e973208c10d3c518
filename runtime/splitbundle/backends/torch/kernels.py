"""Multiply by mapped weights with the torch kernel that reads them fastest, without copying them.

``kernel_choice`` says which kernels there are, and chooses. ``spec/decisions/0012`` and ``0016`` have measurements.
torch's own choice is slow in two cases:

- float32: torch calls MKL. On processors other than Intel's, MKL computes one row on one thread, and is slow for more
  rows too. oneDNN, which every x86 build of torch contains, is fast there.
- One row in bfloat16: torch calls oneDNN, which first rearranges the whole weight. torch also has a kernel of its own
  that only reads the weight, and oneDNN doesn't rearrange a weight that is multiplied by a vector.
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

from splitbundle.backends.torch import kernel_choice, quantized
from splitbundle.backends.torch.kernel_choice import (
    COLUMN,
    COLUMNS,
    FEW,
    GEMV,
    INT4PACK,
    INT8PACK,
    ONEDNN,
    STEPS,
    TORCH,
    TURNED,
    Choice,
    Measured,
)
from splitbundle.format.encodings import Encoding

SMALL: Final = 2**17
"""Below this number of scalar multiplications, oneDNN's preparation (some 15 µs) takes longer than all of them."""
_FUSED: Final = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""Activations that oneDNN fuses with a linear layer, and its names for them."""


class _OneDnn:
    """oneDNN's linear layer, through the operator that torch's compiler calls."""

    def __init__(self) -> None:
        self.operator = torch.ops.mkldnn._linear_pointwise

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", how: str = ""
    ) -> Tensor:
        """Return an activation of x Wᵀ + b."""
        return self.operator.default(x, weight, bias, activation, [], how)  # type: ignore[no-any-return]

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor:
        """Return (x Wᵀ + b) · factor."""
        return self.operator.binary(x, factor, weight, bias, "mul")  # type: ignore[no-any-return]


def _onednn() -> _OneDnn | None:
    """Return oneDNN, or None if this torch lacks the operator or if its results are not the expected ones."""
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


# Each product asks all of these, so they are looked up once.
_tracks: Final = torch.is_grad_enabled
_tracing: Final = torch._C._get_tracing_state
_autocasts: Final = torch._C._is_any_autocast_enabled
_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
_function_modes: Final = torch._C._len_torch_function_stack
_transform: Final = torch._C._functorch.maybe_current_level
_PLAIN: Final = (nn.Parameter, Tensor)
_STRIDED: Final = torch.strided
_ROWS: Final = {torch.float32: "float32/1", torch.bfloat16: "bfloat16/1"}
"""A dtype -> the key of its products with one row."""

_ONEDNN: Final = _onednn()
_SWITCHES: Final = _ONEDNN is not None and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
"""Whether torch would compute one row in bfloat16 with oneDNN. If it wouldn't, the switch isn't needed."""


class _Switch:
    """Turn ``torch.backends.mkldnn.enabled`` off for calls with one row in bfloat16, and on for calls with more rows.

    The setting belongs to the process, not to a thread, and torch's own kernel takes ten times as long for many rows.
    So a call with more rows waits until the running calls with one row have ended, for a second at most. Each of those
    calls computes one token. A call with one row that starts during the wait does not change the setting.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock, self.before = threading.Lock(), True
        self.single, self.several = set[object](), set[object]()

    def allows_onednn(self) -> bool:
        """Return whether oneDNN would be on without this switch."""
        on = torch._C._get_mkldnn_enabled
        return bool(on() or (self.single and self.before) or on())  # asked twice: the last call may end in between

    def enter(self, call: object, rows: int) -> None:
        with self.lock:
            if rows > 1:
                self.several.add(call)
            elif not self.several:
                if not self.single:
                    self.before = torch._C._get_mkldnn_enabled()
                self.single.add(call)
                torch._C._set_mkldnn_enabled(False)
        # Sleep instead of waiting on a Condition, because an interrupt may break its lock. Stop after a second, because
        # this call may come from a hook inside a call with one row.
        until = time.monotonic() + 1.0
        while rows > 1 and self.single and time.monotonic() < until:
            time.sleep(0.0005)

    def leave(self, call: object) -> None:
        """End a call, even if ``enter`` did not finish. A second ``leave`` does no harm."""
        with self.lock:
            if self.single == {call}:
                torch._C._set_mkldnn_enabled(self.before)
            self.single.discard(call)
            self.several.discard(call)


_switch: Final = _Switch()


def _column(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b for one row, as W times a vector. *Shape:* (…, columns), all others 1 -> (…, rows)."""
    row = x.reshape(-1)
    out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return out.view(*x.shape[:-1], weight.shape[0])


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b as (W xᵀ)ᵀ + b. *Shape:* (…, columns) -> (…, rows)."""
    out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous()
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], weight.shape[0])


def _gemv(x: Tensor, weight: Tensor) -> Tensor:
    call = object()
    try:
        _switch.enter(call, 1)
        return functional.linear(x, weight)
    finally:
        _switch.leave(call)


def _products(kernel: str) -> kernel_choice.Product | None:
    """Return the product of a kernel, or None if it isn't here, or is what torch itself chooses."""
    if kernel == ONEDNN:
        return None if _ONEDNN is None else lambda x, weight: _ONEDNN.product(x, weight, None)
    if kernel == GEMV:
        return _gemv if _SWITCHES else None
    if kernel in (INT8PACK, COLUMNS, INT4PACK):
        return functional.linear if quantized.works(kernel) else None  # chosen by a rule, so its time doesn't count
    return {COLUMN: _column, TURNED: _turned}.get(kernel, functional.linear)


class _Current(threading.local):
    choice: Choice | None = None


_current: Final = _Current()
"""The kernels of the call that this thread computes, or None for the measured ones."""
measured: Final = Measured(_products)


def _kernel(key: str) -> str:
    choice = _current.choice
    return measured.kernel(key) if choice is None else choice[key]


def _after_fork() -> None:
    """Reset the switch in a forked child: a call that another thread of the parent was running never ends here."""
    if _switch.single:
        torch._C._set_mkldnn_enabled(_switch.before)
    _switch.reset()
    measured.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def with_kernels_for(
    x: Tensor,
    dtype: torch.dtype,
    choice: Choice | None,
    compute: Callable[..., Tensor],
    *args: object,
    codes: bool = False,
) -> Tensor:
    """Return ``compute(x, *args)``, with the kernels that suit the number of rows of x and weights of ``dtype``.

    *Shape:* of x, (batch, sequence, …).

    Args:
        x: the first argument.
        dtype: the dtype of the weights.
        choice: the kernels to use, or None for the measured ones.
        compute: computes with x and ``args``.
        codes: whether weights are quantized. Products with them need oneDNN, which "gemv" would switch off.
    """
    if torch.compiler.is_compiling() or not x.is_cpu:
        return compute(x, *args)
    before, rows = _current.choice, x.shape[0] * x.shape[1]
    call = None
    try:
        try:
            _current.choice = choice
            if (
                _SWITCHES
                and dtype == torch.bfloat16
                and (rows > 1 or (not codes and is_plain_call(x) and _kernel("bfloat16/1") == GEMV))
            ):
                call = object()
                _switch.enter(call, rows)
            return compute(x, *args)
        finally:
            _current.choice = before
            if call is not None:
                _switch.leave(call)
    finally:
        _current.choice = before
        if call is not None:
            _switch.leave(call)  # an interrupt may have stopped the first one


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b. *Shape:* (…, columns), (rows, columns), (rows) -> (…, rows)."""
    return product(_kernel_for(x, weight, bias), x, weight, bias)


def product(kernel: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, computed by a kernel. *Shape:* as for ``linear``."""
    if kernel == ONEDNN and _ONEDNN is not None:
        return _ONEDNN.product(x, weight, bias)
    if kernel == TURNED:
        return _turned(x, weight, bias)
    return _column(x, weight, bias) if kernel == COLUMN else functional.linear(x, weight, bias)


def quantized_kernel(x: Tensor, outputs: int, encoding: Encoding) -> str:
    """Return the kernel that should multiply by a quantized weight with so many rows. *Shape:* x (…, columns)."""
    if torch.compiler.is_compiling() or not _is_plain_input(x):
        return TORCH
    key = quantized.key(x, outputs, encoding)
    kernel = TORCH if key is None else _kernel(key)
    if kernel == COLUMNS and not torch._C._get_mkldnn_enabled():
        # Without oneDNN, torch multiplies integers in a plain loop. The switch for "gemv" turns it off, too.
        return INT8PACK if quantized.works(INT8PACK) else TORCH
    return kernel


def takes_few_steps() -> bool:
    """Return whether layers that multiply the same input are one product."""
    return _kernel(STEPS) == FEW


def joint_kernel(x: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> str | None:
    """Return the kernel for one product with several layers' weights, or None if each layer must compute its own.

    *Shape:* x (…, inputs). The weights have ``outputs`` rows together.
    """
    if torch.compiler.is_compiling() or x.dtype != dtype or _kernel(STEPS) != FEW or not _is_plain_input(x):
        return None
    key = _key(x, outputs, inputs, dtype)
    return TORCH if key is None or not _switch.allows_onednn() else _kernel(key)


def kernel_of_one_row(x: Tensor) -> str | None:
    """Return the kernel that multiplies this row by large weights of its dtype, or None if modules must compute.

    None says that something must see each operator, as in ``linear``, or that the choice of kernels has more steps.

    *Shape:* x (…, inputs), all others 1.
    """
    if torch.compiler.is_compiling() or _tracks() or x.dtype not in _ROWS or not _is_plain_input(x):
        return None
    if _kernel(STEPS) != FEW:
        return None
    return _kernel(_ROWS[x.dtype]) if _switch.allows_onednn() else TORCH


def is_short(weight: Tensor) -> bool:
    """Return whether one row's product with this weight is left to torch's usual kernel. *Shape:* (rows, columns)."""
    return weight.shape[0] * weight.shape[1] < SMALL


def can_fuse(x: Tensor) -> bool:
    """Return whether it is worth calling ``linear_activation`` and ``linear_times``."""
    return _ONEDNN is not None and x.dtype == torch.float32


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor | None:
    """Return an activation of x Wᵀ + b if one kernel computes both, else None. *Shape:* as for ``linear``."""
    if activation not in _FUSED or _ONEDNN is None or _kernel_for(x, weight, bias) != ONEDNN:
        return None
    return _ONEDNN.product(x, weight, bias, *_FUSED[activation])


def linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor) -> Tensor | None:
    """Return (x Wᵀ + b) · factor if one kernel computes both, else None.

    *Shape:* as for ``linear``; factor (…, rows).
    """
    if _ONEDNN is None or _kernel_for(x, weight, bias, factor) != ONEDNN:
        return None
    return _ONEDNN.times(x, weight, bias, factor)


def _kernel_for(x: Tensor, weight: Tensor, *others: Tensor | None) -> str:
    """Return the kernel that should compute this product."""
    # Check for a compiler before anything else: it traces this function, and the checks below would stop the trace.
    if torch.compiler.is_compiling():
        return TORCH
    key = _key(x, weight.shape[0], weight.shape[1], weight.dtype)
    if key is None or not _switch.allows_onednn() or not is_plain_call(x, weight, *others):
        return TORCH
    return _kernel(key)


def _key(x: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> str | None:
    """Return the key of a product in ``KERNELS``, or None if torch's usual kernel should compute it."""
    scalars = x.numel()
    if scalars * outputs < SMALL:
        return None
    if dtype == torch.float32:
        return "float32/1" if scalars == inputs else "float32/2-3" if scalars < 4 * inputs else "float32/4-"
    if dtype != torch.bfloat16 or scalars > 16 * inputs:
        return None
    return "bfloat16/1" if scalars == inputs else "bfloat16/2-16"


def is_plain_call(x: Tensor, *others: Tensor | None) -> bool:
    """Return whether this is a plain product on the CPU.

    Gradients, transforms, compilers, modes and other tensor classes must see an operator that they know.
    """
    if not _is_plain_input(x):
        return False
    dtype, tracked = x.dtype, _tracks()
    for tensor in others:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype != dtype or not tensor.is_cpu or tensor.layout is not _STRIDED:
            return False
        # oneDNN reads a bias as if it were contiguous.
        if (tracked and tensor.requires_grad) or (tensor.ndim == 1 and not tensor.is_contiguous()):
            return False
    return True


def _is_plain_input(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.is_cpu
        and _tracing() is None
        and not (_autocasts() or _dispatch_modes() or _function_modes())
        and forward_ad._current_level < 0
        and _transform() is None
        and not (x.requires_grad and _tracks())
    )
