"""Choose the next token from logits with numpy, by the same rules as ``backends.torch.sampling``."""

from __future__ import annotations

import numpy

from splitbundle.errors import BundleError
from splitbundle.stages.sampling import NOT_FINITE, Generator, History, Sampling


def draw(
    logits: numpy.ndarray, sampling: Sampling, generator: Generator, history: History | None = None
) -> numpy.ndarray:
    """Draw the next token of each row.

    Sort the tokens by falling probability, and equal ones by rising id. Keep the tokens that top_k, top_p, min_p and
    typical_p allow. With u uniform in [0, 1), draw the first token whose cumulative probability exceeds u times the
    total that is kept.

    *Shape:* (batch, vocab) -> (batch), int64. Every row takes one number from ``generator``.

    Raises:
        BundleError: ``input.value`` if a row's largest logit is NaN or infinite.
    """
    logits = adjusted(logits, sampling, history)
    largest = logits.max(axis=-1)
    if not numpy.isfinite(largest).all():  # the largest is NaN if any logit is; a draw would hide it
        raise BundleError(NOT_FINITE)
    if sampling.temperature == 0:
        likeliest_: numpy.ndarray = logits.argmax(axis=-1)
        return likeliest_
    ids, ranked = _kept(logits, largest, sampling)
    total = ranked.cumsum(axis=-1)
    rank = [
        min(int(numpy.searchsorted(row, generator.random() * row[-1], side="right")), ranked.shape[1] - 1)
        for row in total
    ]
    return numpy.take_along_axis(ids, numpy.array(rank)[:, None], axis=-1)[:, 0]


def probabilities(logits: numpy.ndarray, sampling: Sampling, history: History | None = None) -> numpy.ndarray:
    """Return the probability with which each token is drawn.

    *Shape:* (batch, vocab) -> (batch, vocab), float64. A token that can't be drawn has 0.
    """
    logits = adjusted(logits, sampling, history)
    found = numpy.zeros(logits.shape, numpy.float64)
    if sampling.temperature == 0:
        found[numpy.arange(len(logits)), logits.argmax(axis=-1)] = 1
        return found
    ids, ranked = _kept(logits, logits.max(axis=-1), sampling)
    numpy.put_along_axis(found, ids[:, : ranked.shape[1]], ranked / ranked.sum(axis=-1, keepdims=True), axis=-1)
    return found


def adjusted(logits: numpy.ndarray, sampling: Sampling, history: History | None) -> numpy.ndarray:
    """Return logits after the bias and the penalties. *Shape:* (batch, vocab) -> (batch, vocab)."""
    if not sampling.adjusts:
        return logits
    made = logits.astype(numpy.float32)  # a copy
    if sampling.logit_bias:
        made[:, list(sampling.logit_bias)] += numpy.array(list(sampling.logit_bias.values()), numpy.float32)
    if history is None:
        return made
    for row in range(len(made)):
        if sampling.repetition_penalty is not None and sampling.repetition_penalty != 1:
            places = sorted(history.seen[row])
            old, penalty = made[row, places], numpy.float32(sampling.repetition_penalty)
            made[row, places] = numpy.where(old < 0, old * penalty, old / penalty)
        if history.new[row]:
            counts = numpy.array(list(history.new[row].values()), numpy.float32)
            change = counts * (sampling.frequency_penalty or 0) + (sampling.presence_penalty or 0)
            made[row, list(history.new[row])] -= change.astype(numpy.float32)
    return made


def _kept(logits: numpy.ndarray, largest: numpy.ndarray, sampling: Sampling) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the ids by falling probability, and the probabilities, not normalized; 0 for those that are left out.

    *Shape:* (batch, vocab), (batch) -> (batch, vocab) and (batch, kept), float64.
    """
    # Subtract the largest before the division. Otherwise a small temperature could make logits infinite, and their
    # differences NaN.
    with numpy.errstate(under="ignore", over="ignore"):
        powers = numpy.exp((logits - largest[:, None]).astype(numpy.float64) / sampling.temperature)
    all_of_them = powers / powers.sum(axis=-1, keepdims=True)
    ids = (-all_of_them).argsort(axis=-1, kind="stable")
    ranked = numpy.take_along_axis(all_of_them, ids, axis=-1)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    if sampling.top_p is not None:
        total = ranked.cumsum(axis=-1)
        # Keep the token that crosses top_p, because the tokens before it do not reach top_p.
        ranked = numpy.where(total - ranked >= sampling.top_p * total[:, -1:], 0.0, ranked)
    if sampling.min_p:
        ranked = numpy.where(ranked < sampling.min_p * ranked[:, :1], 0.0, ranked)
    if sampling.typical_p is not None and sampling.typical_p != 1:
        ranked = _typical(ranked, sampling.typical_p)
    return ids, ranked


def _typical(ranked: numpy.ndarray, mass: float) -> numpy.ndarray:
    """Keep the tokens whose surprise is nearest to the entropy, until they reach a probability.

    *Shape:* (batch, kept) -> (batch, kept).
    """
    normal = ranked / ranked.sum(axis=-1, keepdims=True)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        surprise = -numpy.log(normal)
        entropy = numpy.where(normal > 0, normal * surprise, 0.0).sum(axis=-1, keepdims=True)
    distance = numpy.abs(surprise - entropy)
    order = distance.argsort(axis=-1, kind="stable")
    before = (numpy.take_along_axis(normal, order, axis=-1).cumsum(axis=-1) < mass).sum(axis=-1, keepdims=True)
    place = numpy.take_along_axis(order, before.clip(max=ranked.shape[1] - 1), axis=-1)
    return numpy.where(distance > numpy.take_along_axis(distance, place, axis=-1), 0.0, ranked)


def log_probabilities(logits: numpy.ndarray, tokens: numpy.ndarray) -> numpy.ndarray:
    """Return the natural logarithm of the model's own probability of tokens.

    *Shape:* (batch, n, vocab), (batch, n) int64 -> (batch, n), float64.
    """
    largest = logits.max(axis=-1, keepdims=True)
    total = numpy.exp(logits - largest).sum(axis=-1, keepdims=True, dtype=numpy.float64)
    chosen = numpy.take_along_axis(logits, tokens[..., None], axis=-1).astype(numpy.float64)
    found: numpy.ndarray = (chosen - largest - numpy.log(total))[..., 0]
    return found


def likeliest(logits: numpy.ndarray, number: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the likeliest tokens of each row with the logarithms of their probabilities.

    *Shape:* (batch, vocab) -> batch times ``number`` pairs.
    """
    values = _log_softmax(logits)
    number = min(number, logits.shape[-1])
    ids = numpy.argpartition(-values, number - 1, axis=-1)[:, :number] if number else values[:, :0].astype(int)
    rows = numpy.take_along_axis(values, ids, axis=-1)
    return [
        tuple(sorted(zip(own, row, strict=True), key=lambda pair: (-pair[1], pair[0])))
        for own, row in zip(ids.tolist(), rows.tolist(), strict=True)
    ]


def _log_softmax(logits: numpy.ndarray) -> numpy.ndarray:
    shifted = logits.astype(numpy.float32) - logits.max(axis=-1, keepdims=True).astype(numpy.float32)
    total = numpy.exp(shifted).sum(axis=-1, keepdims=True, dtype=numpy.float64)
    found: numpy.ndarray = shifted - numpy.log(total).astype(numpy.float32)
    return found
