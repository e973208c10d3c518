"""Small helpers for training parts: boundaries, frozen parameters, losses over micro-batches, and tied weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.stage import Stage, unwrapped
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer

IGNORED = -100
"""The label of a position that has no loss. torch and transformers use the same number."""


class Boundary:
    """A hidden state that leaves one part of a model for another, and takes the gradient back.

        cut = boundary(bottom(token_ids))       # in one process
        loss = compute_loss(top(cut.hidden))
        loss.backward()
        cut.backward()

    Over a network, ``cut.hidden`` is sent, and ``cut.backward(gradient)`` takes what came back.
    """

    def __init__(self, hidden: Tensor) -> None:
        """Detach a hidden state.

        Args:
            hidden: what the part before the cut returned. *Shape:* (batch, sequence, hidden).

        Raises:
            BundleError: ``input.value`` if it is no tensor of a floating dtype.
        """
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            got = str(hidden.dtype) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise wrong_argument("hidden", "a hidden state, as a stage returns it", got)
        self._before, self._done = hidden, False
        self.hidden = hidden.detach().requires_grad_()
        """The same numbers, for the part after the cut. Its gradient is collected here."""

    @property
    def gradient(self) -> Tensor:
        """Return the gradient that the part after the cut left. It has the shape of ``hidden``.

        Raises:
            BundleError: ``input.grad`` if there is none yet.
        """
        if self.hidden.grad is None:
            expected, hint = "a gradient of this boundary", "Call backward() on the loss first"
            raise BundleError(Problem(code="input.grad", argument="hidden", expected=expected, got="none", hint=hint))
        return self.hidden.grad

    def backward(self, gradient: Tensor | None = None) -> None:
        """Hand the gradient to the part before the cut, whose parameters add it to theirs.

        Args:
            gradient: the gradient that came over the network; by default ``self.gradient``.

        Raises:
            BundleError: ``input.grad`` without a gradient; ``input.value`` for one of another shape or dtype.
        """
        if self._done:
            expected, hint = "one call", "Each boundary hands back one gradient: make a new one for the next batch"
            raise BundleError(
                Problem(code="input.grad", argument="hidden", expected=expected, got="a second", hint=hint)
            )
        given = self.gradient if gradient is None else gradient
        if given.shape != self._before.shape or given.dtype != self._before.dtype:
            expected = f"{self._before.dtype} {list(self._before.shape)}, as hidden has it"
            raise wrong_argument("gradient", expected, f"{given.dtype} {list(given.shape)}")
        self.hidden.grad, self._done = None, True
        if self._before.requires_grad:  # False if everything before the cut is frozen
            self._before.backward(given.to(self._before.device))  # type: ignore[no-untyped-call]


def boundary(hidden: Tensor) -> Boundary:
    """Detach a hidden state at a cut, so that its gradient can be handed back. See ``Boundary``.

    Args:
        hidden: the result of a trainable stage. *Shape:* (batch, sequence, hidden), of the stage's dtype.
    """
    return Boundary(hidden)


def freeze(*stages: nn.Module, but: Iterable[str] | None = None) -> None:
    """Let no parameter of some stages take gradients, except for those that are named.

    Args:
        stages: stages, pipelines, or parts of stages.
        but: the beginnings of names, such as ``"head"`` or ``"layers.5.mlp"``. They end where a dot is, or the name.
            Parameters whose names begin so take gradients.

    Raises:
        BundleError: ``input.value`` for a beginning that no parameter has, and for what is no module.
    """
    wanted = [but] if isinstance(but, str) else list(but or ())
    found: set[str] = set()
    chosen: dict[nn.Parameter, bool] = {}
    for module in _modules(stages):
        for name, parameter in module.named_parameters(remove_duplicate=False):
            own = [start for start in wanted if name == start or name.startswith(f"{start}.")]
            found.update(own)
            # A tied parameter has two names. One that is named is enough.
            chosen[parameter] = chosen.get(parameter, False) or bool(own)
    for start in wanted:
        if start not in found:
            known = sorted({name for m in _modules(stages) for name, _ in m.named_parameters()})
            raise wrong_argument(
                "but", f"the beginning of a parameter's name, such as {quoted(known[0])}", quoted(start)
            )
    for parameter, trains in chosen.items():
        parameter.requires_grad_(trains)


def label_count(labels: Tensor | Sequence[Tensor]) -> int:
    """Return the number of positions that have a loss, in one batch or in all micro-batches of a step.

    Args:
        labels: labels, or a list of those of all micro-batches. *Shape:* each (batch, sequence), int64: the token id
            after each position, or -100 where there is no loss.
    """
    each = [labels] if isinstance(labels, Tensor) else labels
    return sum(int((one != IGNORED).sum()) for one in each)


def next_labels(token_ids: Tensor, count: Tensor | Sequence[int] | None = None) -> Tensor:
    """Return the label of each position: the token after it, and -100 at the last token and at padding.

    *Shape:* (batch, sequence) -> the same.

    Args:
        token_ids: the token ids.
        count: the number of tokens of each row; by default the whole sequence.

    Raises:
        BundleError: ``input.value`` for another shape.
    """
    if not isinstance(token_ids, Tensor) or token_ids.ndim != 2 or token_ids.is_floating_point():
        got = list(token_ids.shape) if isinstance(token_ids, Tensor) else type(token_ids).__name__
        raise wrong_argument("token_ids", "integers of the shape (batch, sequence)", f"{got}")
    labels = functional.pad(token_ids[:, 1:].long(), (0, 1), value=IGNORED)
    if count is not None:
        if len(count) != len(token_ids):
            raise wrong_argument("count", f"a number for each of {len(token_ids)} rows", f"{len(count)}")
        last = torch.as_tensor(count, device=token_ids.device)[:, None] - 1
        labels = labels.masked_fill(torch.arange(labels.shape[1], device=labels.device)[None] >= last, IGNORED)
    return labels


def token_loss(logits: Tensor, labels: Tensor, tokens: int) -> Tensor:
    """Return a micro-batch's share of the mean cross-entropy over all tokens of a step.

    The shares of all micro-batches add up to the loss of the whole batch, and so do their gradients, however the batch
    is divided. The mean of the micro-batches' means would weigh tokens of short rows more.

    *Shape:* logits (batch, sequence, vocab), labels (batch, sequence) -> ().

    Args:
        logits: the logits of one micro-batch. The loss is computed in float32.
        labels: the token id after each position, or -100 where there is no loss, as ``next_labels`` returns them.
        tokens: ``label_count`` of all micro-batches of the step.

    Raises:
        BundleError: ``input.value`` if ``tokens`` is less than this micro-batch has, or zero; and for labels of another
            shape, or that no token has.
    """
    own, number = label_count(labels), as_integer(tokens)
    if number is None or number < max(own, 1):
        expected = f"label_count of all micro-batches, at least {max(own, 1)}"
        raise wrong_argument("tokens", expected, quoted(tokens))
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        expected = f"labels of the shape {list(logits.shape[:2])}, as logits have it"
        raise wrong_argument("labels", expected, f"{list(labels.shape)}")
    known = labels[labels != IGNORED]
    if own and not 0 <= int(known.min()) <= int(known.max()) < logits.shape[2]:
        raise wrong_argument(
            "labels", f"token ids from 0 to {logits.shape[2] - 1}", f"{int(known.min())} to {int(known.max())}"
        )
    flat = labels.flatten().long()
    summed = functional.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=IGNORED, reduction="sum")
    return summed / number


def tied_gradient(stage: nn.Module) -> Tensor:
    """Return the gradient of a tied token table in one of the two ends that hold it. *Shape:* (vocab, size).

    Send it to the process of the other end, which passes it to ``sum_tied_gradients``, and the other way round.

    Raises:
        BundleError: ``input.value`` for a stage without a tied table.
    """
    table = _tied_table(stage)
    return torch.zeros_like(table) if table.grad is None else table.grad


def sum_tied_gradients(stage: nn.Module, other: Tensor | nn.Module) -> None:
    """Add the other end's gradient of a tied token table to this end's, before the optimizer's step.

    A tied table is one parameter of the model, so its gradient is the sum of both. In one pipeline this happens by
    itself. If both ends start equal and take the same steps, they stay equal to the bit: a + b is b + a.

    Args:
        stage: this end.
        other: the other end's ``tied_gradient``; or the other end itself, which gets the sum, too.

    Raises:
        BundleError: ``input.value`` for a stage without a tied table, and for a gradient of another shape or dtype.
    """
    table = _tied_table(stage)
    if isinstance(other, nn.Module):
        theirs = _tied_table(other)
        if theirs is table:
            return
        given = tied_gradient(other)
        own = tied_gradient(stage).clone()
        sum_tied_gradients(other, own)
    else:
        given = other
    if not isinstance(given, Tensor) or given.shape != table.shape or given.dtype != table.dtype:
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise wrong_argument("other", f"a gradient of {table.dtype} {list(table.shape)}", got)
    given = given.to(table.device)
    table.grad = given.clone() if table.grad is None else table.grad + given


def _tied_table(stage: nn.Module) -> nn.Parameter:
    inner = unwrapped(stage)
    if inner is None or inner.embedding is None or not inner.architecture.head.tied:
        got = type(stage).__name__ if inner is None else f"{quoted(inner.name)}, which has none"
        raise wrong_argument("stage", "a stage with a tied token table: the first or the last one", got)
    table: nn.Parameter = inner.embedding.token.weight  # type: ignore[assignment]
    return table


def _modules(given: Sequence[nn.Module]) -> list[nn.Module]:
    """Return stages in place of pipelines, so that names begin as canonical names do."""
    found: list[nn.Module] = []
    for module in given:
        if not isinstance(module, nn.Module):
            raise wrong_argument("stages", "stages, pipelines, or parts of stages", type(module).__name__)
        within = getattr(module, "stages", None)
        for one in within if isinstance(within, nn.ModuleList) else [module]:
            inner: Stage | None = unwrapped(one)
            found.append(one if inner is None else inner)
    return found
