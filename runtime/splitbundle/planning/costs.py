"""The costs of a range of layers, from the two documents of a bundle alone: no weight is read.

A FLOP is one multiplication or one addition, so a product with a matrix takes two for each of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from splitbundle.format.architecture.attention import Attention
from splitbundle.format.architecture.decoder import Architecture, LayerKind
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.architecture.sizes import Shapes, count
from splitbundle.format.dtypes import ITEM_SIZES
from splitbundle.format.manifest.document import BOUNDARY_TENSORS, EMBEDDING, Manifest, Storage
from splitbundle.records import record

TABLES: Final = (EMBEDDING, "embedding.position.weight")
"""The matrices of the embedding from which rows are looked up. A lookup takes no FLOPs."""
BOUNDARY_BYTES_PER_ROW: Final = ITEM_SIZES["int64"] * (len(BOUNDARY_TENSORS) - 1)
"""``past`` and ``count`` are int64, one number for each row."""


@record(frozen=True, slots=True, kw_only=True)
class UnitCosts:
    """The costs of one unit: the embedding, a layer, or the head. ``RangeCosts`` has the equations."""

    bytes: int
    parameters: int
    flops_per_token: int = 0
    kind: str | None = None
    """The kind of a layer; None for the embedding and the head."""
    attention_flops_per_token_and_position: int = 0
    most_positions: int | None = None
    """The window or the chunk of a layer, which bounds the positions that a token sees; None if nothing does."""
    cache_bytes_per_token: int = 0
    weight_bytes: int | None = None
    """The bytes of the weights in memory, if some are quantized; None for parameters · item size."""


@record(frozen=True, slots=True, kw_only=True)
class AttentionCosts:
    """The attention of all layers of one kind in a range."""

    kind: str
    layers: int
    """The number of layers of this kind."""
    flops_per_token_and_position: int
    """Σ over these layers of 2 · heads · (head_dim + value_dim): for each number of a query, and of a value."""
    most_positions: int | None
    """The window or the chunk, which bounds the positions that a token sees; None if nothing does."""

    def flops_per_token(self, context: int) -> int:
        """Return flops_per_token_and_position · min(context, most_positions), for the last token of a context."""
        seen = context if self.most_positions is None else min(context, self.most_positions)
        return self.flops_per_token_and_position * seen


@record(frozen=True, slots=True, kw_only=True)
class RangeCosts:
    """The costs of a range of layers, with or without the embedding and the head."""

    layers: tuple[int, int]
    embeds: bool
    head: bool
    bytes: int
    """Σ over the units of the range of the sizes of their files, in bytes.

    A range with a tied head has the embedding's unit too, once, as in the manifest.
    """
    parameters: int
    """Σ over the same units of the numbers in their tensors."""
    flops_per_token: int
    """2 · Σ over the matrices that multiply a token of their numbers: the linear layers, and the head's projection.

    The projection counts if the range has the head, tied or not. Lookups, norms, rotations and activations don't count.
    """
    attention: tuple[AttentionCosts, ...]
    """The FLOPs of attention, which grow with the positions, for each kind of layer in the range."""
    weight_bytes: int
    """The memory for the weights: parameters · item size of the dtype to compute in, or for a quantized weight the
    bytes of its codes and scales."""
    cache_bytes_per_token: int
    """Σ over the layers of kv_heads · (head_dim + value_dim) · item size: a key and a value for each key head.

    A cache has a slot for each token of the session in every layer. A window doesn't make it smaller.
    """
    boundary_bytes_per_token: int
    """hidden_size · item size: ``hidden`` at the end of the range. 0 with the head."""
    boundary_bytes_per_row: int
    """16 for each call: ``past`` and ``count``, both int64. 0 with the head."""

    def flops_per_token_at(self, context: int) -> int:
        """Return flops_per_token + Σ over the kinds of their attention: the FLOPs of a context's last token.

        In a layer with chunks, this is the last token of a chunk, if the context is as long as a chunk.
        """
        return self.flops_per_token + sum(each.flops_per_token(context) for each in self.attention)

    def memory_bytes(self, context: int, batch: int) -> int:
        """Return weight_bytes + batch · context · cache_bytes_per_token. Activations come on top."""
        return self.weight_bytes + batch * context * self.cache_bytes_per_token


@record(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """The costs of all units of a model, and what the costs of a range need beside them."""

    embedding: UnitCosts
    layers: tuple[UnitCosts, ...]
    head: UnitCosts
    tied: bool
    """Whether the head needs the embedding's unit, too."""
    hidden_size: int
    item_size: int
    """Bytes of one number in the dtype to compute in."""

    def of_range(self, layers: tuple[int, int], *, embeds: bool, head: bool) -> RangeCosts:
        """Return the costs of the layers from ``layers[0]`` up to, and without, ``layers[1]``."""
        inner = self.layers[layers[0] : layers[1]]
        computing = (*((self.embedding,) if embeds else ()), *inner, *((self.head,) if head else ()))
        stored = (self.embedding, *computing) if head and self.tied and not embeds else computing
        parameters = sum(unit.parameters for unit in stored)
        return RangeCosts(
            layers=layers,
            embeds=embeds,
            head=head,
            bytes=sum(unit.bytes for unit in stored),
            parameters=parameters,
            flops_per_token=sum(unit.flops_per_token for unit in computing),
            attention=_attention(inner),
            weight_bytes=sum(
                unit.parameters * self.item_size if unit.weight_bytes is None else unit.weight_bytes for unit in stored
            ),
            cache_bytes_per_token=sum(unit.cache_bytes_per_token for unit in inner),
            boundary_bytes_per_token=0 if head else self.hidden_size * self.item_size,
            boundary_bytes_per_row=0 if head else BOUNDARY_BYTES_PER_ROW,
        )

    def of_shards(self, cuts: tuple[int, ...]) -> tuple[RangeCosts, ...]:
        """Return the costs of the shards between these cuts, which are rising layer numbers."""
        edges = (0, *cuts, len(self.layers))
        last = len(cuts)
        return tuple(
            self.of_range((edges[i], edges[i + 1]), embeds=i == 0, head=i == last) for i in range(len(edges) - 1)
        )


