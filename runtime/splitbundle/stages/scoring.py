"""The log-probability of each token of a text, in pieces: other texts can be continued between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

PIECE: Final = 64
"""The tokens of a piece. Their logits take 64 times the vocabulary."""
Score = tuple[int, float, tuple[tuple[int, float], ...]]


def scored(
    pipeline: Any,
    ids: Sequence[int],
    top: int,
    run: Callable[[Callable[[Any], Any]], Any] | None = None,
) -> Iterator[Score]:
    """Yield each token of a text but the first, its log-probability, and the likeliest tokens in its place.

    Args:
        pipeline: a pipeline.
        ids: the tokens of the text.
        top: the number of likeliest tokens, which come with their log-probabilities.
        run: calls a function with the pipeline, such as ``SharedPipeline.run``; by default at once.

    Raises:
        BundleError: ``input.*``.
    """
    if len(ids) < 2:
        return
    session = pipeline.session(1, len(ids) - 1)
    for start in range(0, len(ids) - 1, PIECE):
        given, wanted = list(ids[start : min(start + PIECE, len(ids) - 1)]), list(ids[start + 1 : start + 1 + PIECE])

        def compute(own: Any, given: list[int] = given, wanted: list[int] = wanted) -> list[Score]:
            with own._without_gradients():
                logits = own.forward(own.token_ids([given]), session=session)
                scores = own._scores(logits, own.token_ids([wanted]))[0].tolist()
                likeliest = own._likeliest(logits[0], top)
            return list(zip(wanted, scores, likeliest, strict=True))

        yield from compute(pipeline) if run is None else run(compute)
