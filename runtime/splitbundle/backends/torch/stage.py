"""A stage: a shard, or any layer range, loaded and ready to compute with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.decoder import Embedding, Head, Layer
from splitbundle.backends.torch.kernels import with_kernels_for
from splitbundle.backends.torch.numpy_stage import NumpyStage
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.weights import compute_dtype, map_tensors, rounded
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.stages.call import Call
from splitbundle.stages.stage import ArrayInfo, LogitsWanted, StageBase

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.storage.reader import BundleReader

Rows = Sequence[int] | Tensor
"""An integer for each row."""


class Stage(StageBase, nn.Module):
    """A part of the model. Its parameters bear the canonical names, with global layer numbers.

    The first stage takes token ids, the others ``hidden``; the last one gives logits, the others ``hidden``.
    """

    backend = "torch"
    array = "a torch.Tensor"
    integer_dtypes = frozenset(f"torch.{name}" for name in ("int64", "int32", "int16", "uint8", "int8"))

    def __init__(self, bundle: BundleReader, selection: Selection) -> None:
        super().__init__()
        self._describe(bundle, selection)
        architecture, hidden = bundle.architecture, bundle.architecture.hidden_size
        tied = selection.head and architecture.head.tied
        self.embedding = Embedding(architecture, embeds=self.embeds) if self.embeds or tied else None
        self.layers = nn.ModuleDict(
            {str(i): Layer(architecture.kind_of(i), hidden, i) for i in range(*selection.layers)}
        )
        self.head = Head(architecture) if selection.head else None

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"{self.name}, layers [{self.layer_range[0]}, {self.layer_range[1]})"

    @property
    def dtype(self) -> torch.dtype:
        """What this stage computes in."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where this stage computes."""
        return next(self.parameters()).device

    def _make_cache(self, batch_size: int, capacity: int) -> KVCache:
        return KVCache(self.architecture, self.layer_range, batch_size, capacity, self.device, self.dtype)

    def _info(self, array: object) -> ArrayInfo | None:
        if not isinstance(array, Tensor):
            return None
        return ArrayInfo(shape=tuple(array.shape), dtype=str(array.dtype), device=str(array.device))

    def _min_max(self, array: Tensor) -> tuple[int, int]:
        low, high = array.aminmax()
        return int(low), int(high)

    def _expected(self) -> ArrayInfo:
        return ArrayInfo(shape=(), dtype=str(self.dtype), device=str(self.device))

    def _other_dtype(self) -> str:
        return "Convert it with .to(stage.dtype), or open the stage with dtype="

    def _call(self, past: Sequence[int], count: Sequence[int], length: int) -> Positions:
        return Positions(past, count, length, self.device, self.dtype)

    def convert_call(self, call: Call) -> Positions:
        """A call of another stage, as this one wants it."""
        if isinstance(call, Positions) and call.device == self.device and call.dtype == self.dtype:
            return call
        return self._call(call.past, call.count, call.length)

    def over_numpy(self) -> NumpyStage:
        """Return a stage over this one that takes and gives numpy arrays in float32."""
        return NumpyStage(self)

    def _check_cache(self, cache: KVCache) -> None:
        if not isinstance(cache, KVCache) or cache.kind != (self.layer_range, self.dtype, self.device):
            expected = f"a cache of layers {self.layer_range} in {self.dtype} on {self.device}"
            own = isinstance(cache, KVCache)  # and not that of another backend
            got = "one of layers {} in {} on {}".format(*cache.kind) if own else type(cache).__name__
            self._refuse("input.cache", "cache", expected, got)

    def check_call(self, inputs: Tensor, call: Call, cache: KVCache | None, logits: LogitsWanted = "all") -> None:
        """The part of ``check`` that every stage of a pipeline has to see for itself."""
        super().check_call(inputs, call, cache, logits)
        tracked = cache is not None and torch.is_grad_enabled()
        if tracked and (inputs.requires_grad or any(p.requires_grad for p in self.parameters())):
            self._refuse("input.grad", "cache", "a call without gradients: use torch.no_grad()", "gradients enabled")

    def forward(
        self,
        inputs: Tensor,
        *,
        past: Rows | None = None,
        count: Rows | None = None,
        cache: KVCache | None = None,
        logits: LogitsWanted = "all",
        positions: Positions | None = None,
    ) -> Tensor:
        """Computes this stage for some tokens of each row.

        Row b's tokens are its first ``count[b]``; what follows is padding, and comes out as zeros.

        *Shape:* token ids (batch, sequence) of an integer dtype, or hidden (batch, sequence, hidden) of the
        stage's dtype -> hidden (batch, sequence, hidden), or logits (batch, k, vocab).

        Args:
            inputs: token ids for a stage that embeds, else the hidden states of the stage before.
            past: (batch) the positions that each row has behind it; by default 0. Needs a cache where it isn't 0.
            count: (batch) the tokens that each row brings; by default all of the sequence.
            cache: what ``cache()`` gave, to be extended by this call's tokens.
            logits: of which positions the last stage computes logits: "all", "last" (k = 1) or each row's last k,
                standing at the end; what a row lacks is zero.
            positions: what ``check`` gave for this call, in place of ``past`` and ``count``: checks nothing again.

        Raises:
            BundleError: ``input.*`` with the boundary's name, what was expected and what came.
        """
        length = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim > 1 else 0
        if positions is None:
            positions = self.check(inputs, past=past, count=count, cache=cache, logits=logits)
        # What is padding in every row isn't computed, and needs no room in a cache.
        x = self._compute(inputs[:, : positions.length], positions, cache, logits)
        short = length - positions.length if self.head is None or logits == "all" else 0
        return functional.pad(x, (0, 0, 0, short)) if short else x

    def _compute(self, x: Tensor, positions: Positions, cache: KVCache | None, logits: LogitsWanted) -> Tensor:
        if not any(positions.count):  # no row brings a token: there is nothing to compute, and nothing to attend to
            width = self.architecture.hidden_size if self.head is None else self.architecture.vocab_size
            kept = None if self.head is None else self._logits_wanted(logits)
            return torch.zeros(len(x), kept or x.shape[1], width, device=self.device, dtype=self.dtype)
        x = with_kernels_for(x, positions.dtype, self._through_layers, positions, cache)
        if cache is not None:
            cache.advance(positions)
        if self.head is None:
            return x.masked_fill(~positions.valid[..., None], 0) if positions.padded else x
        x, valid = _keep(x, positions, self._logits_wanted(logits))
        x = with_kernels_for(x, x.dtype, self.head, None if self.embedding is None else self.embedding.token.weight)
        return x if valid is None else x.masked_fill(~valid[..., None], 0)

    def _through_layers(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        if self.embeds:
            if self.embedding is None:
                raise RuntimeError("a stage that embeds was built without its embedding")
            x = self.embedding(x, positions)
        for layer in self.layers.values():
            x = layer(x, positions, cache)
        return x


def _keep(x: Tensor, positions: Positions, wanted: int | None) -> tuple[Tensor, Tensor | None]:
    """The hidden states that logits are wanted of, and which of them are tokens (None: all).

    *Shape:* (batch, sequence, hidden) -> (batch, k, hidden), (batch, k).
    """
    if wanted is None:
        return x, positions.valid if positions.padded else None
    if not positions.padded and wanted <= x.shape[1]:
        return x[:, -wanted:], None
    offsets = torch.arange(-wanted, 0, device=x.device)[None] + torch.tensor(positions.count, device=x.device)[:, None]
    index = offsets.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, index), offsets >= 0


