"""Choose the next token from logits with numpy, by the same rules as ``backends.torch.sampling``."""

from __future__ import annotations

import random

import numpy

from splitbundle.errors import BundleError
from splitbundle.stages.sampling import NOT_FINITE, Sampling


def draw(logits: numpy.ndarray, sampling: Sampling, generator: random.Random) -> numpy.ndarray:
    """Draw the next token of each row.

    Sort the tokens by falling probability, and equal ones by rising id. Keep the tokens that top_k and top_p allow.
    With u uniform in [0, 1), draw the first token whose cumulative probability exceeds u times the total that is kept.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.

    Raises:
        BundleError: ``input.value`` if a row's largest logit is NaN or infinite.
    """
    largest = logits.max(axis=-1)
    if not numpy.isfinite(largest).all():  # the largest is NaN if any logit is; a draw would hide it
        raise BundleError(NOT_FINITE)
    if sampling.temperature == 0:
        likeliest: numpy.ndarray = logits.argmax(axis=-1)
        return likeliest
    # Subtract the largest before the division. Otherwise a small temperature could make logits infinite, and their
    # differences NaN.
    with numpy.errstate(under="ignore", over="ignore"):
        powers = numpy.exp((logits - largest[:, None]).astype(numpy.float64) / sampling.temperature)
    probabilities = powers / powers.sum(axis=-1, keepdims=True)
    ids = (-probabilities).argsort(axis=-1, kind="stable")
    ranked = numpy.take_along_axis(probabilities, ids, axis=-1)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    total = ranked.cumsum(axis=-1)
    if sampling.top_p is not None:
        # Keep the token that crosses top_p, because the tokens before it do not reach top_p.
        ranked = numpy.where(total - ranked >= sampling.top_p * total[:, -1:], 0.0, ranked)
        total = ranked.cumsum(axis=-1)
    rank = [
        min(int(numpy.searchsorted(row, generator.random() * row[-1], side="right")), ranked.shape[1] - 1)
        for row in total
    ]
    return numpy.take_along_axis(ids, numpy.array(rank)[:, None], axis=-1)[:, 0]
