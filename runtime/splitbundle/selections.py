"""Which part of a model a shard's name, or a range of layers, means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitbundle.calls import whole
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.records import record

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle


@record(frozen=True, slots=True, kw_only=True)
class Selection:
    """A part of the model: what a stage computes, and the units that it needs."""

    name: str
    layers: tuple[int, int]
    embeds: bool
    head: bool
    units: tuple[str, ...]


def select(
    bundle: Bundle, name: str | None, layers: tuple[int, int] | None, embeds: bool | None, head: bool | None
) -> Selection:
    """See ``Bundle.select``."""
    if (name is None) == (layers is None):
        raise BundleError(
            Problem(
                code="stage.range",
                argument="layers",
                expected="a shard's name or layers=",
                got="both or neither",
            )
        )
    if name is not None:
        shard = bundle.shard(name)
        return Selection(name=name, layers=shard.layers, embeds=shard.embeds, head=shard.head, units=shard.units)
    total = len(bundle.architecture.layers)
    if (
        not isinstance(layers, tuple | list)
        or len(layers) != 2
        or any(whole(i) is None for i in layers)
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
    units = bundle.architecture.units_of((start, stop), embeds=embeds, head=head)
    return Selection(name=f"layers[{start}:{stop}]", layers=(start, stop), embeds=embeds, head=head, units=units)
