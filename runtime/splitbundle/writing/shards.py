"""Make shards from cuts: their names, layer ranges and units."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import names
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.sizes import count
from splitbundle.format.manifest.document import File, Shard

DEFAULT_NAMES: Final = {1: ("model",), 2: ("bottom", "top"), 3: ("bottom", "trunk", "top")}


def shard_names(cuts: tuple[int, ...], given: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the shards: ``given``, or by default bottom, trunk, top (trunk-1 … when there are more).

    Raises:
        BundleError: ``usage.names``.
    """
    number = len(cuts) + 1
    if given is None:
        middle = tuple(f"trunk-{i}" for i in range(1, number - 1))
        return DEFAULT_NAMES.get(number, ("bottom", *middle, "top"))
    listed = () if isinstance(given, str) else tuple(given)  # the letters of one text would pass for names
    if len(listed) != number or len(set(listed)) != number or not all(names.is_shard(n) for n in listed):
        raise BundleError(
            Problem(
                code="usage.names",
                argument="names",
                expected=f"{number} different names, one for each shard, each {names.SHARD_RULE}",
                got=f"the text {quoted(given)}" if isinstance(given, str) else ", ".join(map(str, listed)),
                hint="Give one name more than there are cuts, or none",
            )
        )
    return listed


def check_cuts(cuts: tuple[int, ...], layers: int) -> None:
    """Check that the cuts are rising layer numbers from 0 to ``layers``.

    Raises:
        BundleError: ``usage.cut``.
    """
    whole = all(type(cut) is int and 0 <= cut <= layers for cut in cuts)
    if not whole or any(a >= b for a, b in pairwise(cuts)):
        raise BundleError(
            Problem(
                code="usage.cut",
                argument="split",
                expected=f"rising layer numbers from 0 to {layers}, the model's number of layers",
                got=",".join(map(str, cuts)),
                hint="A cut is the number of the first layer of the next shard",
            )
        )


def make_shards(
    architecture: Architecture,
    cuts: tuple[int, ...],
    given: Sequence[str] | None,
    units: dict[str, tuple[str, ...]],
    listed: dict[str, File],
) -> tuple[Shard, ...]:
    """Return the shards for these cuts.

    Args:
        architecture: The architecture of the model.
        cuts: The cuts.
        given: The names of the shards, or None for the default names.
        units: The name of each unit -> its weight files.
        listed: The path of each file -> its entry in the manifest.

    Raises:
        BundleError: ``usage.cut``, ``usage.names``.
    """
    layers = len(architecture.layers)
    check_cuts(cuts, layers)
    tensors = architecture.unit_tensors()
    edges = (0, *cuts, layers)
    shards = []
    for i, name in enumerate(shard_names(cuts, given)):
        first, last = i == 0, i == len(cuts)
        needed = architecture.units_of((edges[i], edges[i + 1]), embeds=first, head=last)
        shards.append(
            Shard(
                name=name,
                layers=(edges[i], edges[i + 1]),
                embeds=first,
                head=last,
                units=needed,
                graph=None,
                bytes=sum(listed[path].size for unit in needed for path in units[unit]),
                parameters=sum(count(tensors[unit]) for unit in needed),
            )
        )
    return tuple(shards)
