"""Tell a router's near tie from a wrong number.

Two experts whose scores differ by a rounding may be chosen the other way on another machine. Then all later numbers
differ, and no number is wrong. Each layer is computed alone here, from the original model's hidden states. If a token
differs, it is computed again with each choice that a rounding of its logits would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitbundle.backends.torch.experts import MixtureOfExperts, Router
from splitbundle.backends.torch.stage import Stage, load_stages
from splitbundle.format.architecture.experts import Experts
from splitbundle.stages import golden

if TYPE_CHECKING:
    from splitbundle.storage.files import Progress
    from splitbundle.storage.reader import BundleReader


def has_experts(bundle: BundleReader) -> bool:
    """Return whether some layers have a router."""
    return any(isinstance(kind.mlp, Experts) for kind in bundle.architecture.layer_kinds.values())


def compare_by_layer(
    bundle: BundleReader,
    shard: str | None,
    tensors: Mapping[str, Tensor],
    threads: int | None,
    progress: Progress | None = None,
) -> list[golden.Difference]:
    """Return the differences of each layer, computed from the original's hidden states. Near ties are exchanged.

    One layer is in memory at a time. The embedding and the head count as layers.

    Args:
        bundle: The bundle that has the golden vectors.
        shard: The only shard to run, or None for all.
        tensors: The golden vectors.
        threads: The number of threads.
        progress: Called with the name of the work, the layers that are done, and their number.
    """
    selection = bundle.select(shard, layers=None if shard is not None else (0, len(bundle.architecture.layers)))
    start, stop = selection.layers
    outputs: golden.Outputs = {}
    ties: list[golden.RouterTie] = []

    def stage(layers: tuple[int, int], *, embeds: bool = False, head: bool = False) -> Stage:
        chosen = bundle.select(layers=layers, embeds=embeds, head=head)
        return load_stages(bundle, [chosen], dtype="float32", threads=threads)[0]

    def tell(done: int) -> None:
        if progress is not None:
            progress("comparing the layers", done, stop - start)

    cases = range(len(bundle.manifest.vectors.lengths) if bundle.manifest.vectors is not None else 0)
    tell(0)
    with torch.no_grad():
        if selection.embeds:
            first = stage((0, 0), embeds=True)
            outputs |= {("hidden.0", case): first(tensors[f"case.{case}.ids"][None])[0] for case in cases}
            del first  # before the next one is loaded
        for layer in range(start, stop):
            alone = stage((layer, layer + 1))
            for case in cases:
                found = _layer(alone, layer, case, tensors)
                outputs[f"hidden.{layer + 1}", case] = found[0]
                ties += found[1]
            del alone
            tell(layer + 1 - start)
        if selection.head:
            last = stage((stop, stop), head=True)
            for case in cases:
                given = tensors[f"case.{case}.hidden.{stop}"][None]
                outputs["logits", case] = last(given, logits="last")[0, -1]
    original = golden.original_outputs(tensors, outputs)
    return golden.compare(outputs, original, ("torch", golden.side(bundle)), tensors, ties=tuple(ties))


def _layer(stage: Stage, layer: int, case: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[golden.RouterTie]]:
    """Return the hidden states after a layer, with near ties exchanged where that explains a difference."""
    given, wanted = (tensors[f"case.{case}.hidden.{at}"] for at in (layer, layer + 1))
    result: Tensor = stage(given[None])[0]
    block = stage.layers[str(layer)].mlp
    allowed = golden.TOLERANCE * golden.scale(tensors, f"hidden.{layer + 1}", case)
    ties: list[golden.RouterTie] = []
    if not isinstance(block, MixtureOfExperts):
        return result, ties
    for token in (~((result - wanted).abs().amax(-1) <= allowed)).nonzero().flatten().tolist():
        with _Exchange(block.router, token) as exchange:
            stage(given[None])  # tells what the router gets and chooses
            for other in exchange.alternatives():
                exchange.other = other
                row = stage(given[None])[0, token]
                if (row - wanted[token]).abs().max() <= allowed:
                    result[token] = row
                    here, there = (tuple(each.tolist()) for each in (exchange.chosen, other))
                    ties.append(golden.RouterTie(layer=layer, case=case, token=token, chosen=here, original=there))
                    break
    return result, ties


class _Exchange:
    """Replaces what a router chooses for one token, while it is entered."""

    def __init__(self, router: Router, token: int) -> None:
        self.router, self.token = router, token
        self.logits = self.chosen = torch.empty(0)
        self.other: Tensor | None = None

    def __enter__(self) -> _Exchange:
        self._handle = self.router.register_forward_hook(self._hook)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _hook(self, router: Router, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        weights, chosen = output
        if self.other is None:
            self.logits, self.chosen = router.logits(args[0])[self.token, None], chosen[self.token]
            return None
        weights, chosen = weights.clone(), chosen.clone()
        chosen[self.token] = self.other
        weights[self.token] = router.weights(self.logits, self.other[None])[0]
        return weights, chosen

    def alternatives(self) -> list[Tensor]:
        """Return the other choices that a rounding of one logit would give, the best expert of each first."""
        step = golden.TOLERANCE * self.logits.abs().max()
        nudges = torch.eye(self.logits.shape[1]) * step
        choices = self.router.choose(torch.cat((self.logits + nudges, self.logits - nudges)))
        if self.router.facts.function != "sparsemixer":  # there, the order of the chosen experts counts too
            choices, self.chosen = choices.sort(-1).values, self.chosen.sort().values
        return [choice for choice in torch.unique(choices, dim=0) if not torch.equal(choice, self.chosen)]
