"""From logits to the next token, the same in every backend: one uniform a row, and the inverse of the distribution."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from splitbundle.errors import BundleError, Problem, quoted


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
        for name, good, expected in (
            ("temperature", self.temperature >= 0, "a number from 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a number from 1, or None"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "a number above 0, up to 1, or None"),
        ):
            if not good:
                got = quoted(getattr(self, name))
                raise BundleError(Problem(code="input.value", argument=name, expected=expected, got=got))


def draw(logits: Tensor, sampling: Sampling, generator: random.Random) -> Tensor:
    """The next token of each row.

    Tokens stand in falling order of probability, equal ones in rising order of id; with u uniform in [0, 1), the one
    drawn is the first whose cumulated probability exceeds u of what top_k and top_p leave.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
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
