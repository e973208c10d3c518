"""Read rotary positions from ``rope_parameters``: the base, the rotated channels, and the scaling of frequencies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from splitbundle.format.architecture.rotary import (
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    Proportional,
    Rotary,
    Scaling,
    Unscaled,
    Yarn,
)
from splitbundle_converter.families.config_reader import ConfigReader


def rotary(
    config: ConfigReader,
    head_dim: int,
    *,
    parameters: ConfigReader | None = None,
    layout: str = "half",
    partial: bool | float = False,
) -> Rotary:
    """Return the rotary positions in ``rope_parameters``, or in the object of a layer type within it.

    Args:
        config: The configuration of the model. Some scalings use its ``max_position_embeddings`` as a default.
        head_dim: The number of channels of a head.
        parameters: The object with the parameters, if it is not ``rope_parameters`` itself.
        layout: Which channels form a pair: "half" or "interleaved".
        partial: Whether the model can rotate only some of the channels, or the fraction that it rotates by default.
            Other models ignore ``partial_rotary_factor``, or fail.
    """
    inner = config.inside("rope_parameters") if parameters is None else parameters
    inner.ignored(["type"])  # an old name of rope_type, which transformers keeps in addition
    kind = inner.choice("rope_type", {name: name for name in ("default", *_SCALINGS)})
    known, fraction = not inner.problems, float(partial) or 1.0
    if not partial and kind != "proportional":
        inner.allowed("partial_rotary_factor", 1.0, None)
    elif inner.raw("partial_rotary_factor") is not None:
        fraction = inner.number("partial_rotary_factor")
    whole = kind == "proportional"  # it rotates a fraction of the pairs, not the pairs in a fraction of the channels
    dim = head_dim if whole else int(head_dim * fraction)
    if dim % 2 or not 2 <= dim <= head_dim:
        config.refuse("head_dim", "an even number of channels to rotate, because rotary positions rotate pairs", dim)
        dim = max(2, dim - dim % 2)
    if kind in ("default", "linear", "dynamic"):
        inner.ignored(["original_max_position_embeddings"])  # it describes the training; these kinds do not use it
    scaling = _SCALINGS[kind](config, inner, dim, fraction) if kind in _SCALINGS else Unscaled()
    base = inner.number("rope_theta")
    if known:  # the parameters of an unknown rope_type have an unknown meaning
        for name in inner.unread():
            inner.leave(name, f"no such parameter with rope_type {kind}")
    config.add(inner)
    return Rotary(base=base, dim=dim, layout=layout, scaling=scaling)


def _linear(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    return Linear(factor=inner.number("factor"))


def _llama3(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    scaling = Llama3(
        factor=inner.number("factor"),
        low_frequency_factor=inner.number("low_freq_factor"),
        high_frequency_factor=inner.number("high_freq_factor"),
        original_positions=inner.integer("original_max_position_embeddings"),
    )
    if not scaling.low_frequency_factor < scaling.high_frequency_factor:
        inner.refuse("high_freq_factor", f"more than low_freq_factor ({scaling.low_frequency_factor})")
    return scaling


def _dynamic(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    if dim < 4:
        config.refuse("head_dim", "at least 4 channels to rotate, for rope_type dynamic", dim)
    return Dynamic(factor=inner.number("factor"), original_positions=config.integer("max_position_embeddings"))


def _yarn(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    original = inner.integer("original_max_position_embeddings")
    if inner.raw("factor") is None:
        factor = config.integer("max_position_embeddings") / original
    else:
        factor = inner.number("factor")
    numerator, denominator = inner.raw("mscale"), inner.raw("mscale_all_dim")
    if inner.raw("attention_factor") is not None:
        attention_factor = inner.number("attention_factor")
    elif numerator and denominator:
        attention_factor = _mscale(factor, inner.number("mscale")) / _mscale(factor, inner.number("mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=inner.number("beta_fast") if inner.raw("beta_fast") else 32.0,
        beta_slow=inner.number("beta_slow") if inner.raw("beta_slow") else 1.0,
        truncate=True if inner.raw("truncate") is None else inner.boolean("truncate"),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, multiplier: float) -> float:
    """Return YaRN's growth of the scores with the length (Peng et al. 2023, arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _longrope(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    original = inner.integer("original_max_position_embeddings", minimum=2)
    if inner.raw("factor") is None:
        factor = config.integer("max_position_embeddings") / original
    else:
        factor = inner.number("factor")
    if inner.raw("attention_factor") is not None:
        attention_factor = inner.number("attention_factor")
    else:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        original_positions=original,
        short_factors=inner.numbers("short_factor", dim // 2),
        long_factors=inner.numbers("long_factor", dim // 2),
        attention_factor=attention_factor,
    )


def _proportional(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    factor = 1.0 if inner.raw("factor") is None else inner.number("factor")
    return Proportional(factor=factor, pairs=int(fraction * dim // 2))


_SCALINGS: Final[dict[str, Callable[[ConfigReader, ConfigReader, int, float], Scaling]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
"""A ``rope_type`` of transformers -> the function that reads its scaling of frequencies."""
