"""Choose the next token from logits with torch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from splitbundle.errors import BundleError
from splitbundle.stages.sampling import NOT_FINITE, Sampling


def draw(logits: Tensor, sampling: Sampling, generator: random.Random) -> Tensor:
    """Draw the next token of each row.

    Sort the tokens by falling probability, and equal ones by rising id. Keep the tokens that top_k and top_p allow.
    With u uniform in [0, 1), draw the first token whose cumulative probability exceeds u times the total that is kept.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.

    Raises:
        BundleError: ``input.value`` if a row's largest logit is NaN or infinite.
    """
    largest, likeliest = logits.max(dim=-1)
    if not bool(largest.isfinite().all()):  # the largest is NaN if any logit is; a draw would hide it
        raise BundleError(NOT_FINITE)
    if sampling.temperature == 0:
        return likeliest
    # Subtract the largest before the division. Otherwise a small temperature could make logits infinite, and their
    # differences NaN.
    probabilities = torch.softmax((logits - largest[:, None]).double() / sampling.temperature, dim=-1)
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    total = ranked.cumsum(dim=-1)
    if sampling.top_p is not None:
        # Keep the token that crosses top_p, because the tokens before it do not reach top_p.
        ranked = ranked.masked_fill(total - ranked >= sampling.top_p * total[:, -1:], 0.0)
        total = ranked.cumsum(dim=-1)
    uniform = torch.tensor([generator.random() for _ in range(len(logits))], dtype=total.dtype, device=total.device)
    rank = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)
    return ids.gather(1, rank.clamp(max=ranked.shape[1] - 1))[:, 0]
