"""Select a part of a model by the name of a shard or by a range of layers."""

from __future__ import annotations

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import Shard
from splitbundle.integers import as_integer
from splitbundle.records import record


@record(frozen=True, slots=True, kw_only=True)
class Selection:
    """A part of the model: the layers and ends of a stage, and the units that it needs."""

    name: str
    layers: tuple[int, int]
    embeds: bool
    head: bool
    units: tuple[str, ...]


def select(
    architecture: Architecture,
    shard: Shard | None,
    layers: tuple[int, int] | None,
    embeds: bool | None,
    head: bool | None,
) -> Selection:
    """Return the part of a shard or of a range of layers. See ``BundleReader.select``."""
    if (shard is None) == (layers is None):
        raise BundleError(
            Problem(
                code="stage.range",
                argument="layers",
                expected="a shard's name or layers=",
                got="both or neither",
            )
        )
    if shard is not None:
        return Selection(name=shard.name, layers=shard.layers, embeds=shard.embeds, head=shard.head, units=shard.units)
    total = len(architecture.layers)
    if (
        not isinstance(layers, tuple | list)
        or len(layers) != 2
        or any(as_integer(i) is None for i in layers)
        or not 0 <= layers[0] <= layers[1] <= total
    ):
        raise BundleError(
            Problem(
                code="stage.range",
                argument="layers",
                expected=f"(start, stop) with 0 <= start <= stop <= {total}",
                got=quoted(layers),
            )
        )
    start, stop = int(layers[0]), int(layers[1])
    embeds = start == 0 if embeds is None else embeds
    head = stop == total if head is None else head
    if (embeds and start != 0) or (head and stop != total) or (start == stop and not embeds and not head):
        raise BundleError(
            Problem(
                code="stage.range",
                argument="layers",
                expected=f"a range with a layer, the embedding (at 0) or the head (at {total})",
                got=f"layers=({start}, {stop}), embeds={embeds}, head={head}",
            )
        )
    units = architecture.units_of((start, stop), embeds=embeds, head=head)
    return Selection(name=f"layers[{start}:{stop}]", layers=(start, stop), embeds=embeds, head=head, units=units)
