"""From logits to the next token with numpy, as ``torch_sampling`` does it."""

from __future__ import annotations

import random

import numpy

from splitbundle.errors import BundleError
from splitbundle.stages.sampling import NOT_FINITE, Sampling


def draw(logits: numpy.ndarray, sampling: Sampling, generator: random.Random) -> numpy.ndarray:
    """The next token of each row.

    Tokens stand in falling order of probability, equal ones in rising order of id; with u uniform in [0, 1), the one
    drawn is the first whose cumulated probability exceeds u of what top_k and top_p leave.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.

    Raises:
        BundleError: ``input.value`` for logits that aren't numbers.
    """
    largest = logits.max(axis=-1)
    if not numpy.isfinite(largest).all():  # the largest is NaN where any is: a draw would hide it
        raise BundleError(NOT_FINITE)
    if sampling.temperature == 0:
        likeliest: numpy.ndarray = logits.argmax(axis=-1)
        return likeliest
    # Less the largest before the division: a small temperature would make infinities of both, and NaN of the rest.
    with numpy.errstate(under="ignore", over="ignore"):
        powers = numpy.exp((logits - largest[:, None]).astype(numpy.float64) / sampling.temperature)
    probabilities = powers / powers.sum(axis=-1, keepdims=True)
    ids = (-probabilities).argsort(axis=-1, kind="stable")
    ranked = numpy.take_along_axis(probabilities, ids, axis=-1)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    total = ranked.cumsum(axis=-1)
    if sampling.top_p is not None:
        # The token that crosses top_p is still in: what came before it hadn't reached it.
        ranked = numpy.where(total - ranked >= sampling.top_p * total[:, -1:], 0.0, ranked)
        total = ranked.cumsum(axis=-1)
    rank = [
        min(int(numpy.searchsorted(row, generator.random() * row[-1], side="right")), ranked.shape[1] - 1)
        for row in total
    ]
    return numpy.take_along_axis(ids, numpy.array(rank)[:, None], axis=-1)[:, 0]
