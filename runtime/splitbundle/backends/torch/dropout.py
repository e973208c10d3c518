"""Dropout (Srivastava et al. 2014), for trainable stages in training mode alone. It is off by default.

``spec/v1/decoder.md`` says what is dropped at each place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.manifest.document import DROPOUT as PLACES

SOURCE: Final = "source"


def parse_dropout(
    given: Mapping[str, float] | str | None, trainable: bool, of_source: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the rate at each place.

    Args:
        given: the rates, ``"source"`` for those of the source's configuration, or None for no dropout.
        trainable: whether the stage is trained.
        of_source: the rates in the manifest, or None.

    Raises:
        BundleError: ``input.value`` for another place or a rate out of range, for a stage that isn't trained, and for
            ``"source"`` without rates in the manifest.
    """
    if given is None:
        return {}
    chosen = of_source if given == SOURCE else given
    if chosen is None:
        expected = f"rates for some of {', '.join(PLACES)}, as this bundle has none of its source"
        raise _wrong(expected, quoted(given))
    rates: dict[str, Any] = dict(chosen) if isinstance(chosen, Mapping) else {"": chosen}
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
        layer.dropout = rates.get("attention_output", 0.0), rates.get("mlp_output", 0.0)
        layer.attention.dropout = rates.get("attention", 0.0)
    if stage.embedding is not None and stage.embeds:
        stage.embedding.dropout = rates.get("embedding", 0.0)


def _wrong(expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="input.value", argument="dropout", expected=expected, got=got))
