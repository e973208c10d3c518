"""Recognize tensor names in one part of a model: the family's names, with layers counted from the part's first layer.

Users write their own modules for a part, so the names may lack an outer prefix. For example, GPT-2's
``transformer.h.3.ln_1.weight`` is ``h.1.ln_1.weight`` in a part that begins with layer 2. The rest must be exactly the
family's name. Only the list of layers may have a common other name (``layers``, ``h``, ``blocks``). Tensors whose rows
are stored separately are unknown here, and so are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle_converter.families.row import Family

LISTS: Final = ("layers", "h", "blocks")
LAYER: Final = "{layer}"
EMBEDDING: Final = "embedding"
HEAD: Final = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A recognized tensor of a part."""

    source: str
    """The name in the whole model, with ``{layer}`` in place of the layer's number."""
    unit: str | None
    """``embedding`` or ``head``, if the tensor belongs to one of them."""
    layers: str | None = None
    """The name of the part's list of layers, if the tensor belongs to a layer."""
    layer: int | None = None
    """The number of the layer in the part."""


class PartNames:
    """The names that a family's tensors may have in a part."""

    def __init__(self, family: Family, architecture: Architecture) -> None:
        self.layers = family.layers
        units = {row.source: row.tensors[0].partition(".")[0] for row in family.names(architecture)}
        units |= dict.fromkeys((*family.dropped, *family.constants), "")
        around = (family.layers.rpartition(".")[0] + ".", family.prefix)
        inside = f"{family.layers}.{LAYER}."
        self._units = {name: unit if unit in (EMBEDDING, HEAD) else None for name, unit in units.items()}
        self._of_layers = {name.removeprefix(inside) for name in units if name.startswith(inside)}
        self._lists = {family.layers, *(family.layers.removeprefix(outer) for outer in around), *LISTS}
        # The full form of each name comes last, so it overrides an equal short form of another name.
        self._others = {
            form: name
            for outer in (*around, "")
            for name in units
            if LAYER not in name
            for form in (name.removeprefix(outer),)
        }
        inner = next(name.removeprefix(inside) for name in units if name.startswith(inside))
        self.example = f"{family.layers.rpartition('.')[2]}.0.{inner}"

    def find(self, name: str) -> Found | None:
        """Return the tensor with this name in a part, or None if the family has no such tensor."""
        if name in self._others:
            source = self._others[name]
            return Found(source=source, unit=self._units[source])
        for layers in self._lists:
            number, _, inner = name.removeprefix(f"{layers}.").partition(".")
            if name.startswith(f"{layers}.") and inner in self._of_layers and _is_number(number):
                return Found(source=f"{self.layers}.{LAYER}.{inner}", unit=None, layers=layers, layer=int(number))
        return None

    def is_dropped(self, source: str, family: Family) -> bool:
        """Return whether a tensor has no learned values. Such a tensor may be in several parts."""
        return source in family.dropped or source in family.constants


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 6 and str(int(text)) == text
