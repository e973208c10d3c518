"""A stage: a shard, or any layer range, loaded and ready to compute with torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.torch_decoder import Embedding, Head, Layer
from splitbundle.torch_positions import KVCache, Positions
from splitbundle.torch_weights import compute_dtype, map_tensors, rounded

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle, Selection

Rows = Sequence[int] | Tensor
"""An integer for each row."""
LogitsWanted = Literal["all", "last"] | int


class Stage(nn.Module):
    """A part of the model. Its parameters bear the canonical names, with global layer numbers.

    The first stage takes token ids, the others ``hidden``; the last one gives logits, the others ``hidden``.
    """

    def __init__(self, bundle: Bundle, selection: Selection) -> None:
        super().__init__()
        architecture = bundle.architecture
        self.name = selection.name
        self.fingerprint = bundle.fingerprint
        """Of the model that the weights came from; training doesn't change it."""
        self.layer_range = selection.layers
        self.architecture = architecture
        tied = selection.head and architecture.head.tied
        self.embeds = selection.embeds
        self.embedding = Embedding(architecture, embeds=self.embeds) if self.embeds or tied else None
        hidden = architecture.hidden_size
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

    def cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty KV cache for this stage's layers.

        Raises:
            BundleError: ``session.capacity`` for more positions than the model has.
        """
        if type(batch_size) is not int or batch_size < 1:
            expected, got = "a number from 1", quoted(batch_size)
            raise BundleError(Problem(code="input.value", argument="batch_size", expected=expected, got=got))
        limit = self.architecture.position_limit
        if type(capacity) is not int or not 1 <= capacity <= (limit or capacity):
            expected = f"1 to {limit}, the positions of the model" if limit else "at least 1"
            raise BundleError(
                Problem(code="session.capacity", argument="capacity", expected=expected, got=quoted(capacity))
            )
        try:
            return KVCache(self.architecture, self.layer_range, batch_size, capacity, self.device, self.dtype)
        except (RuntimeError, MemoryError) as error:  # torch's allocators raise either, and nothing more precise
            expected, got = "slots that memory can hold", f"{capacity} in {batch_size} rows: {str(error)[:100]}"
            raise BundleError(
                Problem(code="session.capacity", argument="capacity", expected=expected, got=got)
            ) from error

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

    def check(
        self,
        inputs: Tensor,
        *,
        past: Rows | None = None,
        count: Rows | None = None,
        cache: KVCache | None = None,
        logits: LogitsWanted = "all",
    ) -> Positions:
        """Whether a call can be computed, and its positions. Nothing is written, so no refusal changes a cache.

        Arguments and errors are those of a call.
        """
        self._check_inputs(inputs)
        batch, length = inputs.shape[:2]
        before = self._rows("past", past, batch, 0, 0, 2**31)
        brought = self._rows("count", count, batch, length, 0, length)
        if cache is None and any(before):
            self._refuse("input.position", "past", "0 for every row without a cache", quoted(before))
        positions = Positions(before, brought, max(1, *brought), self.device, self.dtype)
        limit = self.architecture.position_limit
        if self.embeds and limit is not None and positions.stop > limit:
            expected = f"at most {limit}, the positions of the model"
            self._refuse("input.position", "past + count", expected, f"{positions.stop}")
        self.check_call(inputs, positions, cache, logits)
        return positions

    def check_call(
        self, inputs: Tensor, positions: Positions, cache: KVCache | None, logits: LogitsWanted = "all"
    ) -> None:
        """The part of ``check`` that every stage of a pipeline has to see for itself."""
        if cache is not None:
            if cache.kind != (self.layer_range, self.dtype, self.device):
                expected = f"a cache of layers {self.layer_range} in {self.dtype} on {self.device}"
                self._refuse("input.cache", "cache", expected, "one of layers {} in {} on {}".format(*cache.kind))
            cache.check(positions)
            if torch.is_grad_enabled() and (inputs.requires_grad or any(p.requires_grad for p in self.parameters())):
                self._refuse(
                    "input.grad", "cache", "a call without gradients: use torch.no_grad()", "gradients enabled"
                )
        if self.head is not None:
            self._logits_wanted(logits)

    def _compute(self, x: Tensor, positions: Positions, cache: KVCache | None, logits: LogitsWanted) -> Tensor:
        if not any(positions.count):  # no row brings a token: there is nothing to compute, and nothing to attend to
            width = self.architecture.hidden_size if self.head is None else self.architecture.vocab_size
            kept = None if self.head is None else self._logits_wanted(logits)
            return torch.zeros(len(x), kept or x.shape[1], width, device=self.device, dtype=self.dtype)
        if self.embeds:
            if self.embedding is None:
                raise RuntimeError("a stage that embeds was built without its embedding")
            x = self.embedding(x, positions)
        for layer in self.layers.values():
            x = layer(x, positions, cache)
        if cache is not None:
            cache.advance(positions)
        if self.head is None:
            return x.masked_fill(~positions.valid[..., None], 0) if positions.padded else x
        x, valid = _keep(x, positions, self._logits_wanted(logits))
        x = self.head(x, None if self.embedding is None else self.embedding.token.weight)
        return x if valid is None else x.masked_fill(~valid[..., None], 0)

    def _logits_wanted(self, logits: LogitsWanted) -> int | None:
        if logits == "all":
            return None
        if logits == "last":
            return 1
        if type(logits) is not int or logits < 1:
            self._refuse("input.value", "logits", '"all", "last" or a number from 1', quoted(logits))
        return logits

    def _check_inputs(self, inputs: object) -> None:
        name = "token ids" if self.embeds else f"hidden at layer {self.layer_range[0]}"
        if not isinstance(inputs, Tensor):
            self._refuse("input.type", name, "a torch.Tensor", type(inputs).__name__)
        if inputs.device != self.device:
            hint = "Move it with .to(...), or open the stage with device="
            self._refuse("input.device", name, f"{self.device}, where this stage is", str(inputs.device), hint)
        if self.embeds:
            if inputs.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
                self._refuse("input.dtype", name, "an integer dtype", str(inputs.dtype))
            if inputs.ndim != 2 or 0 in inputs.shape:
                self._refuse("input.shape", name, "(batch, sequence), neither 0", str(tuple(inputs.shape)))
            low, high = (int(bound) for bound in inputs.aminmax())
            if low < 0 or high >= self.architecture.vocab_size:
                got = str(low if low < 0 else high)
                self._refuse("input.value", name, f"ids from 0 to {self.architecture.vocab_size - 1}", got)
        else:
            if inputs.dtype != self.dtype:
                hint = "Convert it with .to(stage.dtype), or open the stage with dtype="
                self._refuse("input.dtype", name, f"{self.dtype}, as this stage computes", str(inputs.dtype), hint)
            width = self.architecture.hidden_size
            if inputs.ndim != 3 or 0 in inputs.shape or inputs.shape[2] != width:
                hint = "It must be what the stage before gave, of the same model"
                self._refuse("input.shape", name, f"(batch, sequence, {width})", str(tuple(inputs.shape)), hint)

    def _rows(self, name: str, given: Rows | None, batch: int, default: int, low: int, high: int) -> list[int]:
        if given is None:
            return [default] * batch
        if isinstance(given, Tensor) and (given.is_floating_point() or given.ndim != 1):
            self._refuse("input.dtype", name, "(batch) of an integer dtype", f"{given.dtype} {tuple(given.shape)}")
        values = given.tolist() if isinstance(given, Tensor) else list(given)
        if len(values) != batch:
            self._refuse("input.shape", name, f"{batch} rows, as the tokens", f"{len(values)}")
        if not all(type(value) is int and low <= value <= high for value in values):
            self._refuse("input.value", name, f"integers from {low} to {high}", quoted(values))
        return values

    def _refuse(self, code: str, argument: str, expected: str, got: str, hint: str | None = None) -> NoReturn:
        where = f"stage {self.name}, {argument}"
        raise BundleError(Problem(code=code, argument=where, expected=expected, got=got, hint=hint))


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
    bundle: Bundle,
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
        wanted = stage.state_dict(keep_vars=True)
        stage.load_state_dict({name: mapped[name] for name in wanted}, assign=True)
        stages.append(stage.requires_grad_(trainable))
    return stages


def _check_device(device: str | torch.device | None) -> None:
    try:
        torch.empty(0, device=device).sum().item()  # "meta" makes tensors and can't compute
    except (RuntimeError, AssertionError) as error:  # an unknown name, no driver, or a build without it
        got = f"{quoted(str(device))}: {str(error).splitlines()[0]}"
        raise BundleError(
            Problem(code="input.device", argument="device", expected="a device that torch has here", got=got)
        ) from error