def _attention(layers: tuple[UnitCosts, ...]) -> tuple[AttentionCosts, ...]:
    kinds: dict[str, list[UnitCosts]] = {}
    for layer in layers:
        kinds.setdefault(str(layer.kind), []).append(layer)
    return tuple(
        AttentionCosts(
            kind=kind,
            layers=len(same),
            flops_per_token_and_position=sum(layer.attention_flops_per_token_and_position for layer in same),
            most_positions=same[0].most_positions,
        )
        for kind, same in kinds.items()
    )


def bundle_costs(manifest: Manifest, architecture: Architecture, dtype: str | None = None) -> ModelCosts:
    """Return the costs of a bundle's units. The sizes of the files are those in the manifest.

    Args:
        manifest: The bundle's manifest. The files that it lists may be absent.
        architecture: The bundle's architecture.
        dtype: The name of the dtype to compute in; by default the dtype of the stored weights.
    """
    sizes = {unit: sum(manifest.files[path].size for path in paths) for unit, paths in manifest.units.items()}
    return model_costs(architecture, sizes, dtype or manifest.storage.dtype, manifest.storage)


def model_costs(
    architecture: Architecture, unit_bytes: Mapping[str, int], dtype: str, storage: Storage | None = None
) -> ModelCosts:
    """Return the costs of a model's units.

    Args:
        architecture: The model's architecture.
        unit_bytes: Unit -> the size of its files in bytes.
        dtype: The name of the dtype to compute in.
        storage: How the tensors are stored, if some are quantized.
    """
    item_size = ITEM_SIZES[dtype]
    encoded = {} if storage is None else storage.encodings

    def weight_bytes(tensors: Shapes) -> int | None:
        if storage is None or not encoded:
            return None
        plain = sum(math.prod(shape) for name, shape in tensors.items() if name not in encoded) * item_size
        own = ((name, shape) for name, shape in tensors.items() if name in encoded)
        return plain + sum(each.size for name, shape in own for each in storage.stored(name, shape).values())

    head_flops = _flops(architecture.head_tensors())
    if architecture.head.tied:
        head_flops += 2 * math.prod(architecture.embedding_tensors()[EMBEDDING])
    kinds: dict[str, tuple[int, int]] = {}  # a deep model has many layers, and few kinds
    layers = []
    for i, name in enumerate(architecture.layers):
        if name not in kinds:
            tensors = architecture.layer_tensors(i)
            kinds[name] = count(tensors), _flops(tensors, architecture.kind_of(i))
        attention = architecture.kind_of(i).attention
        numbers = attention.head_dim + attention.value_size
        layers.append(
            UnitCosts(
                bytes=unit_bytes[architecture.layer_unit(i)],
                parameters=kinds[name][0],
                flops_per_token=kinds[name][1],
                kind=name,
                attention_flops_per_token_and_position=2 * attention.heads * numbers,
                most_positions=_most_positions(attention),
                cache_bytes_per_token=attention.kv_heads * numbers * item_size,
                weight_bytes=weight_bytes(architecture.layer_tensors(i)),
            )
        )
    embedding, head = architecture.embedding_tensors(), architecture.head_tensors()
    return ModelCosts(
        embedding=UnitCosts(
            bytes=unit_bytes["embedding"],
            parameters=count(embedding),
            flops_per_token=_flops(embedding),
            weight_bytes=weight_bytes(embedding),
        ),
        layers=tuple(layers),
        head=UnitCosts(
            bytes=unit_bytes["head"],
            parameters=count(head),
            flops_per_token=head_flops,
            weight_bytes=weight_bytes(head),
        ),
        tied=architecture.head.tied,
        hidden_size=architecture.hidden_size,
        item_size=item_size,
    )


def _most_positions(attention: Attention) -> int | None:
    return attention.chunk if attention.window is None else attention.window


def _flops(tensors: Shapes, kind: LayerKind | None = None) -> int:
    """Return two for each number of each matrix that multiplies a token. A token has few of a layer's experts."""
    chosen = kind.mlp.per_token if kind is not None and isinstance(kind.mlp, Experts) else 0
    dense = sum(
        math.prod(shape)
        for name, shape in tensors.items()
        # The norm of queries and keys may have a weight for each head, which is no matrix of a linear layer.
        if len(shape) == 2 and name.endswith(".weight") and name not in TABLES and not name.endswith("norm.weight")
    )
    return 2 * dense + 2 * sum(chosen * math.prod(shape[1:]) for shape in tensors.values() if len(shape) == 3)
