"""Run the original model with one of its layers in memory at a time.

The class is built on the meta device. Its own code computes everything: the masks, the positions, and what each layer
gets. It runs once for each layer. Every layer before this one returns what it returned when it was in memory, and the
run ends after this layer. The modules before the first layer and after the last one are treated as a layer each.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from splitbundle.storage.files import Progress
from splitbundle_converter.checkpoint.source import Checkpoint, Reader
from splitbundle_converter.errors import refusal
from splitbundle_converter.families.configuration import resolve
from splitbundle_converter.families.row import Family
from splitbundle_converter.quiet_transformers import quiet
from splitbundle_converter.reference.module_weights import ModuleWeights, empty_original
from splitbundle_converter.reference.original_errors import UNCHECKED

EMBEDDING = -1
"""The step before the first layer."""


class LayeredOriginal:
    """An original model on the meta device, which runs layer by layer."""

    def __init__(self, checkpoint: Checkpoint, weights: ModuleWeights, layers: str, run: Callable[..., Any]) -> None:
        """Prepare the run.

        Args:
            checkpoint: The checkpoint that the weights are read from.
            weights: The weights of the language model's modules.
            layers: The name of the module list that has the layers, in the language model.
            run: The model that is called: the language model, or a larger one that contains its modules.
        """
        self._checkpoint, self._weights, self._run = checkpoint, weights, run
        self._layers = [f"{layers}.{i}" for i in range(len(weights.module(layers)))]
        inside = set(weights.inside(layers))
        outside = [name for name in weights.names if name not in inside]
        around = {name for name in outside if not name or layers.startswith(f"{name}.")}
        """The modules that contain the layers. Their own code runs each time."""
        self._kept = [name for name in outside if name in around or not weights.has_sources(name)]
        self._loose = [name for name in outside if name not in self._kept]
        self._step = EMBEDDING
        self._case = 0
        self._calls: Counter[str] = Counter()
        self._outputs: dict[tuple[int, str, int], Any] = {}
        """The case, the name of a module, and the number of its call in one run -> its output."""
        self._first: dict[int, Tensor] = {}
        """The case -> the input of the first layer."""

    def results(
        self, rows: Sequence[Tensor], dtype: torch.dtype | None, progress: Progress | None = None
    ) -> list[tuple[list[Tensor], Tensor]]:
        """Return what ``golden_vectors.run_original`` returns for each row. It can be called once.

        *Shape:* each (sequence) -> each (sequence, hidden), and (sequence, vocab), float32.

        Args:
            rows: The token ids.
            dtype: The dtype that the weights are rounded to, or None.
            progress: Called with the name of the work, the layers that are done, and their number.

        Raises:
            BundleError: ``source.tensor``, ``source.unreadable``.
        """
        last = len(self._layers)
        logits: list[Tensor] = []
        with self._checkpoint.reader() as reader, torch.no_grad(), quiet():
            self._prepare(reader, dtype)
            for self._step in range(EMBEDDING, last + 1):
                if progress is not None:
                    progress("running the original model", self._step - EMBEDDING, last + 2)
                for self._case, ids in enumerate(rows):
                    self._calls.clear()
                    try:
                        found = self._run(input_ids=ids[None], use_cache=False, return_dict=True).logits[0]
                    except _Done:
                        continue
                    logits.append(found)
                self._weights.free(set(self._weights.loaded()) - set(self._kept))
        if len(logits) != len(rows):
            expected = "a model whose modules compute one after the other"
            raise refusal("source.config", self._checkpoint.name, expected, type(self._run).__name__, UNCHECKED)
        return [(self._hidden(case), found) for case, found in enumerate(logits)]

    def embed(
        self, batches: Sequence[Tensor], dtype: torch.dtype | None, take: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Compute what the first layer gets for some batches, and give it to ``take`` with the batch's ids.

        It can be called once, in place of ``results``.

        *Shape:* each (batch, sequence) -> (batch, sequence), (batch, sequence, hidden).

        Args:
            batches: The token ids.
            dtype: The dtype that the weights are rounded to, or None.
            take: Gets the ids of a batch, and the hidden states before the first layer.

        Raises:
            BundleError: ``source.tensor``, ``source.unreadable``.
        """
        with self._checkpoint.reader() as reader, torch.no_grad(), quiet():
            self._prepare(reader, dtype)
            for ids in batches:
                self._calls.clear()
                self._outputs.clear()
                with contextlib.suppress(_Done):
                    self._run(input_ids=ids, use_cache=False, return_dict=True)
                take(ids, self._first[self._case])

    def _prepare(self, reader: Reader, dtype: torch.dtype | None) -> None:
        """Load the modules that stay in memory, and let the others load when they are called."""
        self._weights.load(self._kept, reader, dtype)
        for i, name in enumerate(self._layers):
            self._replace(name, partial(self._layer, reader, dtype, i))
        for name in self._loose:
            self._replace(name, partial(self._through, reader, dtype, [name], name))

    def _replace(self, name: str, forward: Callable[..., Any]) -> None:
        module = self._weights.module(name)
        module.forward = partial(forward, module.forward)

    def _layer(self, reader: Reader, dtype: torch.dtype | None, i: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute a layer, or return its earlier output. End the run after the layer of this step."""
        if self._step == EMBEDDING:
            self._first[self._case] = args[0] if args else kwargs["hidden_states"]
            raise _Done
        name = self._layers[i]
        output = self._through(reader, dtype, self._weights.inside(name), name, own, *args, **kwargs)
        if i == self._step:
            raise _Done
        return output

    def _through(
        self,
        reader: Reader,
        dtype: torch.dtype | None,
        parts: list[str],
        name: str,
        own: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute a module with these parts, or return its earlier output."""
        key = self._case, name, self._calls[name]
        self._calls[name] += 1
        if key not in self._outputs:
            self._weights.load(parts, reader, dtype)
            self._outputs[key] = own(*args, **kwargs)
        return _copied(self._outputs[key])

    def _hidden(self, case: int) -> list[Tensor]:
        outputs = [self._outputs[case, name, 0] for name in self._layers]
        states = [self._first[case], *(output[0] if isinstance(output, tuple | list) else output for output in outputs)]
        return [state[0].contiguous() for state in states]


class _Done(Exception):
    """Ends a run of the model after the layer of the step."""


def _copied(output: Any) -> Any:
    """Return an output whose tensors may be changed in place."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output


def layered_original(source: Checkpoint, family: Family, *, inert: bool = True) -> LayeredOriginal:
    """Return the original model of a checkpoint, which runs layer by layer.

    ``inert`` is as for ``configuration.build``.

    Raises:
        BundleError: ``source.config``, ``source.tensor``.
    """
    config = resolve(source.configuration(), inert=inert)
    config._attn_implementation = config._experts_implementation = "eager"
    with quiet():
        model = empty_original(config)
        names = {name: name for name in source.tensors}
        weights = ModuleWeights(model, source, names, ("missing_keys", "mismatched_keys"))
    return LayeredOriginal(source, weights, family.modules, model)
