"""Dropout (Srivastava et al. 2014), for trainable stages in training mode alone. It is off by default.

"embedding" drops channels of the first hidden state, after its norm. "attention" drops numbers of the softmax, which
are not normalized again. "residual" drops channels of what attention and the feed-forward block add to the residual
stream, before a residual multiplier. What is kept is divided by 1 minus the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted

PLACES: Final = ("embedding", "attention", "residual")


def parse_dropout(given: Mapping[str, float] | None, trainable: bool) -> dict[str, float]:
    """Return the rate at each place.

    Raises:
        BundleError: ``input.value`` for another place or a rate out of range, and for a stage that isn't trained.
    """
    if given is None:
        return {}
    rates = dict(given) if isinstance(given, Mapping) else {"": given}
    numbers = all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates.values())
    if not numbers or not rates.keys() <= set(PLACES) or not all(0 <= rate < 1 for rate in rates.values()):
        raise _wrong(f"a rate from 0 to below 1 for some of {', '.join(PLACES)}", quoted(given))
    if not trainable:
        raise _wrong("nothing, without trainable=True", quoted(given))
    return rates


def set_dropout(stage: Any, rates: Mapping[str, float]) -> None:
    """Set the rates of a stage."""
    if not rates:
        return
    for layer in stage.layers.values():
        layer.dropout = rates.get("residual", 0.0)
        layer.attention.dropout = rates.get("attention", 0.0)
    if stage.embedding is not None and stage.embeds:
        stage.embedding.dropout = rates.get("embedding", 0.0)


def _wrong(expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="input.value", argument="dropout", expected=expected, got=got))