def load_stages(
    bundle: BundleReader,
    selections: Sequence[Selection],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trainable: bool = False,
) -> list[Stage]:
    """Stages over mapped weights; a tensor that several of them need is one parameter. See ``Bundle.stage``."""
    target = compute_dtype(bundle, dtype)
    _check_device(device)
    mapped: dict[str, nn.Parameter] = {}
    loaded: set[str] = set()
    stages: list[Stage] = []
    for selection in selections:
        for unit in selection.units:
            if unit not in loaded:
                loaded.add(unit)
                for name, tensor in map_tensors(bundle, unit).items():
                    mapped[name] = nn.Parameter(rounded(tensor, target, name).to(device), requires_grad=trainable)
        stage = Stage(bundle, selection)
        _assign(stage, mapped)
        stages.append(stage)
    return stages


def _assign(stage: Stage, mapped: Mapping[str, nn.Parameter]) -> None:
    """``stage.load_state_dict(mapped, assign=True)``, whose detours would take a quarter of loading's time."""
    for prefix, module in stage.named_modules():
        for name, empty in module._parameters.items():
            if empty is not None:
                full = f"{prefix}.{name}"
                if mapped[full].shape != empty.shape:
                    raise RuntimeError(
                        f"{full}: {tuple(empty.shape)} in the architecture, {tuple(mapped[full].shape)} here"
                    )
                module._parameters[name] = mapped[full]


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device).sum().item()  # "meta" makes tensors and can't compute
    except (RuntimeError, AssertionError) as error:  # an unknown name, no driver, or a build without it
        got = f"{quoted(str(device))}: {str(error).splitlines()[0]}"
        raise BundleError(
            Problem(code="input.device", argument="device", expected="a device that torch has here", got=got)
        ) from error
