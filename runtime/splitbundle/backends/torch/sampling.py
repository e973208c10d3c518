"""From logits to the next token with torch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from splitbundle.errors import BundleError
from splitbundle.stages.sampling import NOT_FINITE, Sampling


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
        raise BundleError(NOT_FINITE)
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
