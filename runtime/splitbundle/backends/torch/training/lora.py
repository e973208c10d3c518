"""LoRA (Hu et al. 2021, arXiv:2106.09685): small trainable matrices beside the linear layers of a stage.

A layer computes W x + b + s · B A x, with A of ``rank`` rows and B of ``rank`` columns. The scaling s is alpha / rank,
or alpha / √rank with rank-stabilized LoRA (Kalajdzievski 2023, arXiv:2312.03732). B starts as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.experts import Stacked
from splitbundle.backends.torch.modules import Linear
from splitbundle.backends.torch.quantized_modules import Codes
from splitbundle.errors import quoted, wrong_argument
from splitbundle.format.manifest.document import SourceName
from splitbundle.integers import as_integer

LINEAR = (
    *(f"attention.{name}" for name in ("query", "key", "value", "gate", "output")),
    *(f"mlp.{block}{name}" for block in ("", "experts.", "shared.") for name in ("gate", "up", "down")),
)
"""The linear layers of a layer, under their canonical names. ``mlp.experts.gate`` is that of all experts."""


class LoraLinear(nn.Module):
    """A linear layer with an adapter. The layer itself takes no gradients."""

    def __init__(self, base: Linear | Stacked, rank: int, alpha: float, dropout: float, rslora: bool) -> None:
        super().__init__()
        *experts, outputs, inputs = shape_of(base)
        self.base, self.rank, self.alpha, self.rslora = base, rank, alpha, rslora
        self.dropout = nn.Dropout(dropout)
        # In 16 bits, small steps of the adapter would be lost. PEFT uses float32, too.
        self.lora_a = nn.Parameter(torch.empty(*experts, rank, inputs, device=base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(*experts, outputs, rank, device=base.weight.device))
        for matrix in _matrices(self.lora_a):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    @property
    def scaling(self) -> float:
        """Return the factor of the adapter's result."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b + s · B A x. *Shape:* (…, inputs) -> (…, outputs)."""
        inner = functional.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a)
        added = functional.linear(inner, self.lora_b) * self.scaling
        return self.base(x) + added.to(x.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> Linear | Stacked:
        """Return the layer alone, with W + s · B A as its weight. The sum is computed in float32 and rounded once."""
        for weight, a, b in zip(*map(_matrices, (self.base.weight, self.lora_a, self.lora_b)), strict=True):
            weight.copy_((weight.float() + self.scaling * (b.float() @ a.float())).to(weight.dtype))
        return self.base

    def extra_repr(self) -> str:
        """Return the rank and the scaling for ``repr``."""
        return f"rank={self.rank}, scaling={self.scaling:g}"


class LoraStacked(LoraLinear):
    """The matrices of one projection of all experts, each with an adapter of its own."""

    def forward(self, x: Tensor, expert: int) -> Tensor:  # type: ignore[override]
        """Return W x + b + s · B A x with the matrices of one expert. *Shape:* (…, inputs) -> (…, outputs)."""
        inner = functional.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a[expert])
        added = functional.linear(inner, self.lora_b[expert]) * self.scaling
        return self.base(x, expert) + added.to(x.dtype)  # type: ignore[no-any-return]


def shape_of(layer: Linear | Stacked | LoraLinear) -> Sequence[int]:
    """Return the shape of a layer's weight: (rows, columns), with the experts before them if it is a stack."""
    base = layer.base if isinstance(layer, LoraLinear) else layer
    return base.logical_shape if isinstance(base, Codes) else base.weight.shape


def _matrices(weight: Tensor) -> Tensor:
    """Return a view with a dimension of experts. *Shape:* (rows, columns) or (experts, rows, columns) -> the second."""
    return weight if weight.ndim == 3 else weight[None]


