"""Choose the kernels that multiply a few rows by weights: measured on this machine, or named by the user.

Which kernel reads a weight fastest depends on the processor (``spec/decisions/0016`` has the measurements), and no
property of the processor tells it. So a choice is measured once for each dtype and number of threads, at the first
product, in some milliseconds. A measurement that other programs disturb costs speed: every kernel computes the same
product, up to the last bits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Final

import torch

from splitbundle import logs
from splitbundle.errors import BundleError, Problem, quoted

VARIABLE: Final = "SPLITBUNDLE_KERNELS"
TORCH: Final = "torch"
ONEDNN: Final = "onednn"
GEMV: Final = "gemv"
COLUMN: Final = "column"
TURNED: Final = "turned"
FEW: Final = "few"
INT8PACK: Final = "int8pack"
COLUMNS: Final = "columns"
INT4PACK: Final = "int4pack"
STEPS: Final = "steps"
KERNELS: Final[dict[str, tuple[str, ...]]] = {
    "float32/1": (COLUMN, ONEDNN, TORCH),
    "float32/2-3": (TORCH, ONEDNN),
    "float32/4-": (ONEDNN, TORCH),
    "bfloat16/1": (COLUMN, GEMV, TORCH),
    "bfloat16/2-16": (TURNED, TORCH),
    "rows8-bfloat16/1-8": (INT8PACK, COLUMNS, TORCH),
    "rows8-bfloat16-amx/1-8": (COLUMNS, INT8PACK, TORCH),
    "rows8-float32/1-8": (COLUMNS, INT8PACK, TORCH),
    "blocks4/1-16": (INT4PACK, TORCH),
    STEPS: (FEW, TORCH),
}
"""A dtype and a number of rows -> the kernels that can compute such products.

"torch" is ``functional.linear`` as it is. "onednn" is oneDNN through the operator of torch's compiler. "gemv" is
torch's own kernel for one row, which runs where oneDNN is switched off. "column" is the weight times a vector: the same
kernel as "torch" in float32, with fewer steps around it. "turned" is the weight times the inputs as columns: oneDNN
reads a weight in bfloat16 faster if it is the left factor. The first kernel of each line is preferred. ``quantized``
explains "int8pack", "columns" and "int4pack", and for which products a processor with AMX has a key of its own.

The key "steps" says in how many steps a layer computes. With "few", linear layers that multiply the same input are one
product where their weights lie side by side, the RMSNorm of a single position takes three steps, and a single token
passes the usual layers without their modules (``one_token``). With "torch", every module computes for itself.
"""
MEASURED: Final = ("float32/1", "float32/2-3", "bfloat16/1", "bfloat16/2-16")
"""The keys whose kernel is measured. For four rows and more, oneDNN was the fastest on every processor that was tried,
or as fast, and computes activations in the same pass."""
AUTO: Final = "auto"
BUDGET: Final = 0.03
"""The seconds after which a measurement begins no more rounds."""
_SHAPE: Final = (2048, 1024)
_WEIGHTS: Final = 2
_ROUNDS: Final = 5
_PREFERRED: Final = 0.9
"""Another kernel than the first must take less than this share of its time. So noise seldom changes the choice."""

Choice = Mapping[str, str]
"""A kernel for each key of ``KERNELS``."""
Product = Callable[[torch.Tensor, torch.Tensor], object]

PINNED: Final[Choice] = dict.fromkeys(KERNELS, TORCH)
"""torch's usual kernels. They don't depend on a measurement, so results are equal in every process of a machine."""


def parse(text: str, where: str = "kernels") -> Choice | None:
    """Return the choice that a text names, or None for ``"auto"``.

    Args:
        text: ``"auto"``; ``"torch"``, for torch's usual kernels; or ``KEY=KERNEL`` with commas between, where a key
            that is left out means "torch". ``as_text`` writes this form.
        where: the name of the argument, for errors.

    Raises:
        BundleError: ``input.value``.
    """
    if text == AUTO:
        return None
    if text == TORCH:
        return PINNED
    found = dict(PINNED)
    for part in text.split(",") if isinstance(text, str) else [None]:
        key, _, kernel = (part or "").strip().partition("=")
        if kernel not in KERNELS.get(key, ()):
            known = "; ".join(f"{name}={' or '.join(kernels)}" for name, kernels in KERNELS.items())
            raise BundleError(
                Problem(
                    code="input.value",
                    argument=where,
                    expected=f"auto, torch, or some of {known}",
                    got=quoted(text),
                    hint="splitbundle kernels prints the choice for this machine",
                )
            )
        found[key] = kernel
    return found


def as_text(choice: Choice) -> str:
    """Return a choice as text, in the form that ``parse`` takes."""
    return ",".join(f"{key}={choice[key]}" for key in KERNELS)


def from_environment() -> Choice | None:
    """Return the choice that ``SPLITBUNDLE_KERNELS`` names, or None if it isn't set, or is ``auto``.

    Raises:
        BundleError: ``input.value``.
    """
    return parse(os.environ.get(VARIABLE, "").strip() or AUTO, VARIABLE)


class Measured:
    """The kernels that were fastest on this machine, for each dtype and number of threads."""

    def __init__(self, products: Callable[[str], Product | None]) -> None:
        """Take a function that returns the product of a kernel by name, or None if this torch lacks it."""
        self._products = products
        self._lock = threading.Lock()
        self._found: dict[tuple[str, int], str] = {}
        self.rates: dict[tuple[str, int], dict[str, float]] = {}
        """The bytes of weight a second, by key and number of threads, and then by kernel."""

    def reset(self) -> None:
        """Make the lock anew in a forked child, where a thread of the parent may hold it forever."""
        self._lock = threading.Lock()

    def kernel(self, key: str) -> str:
        """Return the fastest kernel for a key of ``KERNELS``, with the present number of threads."""
        place = key, torch.get_num_threads()
        found = self._found.get(place)
        if found is None:
            with self._lock:
                found = self._found.get(place) or self._measure(place)
        return found

    def _measure(self, place: tuple[str, int]) -> str:
        """Measure the kernels in turn, and keep the fastest. The shortest of some times is the least disturbed one."""
        dtype, _, rows = place[0].partition("/")
        kernels = {name: product for name in KERNELS[place[0]] if (product := self._products(name)) is not None}
        times = dict.fromkeys(kernels, float("inf"))
        if len(kernels) > 1 and place[0] in MEASURED:
            own, count = getattr(torch, dtype), {"1": 1, "2-3": 2, "2-16": 8}[rows]
            with torch.inference_mode(False), torch.no_grad():
                weights = [torch.ones(_SHAPE, dtype=own) for _ in range(_WEIGHTS)]
                x = torch.ones((count, _SHAPE[1]), dtype=own)
                until = time.perf_counter() + BUDGET
                for number in range(_ROUNDS):
                    for name, product in kernels.items():
                        start = time.perf_counter()
                        for weight in weights:
                            product(x, weight)
                        if number:  # the first round only prepares
                            times[name] = min(times[name], time.perf_counter() - start)
                    if number and time.perf_counter() > until:
                        break
            size = _WEIGHTS * weights[0].numel() * weights[0].element_size()
            self.rates[place] = {name: size / seconds for name, seconds in times.items()}
        first = next(iter(kernels))
        best = min(times, key=times.__getitem__)
        chosen = self._found[place] = best if times[best] < _PREFERRED * times[first] else first
        logs.debug("chose the kernel %s for %s rows with %d threads", chosen, *place)
        return chosen
