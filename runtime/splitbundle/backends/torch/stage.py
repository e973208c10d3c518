"""A stage that computes with torch: a loaded shard, or any loaded layer range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from splitbundle.backends.torch import kernel_choice
from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.decoder import Embedding, Head, Layer
from splitbundle.backends.torch.dropout import parse_dropout, set_dropout
from splitbundle.backends.torch.joint import join
from splitbundle.backends.torch.kernels import with_kernels_for
from splitbundle.backends.torch.numpy_stage import NumpyStage
from splitbundle.backends.torch.one_token import Steps, through_layers
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.quantized_modules import Codes
from splitbundle.backends.torch.quantized_stages import is_code, use_quantized
from splitbundle.backends.torch.tensors import TensorStage
from splitbundle.backends.torch.threads import Ways, checked
from splitbundle.backends.torch.weights import MappedTensors, assign, check_device, compute_dtype, map_tensors, rounded
from splitbundle.errors import BundleError, Problem
from splitbundle.format.weight_layout import SCALE
from splitbundle.stages.call import Call
from splitbundle.stages.stage import LogitsWanted

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.storage.reader import BundleReader

Rows = Sequence[int] | Tensor
"""One integer for each row."""


class Stage(TensorStage, nn.Module):
    """A part of the model. Its parameters have the canonical names, with global layer numbers.

    The first stage takes token ids, and the others take ``hidden``. The last stage returns logits, and the others
    return ``hidden``.
    """

    takes_rows = True
    integer_dtypes = frozenset(f"torch.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

    kernels: kernel_choice.Choice | None = None
    """The kernels that multiply a few rows by weights; None for those that were measured as the fastest here."""
    checkpoint_activations = False
    """Whether a call with gradients keeps only the input of each layer, and computes the layer again for gradients."""
    threads: int | None = None
    """The number of threads that compute a call; None for torch's, but no more than this process may use."""

    quantized = False
    """Whether some weights are codes."""

    def __init__(self, bundle: BundleReader, selection: Selection) -> None:
        super().__init__()
        self.describe(bundle, selection)
        architecture, hidden = bundle.architecture, bundle.architecture.hidden_size
        tied = selection.head and architecture.head.tied
        self.embedding = Embedding(architecture, embeds=self.embeds) if self.embeds or tied else None
        self.layers = nn.ModuleDict(
            {str(i): Layer(architecture.kind_of(i), hidden, i) for i in range(*selection.layers)}
        )
        self.head = Head(architecture) if selection.head else None
        self._ways = Ways()
        self.one_token = Steps()
        """The steps of the layers for one token. A stage that is loaded for computing alone has them."""

    def extra_repr(self) -> str:
        """Return the name and the layer range for ``repr``."""
        return f"{self.name}, layers [{self.layer_range[0]}, {self.layer_range[1]})"

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which this stage computes."""
        found = _first_parameter(self, lambda name, own: own.is_floating_point() and not name.endswith(SCALE))
        if found is not None:
            return found.dtype
        return next(module.dtype for module in self.modules() if isinstance(module, Codes))

    @property
    def device(self) -> torch.device:
        """Return the device on which this stage computes."""
        found = _first_parameter(self, lambda name, own: True)
        device = torch.device("cpu") if found is None else found.device
        if device.type != "meta":
            return device
        # accelerate keeps the weights of an offloaded stage elsewhere, and fetches them for each module's call.
        for module in self.modules():
            target = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if target is not None:
                return torch.device(target)
        return device

    def _make_cache(self, batch_size: int, capacity: int) -> KVCache:
        return KVCache(self.architecture, self.layer_range, batch_size, capacity, self.device, self.dtype)

    def add_lora(
        self,
        rank: int,
        alpha: float,
        targets: Sequence[str] = ("attention.query", "attention.value"),
        *,
        dropout: float = 0.0,
        rslora: bool = False,
    ) -> list[str]:
        """Give linear layers an adapter (LoRA), and let nothing else take gradients.

        Args:
            rank: the rank of the adapters.
            alpha: the scaling is alpha / rank, or alpha / √rank with ``rslora``.
            targets: the layers: canonical names such as ``"layers.3.mlp.up"``, names of the source such as
                ``"c_attn"``, or the ends of such names, which mean all layers that have them.
            dropout: the share of the adapter's inputs that are dropped in training mode.
            rslora: whether to use rank-stabilized scaling.

        Returns:
            The canonical names of the layers.

        Raises:
            BundleError: ``input.value`` for a target that no layer of this stage has, or a number out of range.
        """
        from splitbundle.backends.torch.training.lora import add_lora

        return add_lora(self, rank, alpha, targets, dropout=dropout, rslora=rslora)

    def merge_lora(self) -> list[str]:
        """Fold all adapters into the weights of their layers, which are plain layers again. Return their names."""
        from splitbundle.backends.torch.training.lora import merge_lora

        return merge_lora(self)

    def over_numpy(self) -> NumpyStage:
        """Return a stage that wraps this one, and that takes and returns numpy arrays in float32."""
        return NumpyStage(self)

    def _check_cache(self, cache: KVCache) -> None:
        if not isinstance(cache, KVCache) or cache.kind != (self.layer_range, self.dtype, self.device):
            expected = f"a cache of layers {self.layer_range} in {self.dtype} on {self.device}"
            own = isinstance(cache, KVCache)  # False for a cache of another backend
            got = "one of layers {} in {} on {}".format(*cache.kind) if own else type(cache).__name__
            self._refuse("input.cache", "cache", expected, got)

    def check_call(self, inputs: Tensor, call: Call, cache: KVCache | None, logits: LogitsWanted = "all") -> None:
        """Check what each stage of a pipeline must check itself. ``check`` does this too."""
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
        rows: Rows | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Compute this stage for some tokens of each row.

        The tokens of row b are its first ``count[b]``. The rest is padding, and its results are zeros.

        *Shape:* token ids (batch, sequence) of an integer dtype, or hidden (batch, sequence, hidden) of the
        stage's dtype -> hidden (batch, sequence, hidden), or logits (batch, k, vocab).

        Args:
            inputs: token ids for a stage that embeds, else the hidden states from the stage before.
            past: (batch) the number of earlier positions of each row; by default 0. Any other value needs a cache.
            count: (batch) the number of tokens of each row in this call; by default the whole sequence.
            cache: a cache from ``cache()``. This call adds its tokens to the cache.
            logits: the positions for which the last stage computes logits: "all", "last" (k = 1), or an integer k for
                the last k of each row. A row with fewer tokens starts with zeros.
            rows: (batch) the rows of the cache that this call computes: its row i is the cache's row ``rows[i]``.
                They are distinct numbers from 0 in any order; by default all rows in order. The other rows stay as
                they are, and cost no time.
            positions: the result of ``check`` for this call. It replaces ``past``, ``count`` and ``rows``, and the
                call is not checked again.

        Raises:
            BundleError: ``input.*`` with the name of the boundary, the expected value and the given one.
        """
        length = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim > 1 else 0
        if positions is None:
            positions = self.check(inputs, past=past, count=count, cache=cache, logits=logits, rows=rows)
        # Positions that are padding in every row are not computed, and need no slots in a cache.
        threads: AbstractContextManager[None] = nullcontext()
        if not torch.compiler.is_compiling():
            # With pinned kernels, the number of threads stays: another one could change the last bits.
            steady, tokens = self.kernels is not None, inputs.shape[0] * positions.length
            threads = self._ways.using(self.threads, tokens, steady=steady)
        with threads:
            x = self._compute(inputs[:, : positions.length], positions, cache, logits)
        short = length - positions.length if self.head is None or logits == "all" else 0
        return functional.pad(x, (0, 0, 0, short)) if short else x

    def _is_traced(self) -> bool:
        return torch.compiler.is_compiling()

    def _compute(self, x: Tensor, positions: Positions, cache: KVCache | None, logits: LogitsWanted) -> Tensor:
        if not any(positions.count):  # no row has a token: there is nothing to compute or to attend to
            width = self.architecture.hidden_size if self.head is None else self.architecture.vocab_size
            kept = None if self.head is None else self._logits_wanted(logits)
            return torch.zeros(len(x), kept or x.shape[1], width, device=self.device, dtype=self.dtype)
        positions = positions if cache is None else cache.arrange(positions)
        x = with_kernels_for(
            x, positions.dtype, self.kernels, self._through_layers, positions, cache, codes=self.quantized
        )
        if cache is not None:
            cache.advance(positions)
        if self.head is None:
            return x.masked_fill(~positions.valid[..., None], 0) if positions.padded else x
        x, valid = _keep(x, positions, self._logits_wanted(logits))
        x = with_kernels_for(x, x.dtype, self.kernels, self._through_head, codes=self.quantized)
        return x if valid is None else x.masked_fill(~valid[..., None], 0)

    def _through_layers(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        if self.embeds:
            if self.embedding is None:
                raise RuntimeError("a stage that embeds was built without its embedding")
            x = self.embedding(x, positions)
        token = through_layers(self.layers, self.one_token, x, positions, cache)
        if token is not None:
            return token
        for layer in self.layers.values():
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(self._through_layer, layer, x, positions, use_reentrant=False)
            else:
                x = layer(x, positions, cache)
        return x

    def _through_layer(self, layer: Layer, x: Tensor, positions: Positions) -> Tensor:
        """Compute a layer, perhaps for the second time, in the backward pass, which needs the same kernels again."""
        return with_kernels_for(x, positions.dtype, self.kernels, layer, positions, None, codes=self.quantized)

    def _through_head(self, x: Tensor) -> Tensor:
        if self.head is None:
            raise RuntimeError("this stage has no head")
        if self.embedding is None:
            return self.head(x, None)  # type: ignore[no-any-return]
        token = self.embedding.token
        hook = getattr(token, "_hf_hook", None) if token.weight.is_meta else None
        if hook is None:
            return self.head(x, token if isinstance(token, Codes) else token.weight)  # type: ignore[no-any-return]
        # The table is offloaded by accelerate, which fetches it when the table is called. A tied head only reads it.
        hook.pre_forward(token)
        try:
            return self.head(x, token.weight)  # type: ignore[no-any-return]
        finally:
            hook.post_forward(token, None)


def unwrapped(module: object) -> Stage | None:
    """Return the stage inside of wrappers, such as ``DistributedDataParallel``, or None if there is none."""
    inner: Any = module
    while inner is not None and not isinstance(inner, Stage):
        # These are the names of DistributedDataParallel and FullyShardedDataParallel, and of torch.compile.
        below = getattr(inner, "module", None)
        inner = getattr(inner, "_orig_mod", None) if below is None else below
    return inner


def stages_in(given: Any) -> list[Stage]:
    """Return the stages that a caller gave: one, several, or a pipeline, each perhaps in a wrapper.

    Raises:
        BundleError: ``input.value`` for anything else.
    """
    within = getattr(given, "stages", given)  # those of a pipeline
    found: list[Stage] = []
    for module in within if isinstance(within, list | tuple | nn.ModuleList) else [within]:
        stage = unwrapped(module)
        if stage is None:
            expected, got = "torch stages, or a pipeline of them", type(module).__name__
            raise BundleError(Problem(code="input.value", argument="stages", expected=expected, got=got))
        found.append(stage)
    return found


def _first_parameter(module: nn.Module, wanted: Callable[[str, Tensor], bool]) -> nn.Parameter | None:
    """Return the first parameter of a module, in the order of ``named_parameters``, whose own name and values suit.

    Each call of a stage asks for it, and the generators of ``named_parameters`` take several times as long.
    """
    for name, parameter in module._parameters.items():
        if parameter is not None and wanted(name, parameter):
            return parameter
    for part in module._modules.values():
        found = None if part is None else _first_parameter(part, wanted)
        if found is not None:
            return found
    return None


def _keep(x: Tensor, positions: Positions, wanted: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the hidden states that need logits, and a mask that is True for tokens (None: all are tokens).

    *Shape:* (batch, sequence, hidden) -> (batch, k, hidden), (batch, k).
    """
    if wanted is None:
        return x, positions.valid if positions.padded else None
    if not positions.padded and wanted <= x.shape[1]:
        return x[:, -wanted:], None
    offsets = torch.arange(-wanted, 0, device=x.device)[None] + torch.tensor(positions.count, device=x.device)[:, None]
    index = offsets.clamp(min=0)[..., None].expand(len(x), -1, x.shape[2])
    return x.gather(1, index), offsets >= 0


def load_stages(
    bundle: BundleReader,
    selections: Sequence[Selection],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trainable: bool = False,
    threads: int | None = None,
    kernels: str | None = None,
    checkpoint_activations: bool = False,
    dropout: Mapping[str, float] | str | None = None,
) -> list[Stage]:
    """Load stages over mapped weights. Stages share one parameter for a common tensor. See ``Bundle.stage``."""
    target = compute_dtype(bundle, dtype)
    check_device(device)
    number = checked(threads)
    rates = parse_dropout(dropout, trainable, bundle.manifest.model.dropout)
    if kernels is None:
        # With gradients, torch's own kernels compute. So a trainable stage uses them without gradients, too.
        choice = kernel_choice.PINNED if trainable else kernel_choice.from_environment()
    else:
        choice = kernel_choice.parse(kernels)
    with torch.inference_mode(False):  # a parameter that is made in inference mode could never be trained or changed
        stages = _load(bundle, selections, device, target, trainable)
    for stage in stages:
        stage.kernels, stage.threads, stage.checkpoint_activations = choice, number, checkpoint_activations
        set_dropout(stage, rates)
    return stages


def _load(
    bundle: BundleReader,
    selections: Sequence[Selection],
    device: str | torch.device | None,
    dtype: torch.dtype,
    trainable: bool,
) -> list[Stage]:
    mapped: dict[str, nn.Parameter] = {}
    tensors = MappedTensors()
    loaded: set[str] = set()
    stages: list[Stage] = []
    for selection in selections:
        for unit in selection.units:
            if unit not in loaded:
                loaded.add(unit)
                found = map_tensors(bundle, unit)
                tensors.include(found)
                for name, tensor in found.items():
                    # The correction of a router is for choosing alone, so no gradient reaches it.
                    learns = trainable and not name.endswith("router.correction")
                    if is_code(name, tensor):  # codes and scales of quantized weights are as they are
                        value, learns = tensor, False
                    else:
                        value = rounded(tensor, dtype, name)
                    mapped[name] = nn.Parameter(value.to(device), requires_grad=learns)
        stage = Stage(bundle, selection)
        use_quantized(stage, bundle.manifest.storage, dtype)
        assign(stage, mapped)
        if not trainable:
            join(stage.layers, tensors)
            stage.one_token = Steps(stage.layers)
        stages.append(stage)
    return stages
