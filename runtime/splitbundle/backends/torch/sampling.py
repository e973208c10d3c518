"""Choose the next token from logits with torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from splitbundle.errors import BundleError
from splitbundle.stages.sampling import NOT_FINITE, Generator, History, Sampling

_ROWS: Final = 32
"""The number of positions whose logits are in double precision at once."""


def draw(logits: Tensor, sampling: Sampling, generator: Generator, history: History | None = None) -> Tensor:
    """Draw the next token of each row.

    Sort the tokens by falling probability, and equal ones by rising id. Keep the tokens that top_k, top_p, min_p and
    typical_p allow. With u uniform in [0, 1), draw the first token whose cumulative probability exceeds u times the
    total that is kept.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.

    Raises:
        BundleError: ``input.value`` if a row's largest logit is NaN or infinite.
    """
    logits = adjusted(logits, sampling, history)
    largest, likeliest = logits.max(dim=-1)
    if not all(map(math.isfinite, largest.tolist())):  # the largest is NaN if any logit is; a draw would hide it
        raise BundleError(NOT_FINITE)
    if sampling.temperature == 0:
        return likeliest
    ids, ranked = _kept(logits, largest, sampling)
    total = ranked.cumsum(dim=-1)
    uniform = torch.tensor([generator.random() for _ in range(len(logits))], dtype=total.dtype, device=total.device)
    rank = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)
    return ids.gather(1, rank.clamp(max=ranked.shape[1] - 1))[:, 0]


def probabilities(logits: Tensor, sampling: Sampling, history: History | None = None) -> Tensor:
    """Return the probability with which each token is drawn.

    *Shape:* (batch, vocab) -> (batch, vocab), float64. A token that can't be drawn has 0.
    """
    logits = adjusted(logits, sampling, history)
    largest, likeliest = logits.max(dim=-1)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(likeliest, logits.shape[-1]).double()
    ids, ranked = _kept(logits, largest, sampling)
    ranked = ranked / ranked.sum(dim=-1, keepdim=True)
    return torch.zeros(logits.shape, dtype=ranked.dtype, device=logits.device).scatter(
        1, ids[:, : ranked.shape[1]], ranked
    )


def adjusted(logits: Tensor, sampling: Sampling, history: History | None) -> Tensor:
    """Return logits after the bias and the penalties. *Shape:* (batch, vocab) -> (batch, vocab)."""
    if not sampling.adjusts:
        return logits
    made = logits.float().clone()

    def at(ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(ids), dtype=torch.int64, device=made.device)

    if sampling.logit_bias:
        bias = torch.tensor(list(sampling.logit_bias.values()), dtype=made.dtype, device=made.device)
        made[:, at(list(sampling.logit_bias))] += bias
    if history is None:
        return made
    for row in range(len(made)):
        if sampling.repetition_penalty not in (None, 1):
            places = at(sorted(history.seen[row]))
            old = made[row, places]
            made[row, places] = torch.where(
                old < 0, old * sampling.repetition_penalty, old / sampling.repetition_penalty
            )
        if history.new[row]:
            places = at(list(history.new[row]))
            counts = torch.tensor(list(history.new[row].values()), dtype=made.dtype, device=made.device)
            made[row, places] -= counts * (sampling.frequency_penalty or 0) + (sampling.presence_penalty or 0)
    return made


def _kept(logits: Tensor, largest: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the ids by falling probability, and the probabilities, not normalized; 0 for those that are left out.

    *Shape:* (batch, vocab), (batch) -> (batch, vocab) and (batch, kept), float64.
    """
    # Subtract the largest before the division. Otherwise a small temperature could make logits infinite, and their
    # differences NaN.
    all_of_them = torch.softmax((logits - largest[:, None]).double() / sampling.temperature, dim=-1)
    ranked, ids = all_of_them.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    if sampling.top_p is not None:
        total = ranked.cumsum(dim=-1)
        # Keep the token that crosses top_p, because the tokens before it do not reach top_p.
        ranked = ranked.masked_fill(total - ranked >= sampling.top_p * total[:, -1:], 0.0)
    if sampling.min_p:
        ranked = ranked.masked_fill(ranked < sampling.min_p * ranked[:, :1], 0.0)
    if sampling.typical_p not in (None, 1):
        ranked = _typical(ranked, sampling.typical_p)
    return ids, ranked


def _typical(ranked: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach a probability.

    *Shape:* (batch, kept) -> (batch, kept).
    """
    normal = ranked / ranked.sum(dim=-1, keepdim=True)
    surprise = -normal.log()
    entropy = torch.where(normal > 0, normal * surprise, 0.0).sum(dim=-1, keepdim=True)
    distance, order = (surprise - entropy).abs().sort(dim=-1, stable=True)
    before = (normal.gather(1, order).cumsum(dim=-1) < mass).sum(dim=-1, keepdim=True)
    limit = distance.gather(1, before.clamp(max=ranked.shape[1] - 1))
    return ranked.masked_fill((surprise - entropy).abs() > limit, 0.0)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the natural logarithm of the model's own probability of tokens.

    torch's log_softmax in float32 is off by 8e-6 on average over 49,152 tokens, always to one side. So the sum is in
    double precision, some rows at a time.

    *Shape:* (batch, n, vocab), (batch, n) int64 -> (batch, n), float64.
    """
    pieces = []
    for own, ids in zip(torch.split(logits, _ROWS, dim=1), torch.split(tokens, _ROWS, dim=1), strict=True):
        wide = own.double()
        pieces.append(wide.gather(-1, ids[..., None])[..., 0] - wide.logsumexp(dim=-1))
    return torch.cat(pieces, dim=1)


def likeliest(logits: Tensor, number: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the likeliest tokens of each row with the logarithms of their probabilities.

    *Shape:* (batch, vocab) -> batch times ``number`` pairs.
    """
    wide = logits.double()
    values, ids = (wide - wide.logsumexp(dim=-1, keepdim=True)).topk(min(number, logits.shape[-1]), dim=-1)
    return [
        tuple(sorted(zip(own, row, strict=True), key=lambda pair: (-pair[1], pair[0])))
        for own, row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