def add_lora(
    stage: Any, rank: int, alpha: float, targets: Sequence[str], *, dropout: float = 0.0, rslora: bool = False
) -> list[str]:
    """Give linear layers of a stage an adapter each. See ``Stage.add_lora``."""
    number = as_integer(rank)
    if number is None or number < 1:
        raise wrong_argument("rank", "a number from 1", quoted(rank))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise wrong_argument("alpha", "a number above 0", quoted(alpha))
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise wrong_argument("dropout", "a number from 0 to below 1", quoted(dropout))
    chosen = _chosen(stage, targets)
    made = []
    for path in chosen:
        parent, name = _parent(stage, path)
        layer = getattr(parent, name)
        if isinstance(layer, LoraLinear):
            raise wrong_argument("targets", "layers without an adapter", f"{quoted(path)}, which has one")
        most = max(shape_of(layer)[-2:])
        if number > most:
            raise wrong_argument("rank", f"at most {most}, the size of {path}", f"{number}")
        kind = LoraStacked if isinstance(layer, Stacked) else LoraLinear
        made.append((parent, name, kind(layer, number, float(alpha), float(dropout), rslora)))
    stage.requires_grad_(False)
    for _, adapter in adapters_of(stage):
        adapter.lora_a.requires_grad_()
        adapter.lora_b.requires_grad_()
    for parent, name, adapter in made:
        setattr(parent, name, adapter)
    return chosen


def merge_lora(stage: Any) -> list[str]:
    """Fold all adapters of a stage into their layers. See ``Stage.merge_lora``."""
    found = list(adapters_of(stage))
    for path, adapter in found:
        if isinstance(adapter.base, Codes):
            expected = "adapters of layers whose weights are not quantized"
            hint = "Save the adapter, and merge it into the bundle from which this one was quantized"
            raise wrong_argument("stage", expected, f"{quoted(path)}, which is {adapter.base.encoding.name}", hint)
    for path, adapter in found:
        parent, name = _parent(stage, path)
        setattr(parent, name, adapter.merged())
    return [path for path, _ in found]


def adapters_of(stage: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the canonical name of each layer with an adapter, and the adapter."""
    for path, module in stage.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def linear_layers(stage: Any) -> list[str]:
    """Return the canonical names of the linear layers that can have an adapter."""
    own = [f"layers.{layer}.{name}" for layer in range(*stage.layer_range) for name in LINEAR]
    own = ["embedding.projection", *own, "head.narrowing", "head.projection"]
    found = dict(stage.named_modules())
    return [path for path in own if isinstance(found.get(path), Linear | Stacked | LoraLinear)]


def canonical_layers(entry: SourceName) -> list[str]:
    """Return the canonical names of the layers whose weights are a source tensor, with ``{layer}`` in them."""
    return [name.removesuffix(".weight") for name in entry.tensors if name.endswith(".weight")]


def _chosen(stage: Any, targets: Sequence[str]) -> list[str]:
    """Return the layers that targets mean: names, or ends of names, canonical ones or those of the source."""
    if isinstance(targets, str) or not targets:
        raise wrong_argument("targets", "names of linear layers, as a list", quoted(targets))
    layers = linear_layers(stage)
    chosen: list[str] = []
    for target in targets:
        own = [path for path in layers if _is_end(target, path)]
        for entry in stage.source_names:
            if entry.source.endswith(".weight") and _is_end(target, entry.source.removesuffix(".weight")):
                meant = canonical_layers(entry)
                numbers = range(*stage.layer_range) if "{layer}" in entry.source else [0]
                named = [name.replace("{layer}", str(number)) for number in numbers for name in meant]
                own += [path for path in named if path in layers]
        if not own:
            known = sorted({path.removeprefix(f"layers.{stage.layer_range[0]}.") for path in layers})
            such = f", such as {', '.join(known[:8])}, or the source's names" if known else ", which has none"
            expected = f"linear layers of {quoted(stage.name)}{such}"
            raise wrong_argument("targets", expected, quoted(target))
        chosen += own
    return [path for path in layers if path in set(chosen)]


def _is_end(target: object, path: str) -> bool:
    return isinstance(target, str) and (path == target or path.endswith(f".{target}"))


def _parent(stage: nn.Module, path: str) -> tuple[nn.Module, str]:
    outer, _, name = path.rpartition(".")
    return stage.get_submodule(outer), name
