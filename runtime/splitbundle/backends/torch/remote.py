"""A stage of another machine, over tensors. Gradients cross the wire, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.numpy_stage import NumpyStage
from splitbundle.backends.torch.payloads import decode, encode
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.tensors import TensorStage
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format.fields import MAX_NUMBER, MIN_NUMBER
from splitbundle.integers import as_number
from splitbundle.remote.link import Link, RemoteCache
from splitbundle.remote.training import TrainingLink
from splitbundle.stages.call import Call
from splitbundle.stages.stage import LogitsWanted

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.remote.options import RemoteOptions
    from splitbundle.remote.peers import Peers
    from splitbundle.storage.reader import BundleReader


class RemoteStage(TensorStage, nn.Module):
    """A part of the model that a server computes. It is called like a stage of this machine.

    Its weights are on the server, so it has no parameters. If it is trainable, the gradient of a loss crosses it, and
    ``step`` moves the weights on the server.
    """

    takes_rows = True

    def __init__(
        self,
        bundle: BundleReader,
        selection: Selection,
        peers: Peers,
        options: RemoteOptions,
        *,
        device: str | torch.device | None = None,
        trainable: bool = False,
    ) -> None:
        """Connect to a server.

        Raises:
            BundleError: ``peer.*``; ``train.refused``.
        """
        super().__init__()
        self.describe(bundle, selection)
        self.link = Link(peers, options)
        welcome = self.link.welcome
        self._device = torch.empty(0, device=device).device
        self._dtype: torch.dtype = getattr(torch, welcome.dtype)
        self.training_link: TrainingLink | None = None
        if trainable:
            if not welcome.trainable:
                expected, got = "a server that trains", "one that only computes"
                raise BundleError(Problem(code="train.refused", argument=self.name, expected=expected, got=got))
            self.training_link = TrainingLink(peers, options, self.link.encoding, welcome.width)

    @property
    def device(self) -> torch.device:
        """Return the device on which this stage takes and returns tensors."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which the server computes."""
        return self._dtype

    def extra_repr(self) -> str:
        """Return the name and the layer range for ``repr``."""
        return f"{self.name}, layers [{self.layer_range[0]}, {self.layer_range[1]}), on a server"

    def over_numpy(self) -> NumpyStage:
        """Return a stage that wraps this one, and that takes and returns numpy arrays in float32."""
        return NumpyStage(self)

    @property
    def where(self) -> str:
        """Return the addresses of the servers."""
        return self.link.where

    def _make_cache(self, batch_size: int, capacity: int) -> RemoteCache:
        return RemoteCache(self.architecture, self.layer_range, batch_size, capacity)

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, RemoteCache) or cache.layers != self.layer_range:
            expected = f"a cache of layers {self.layer_range} on a server"
            got = f"one of layers {cache.layers}" if isinstance(cache, RemoteCache) else type(cache).__name__
            self._refuse("input.cache", "cache", expected, got)

    def check_call(self, inputs: Any, call: Call, cache: Any, logits: LogitsWanted = "all") -> None:
        """Check what each stage of a pipeline must check itself. ``check`` does this too."""
        super().check_call(inputs, call, cache, logits)
        tracked = torch.is_grad_enabled() and cache is not None
        if tracked and (self.training_link is not None or (isinstance(inputs, Tensor) and inputs.requires_grad)):
            self._refuse("input.grad", "cache", "a call without gradients: use torch.no_grad()", "gradients enabled")

    def forward(
        self,
        inputs: Tensor,
        *,
        past: Any = None,
        count: Any = None,
        cache: RemoteCache | None = None,
        logits: LogitsWanted = "all",
        rows: Any = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Compute the stage on a server. Arguments, results and errors are those of a stage of this machine.

        *Shape:* hidden (batch, sequence, hidden) of the stage's dtype -> the same.

        Args:
            inputs: hidden states.
            past: for each row, the number of earlier tokens in the cache; by default 0.
            count: for each row, the number of its tokens in this call; by default all.
            cache: a cache of this stage, or None.
            logits: ignored: a remote stage has no head.
            rows: for each row of the call, the row of the cache that it is; by default the same one.
            positions: in place of ``past``, ``count`` and ``rows``, a call that was checked, from a pipeline.

        Raises:
            BundleError: ``peer.unreachable`` if no server answers in time; ``input.grad`` for an input that needs a
                gradient from a stage that isn't trainable; ``wire.value``; ``train.lost``; ``input.*``.
        """
        if positions is None:
            positions = self.check(inputs, past=past, count=count, cache=cache, logits=logits, rows=rows)
        x = inputs[:, : positions.length]
        if not any(positions.count):
            result = torch.zeros_like(x)
        elif torch.is_grad_enabled() and (self.training_link is not None or x.requires_grad):
            if self.training_link is None:
                expected, got = "a trainable stage, for an input that needs a gradient", "one that only computes"
                self._refuse("input.grad", "hidden", expected, got)
            # Without an input that needs gradients, the server's own parameters still do.
            needs = torch.zeros((), requires_grad=True)
            result = _Crossing.apply(x, needs, self, tuple(positions.count))  # type: ignore[no-untyped-call]
        else:
            result = self._compute(x, positions, cache)
        short = inputs.shape[1] - positions.length
        return functional.pad(result, (0, 0, 0, short)) if short else result

    def _compute(self, x: Tensor, positions: Positions, cache: RemoteCache | None) -> Tensor:
        pieces = self.link.pieces(positions, cache)
        parts = [self._piece(x[:, start : start + each.length], each, cache) for start, each in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _piece(self, x: Tensor, call: Call, cache: RemoteCache | None) -> Tensor:
        encoding = self.link.encoding
        payload = self.link.run(call, encode(x, call.count, encoding), cache, call.length)
        if cache is not None:
            cache.advance(call)
        return self._decoded(payload, call.count, call.length)

    def _decoded(self, payload: memoryview, count: Any, length: int) -> Tensor:
        made = decode(payload, self.link.encoding, count, length, self.link.welcome.width)
        return made.to(self.device, self.dtype)

    def step(self, learning_rate: float | None = None) -> int:
        """Move the weights on the server by the gradients that were sent since the last step.

        Call it before the optimizers of the other parts take their step: if it fails, no weight has moved.

        Args:
            learning_rate: the learning rate of this step and the following ones; by default the server's.

        Returns:
            The number of the step, which counts all steps that the server's weights have taken.

        Raises:
            BundleError: ``train.lost`` if the server was lost before it moved them; ``train.refused`` for a stage that
                isn't trainable; ``peer.*``.
        """
        if self.training_link is None:
            raise BundleError(
                Problem(code="train.refused", argument=self.name, expected="a trainable stage", got="another one")
            )
        rate = None if learning_rate is None else as_number(learning_rate)
        if learning_rate is not None and (rate is None or not MIN_NUMBER <= rate <= MAX_NUMBER):
            expected = f"a number from {MIN_NUMBER:g} to {MAX_NUMBER:g}; to leave the weights as they are, zero_grad()"
            raise wrong_argument("learning_rate", expected, quoted(learning_rate))
        return self.training_link.step(None if rate is None else float(rate))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients on the server. ``set_to_none`` is there because modules of torch have it.

        Raises:
            BundleError: ``peer.*``.
        """
        if self.training_link is not None:
            self.training_link.discard()


class _Crossing(torch.autograd.Function):
    """A stage of a server as a function with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, needs: Tensor, stage: RemoteStage, count: tuple[int, ...]) -> Tensor:
        link = stage.training_link
        if link is None:
            raise RuntimeError("a stage that isn't trainable has no gradient")
        ctx.stage, ctx.count, ctx.length = stage, count, x.shape[1]
        ctx.ticket, payload = link.forward(encode(x, count, stage.link.encoding), count, x.shape[1])
        return stage._decoded(payload, count, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        stage: RemoteStage = ctx.stage
        if stage.training_link is None:
            raise RuntimeError("a stage that isn't trainable has no gradient")
        if getattr(ctx, "used", False):  # the parts here would count it twice, and the server once
            expected, got = "one gradient for each forward call", "a second one"
            raise BundleError(Problem(code="train.ticket", argument=stage.name, expected=expected, got=got))
        ctx.used = True
        parts = encode(gradients[0], ctx.count, stage.link.encoding)
        payload = stage.training_link.backward(ctx.ticket, sum(ctx.count), parts)
        return stage._decoded(payload, ctx.count, ctx.length), None, None, None
