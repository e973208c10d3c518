"""From logits to the next token, the same in every backend: one uniform a row, and the inverse of the distribution."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from splitbundle.errors import BundleError, Problem, quoted

_NOT_FINITE = "The weights aren't all numbers, or the dtype is too narrow for this model: try another"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest, the lowest id among equals."""

    temperature: float = 0.0
    top_k: int | None = None
    """Only the k likeliest."""
    top_p: float | None = None
    """Only the likeliest that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    seed: int | None = None

    def __post_init__(self) -> None:
        def is_number(value: object) -> bool:
            return type(value) in (int, float)

        for name, good, expected in (
            ("temperature", is_number(self.temperature) and 0 <= self.temperature < float("inf"), "a number from 0"),
            ("top_k", self.top_k is None or (type(self.top_k) is int and self.top_k >= 1), "a number from 1, or None"),
            (
                "top_p",
                self.top_p is None or (is_number(self.top_p) and 0 < self.top_p <= 1),
                "a number above 0, up to 1, or None",
            ),
            ("seed", self.seed is None or type(self.seed) is int, "a number, or None"),
        ):
            if not good:
                got = quoted(getattr(self, name))
                raise BundleError(Problem(code="input.value", argument=name, expected=expected, got=got))


def draw(logits: Tensor, sampling: Sampling, generator: random.Random) -> Tensor:
    """The next token of each row.

    Tokens stand in falling order of probability, equal ones in rising order of id; with u uniform in [0, 1), the one
    drawn is the first whose cumulated probability exceeds u of what top_k and top_p leave.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.

    Raises:
        BundleError: ``input.value`` for logits that aren't numbers.
    """
    largest, likeliest = logits.max(dim=-1)
    if not bool(largest.isfinite().all()):  # the largest is NaN where any is: a draw would hide it
        raise BundleError(
            Problem(code="input.value", argument="logits", expected="numbers", got="NaN or infinity", hint=_NOT_FINITE)
        )
    if sampling.temperature == 0:
        return likeliest
    # Less the largest before the division: a small temperature would make infinities of both, and NaN of the rest.
    probabilities = torch.softmax((logits - largest[:, None]).double() / sampling.temperature, dim=-1)
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    total = ranked.cumsum(dim=-1)
    if sampling.top_p is not None:
        # The token that crosses top_p is still in: what came before it hadn't reached it.
        ranked = ranked.masked_fill(total - ranked >= sampling.top_p * total[:, -1:], 0.0)
        total = ranked.cumsum(dim=-1)
    uniform = torch.tensor([generator.random() for _ in range(len(logits))], dtype=total.dtype, device=total.device)
    rank = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)
    return ids.gather(1, rank.clamp(max=ranked.shape[1] - 1))[:, 0]
