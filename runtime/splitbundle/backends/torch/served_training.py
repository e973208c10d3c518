"""The training of a stage for a client: forward, backward and the optimizer's step, each by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.backends.torch.stage import Stage
from splitbundle.backends.torch.threads import using
from splitbundle.backends.torch.training.checkpoints import Checkpoints
from splitbundle.errors import BundleError, Problem, wrong_argument

OPTIMIZERS: Final[Mapping[str, type[torch.optim.Optimizer]]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class ServedTraining:
    """The optimizer of a stage, and the checkpoints of its steps."""

    def __init__(
        self,
        stage: Stage,
        *,
        optimizer: str = "adamw",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        checkpoints: str | os.PathLike[str] | None = None,
    ) -> None:
        """Make the optimizer, and go on from the last checkpoint, if there is one.

        Args:
            stage: a trainable stage, perhaps with a LoRA.
            optimizer: ``"adamw"`` or ``"sgd"``.
            learning_rate: the learning rate of the first step. A client may give another one.
            weight_decay: the weight decay.
            checkpoints: the directory of checkpoints, of which each step writes one; None for none.

        Raises:
            BundleError: ``input.value`` for an unknown optimizer, or a stage without parameters that learn; the errors
                of ``Checkpoints.load``.
        """
        if optimizer not in OPTIMIZERS:
            raise wrong_argument("optimizer", " or ".join(OPTIMIZERS), ascii(optimizer))
        learns = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        if not learns:
            raise wrong_argument("stage", "a stage with parameters that take gradients", "none of them does")
        self.stage, self.number = stage, 0
        self.optimizer: torch.optim.Optimizer = OPTIMIZERS[optimizer](  # type: ignore[call-arg]
            learns, lr=learning_rate, weight_decay=weight_decay
        )
        self._checkpoints = None if checkpoints is None else Checkpoints(checkpoints)
        if self._checkpoints is not None:
            resumed = self._checkpoints.load(stage, self.optimizer)
            if resumed is None:  # a step that can't be written goes back to this one
                self._checkpoints.save(0, stage, self.optimizer)
            else:
                self.number = resumed.step

    def forward(self, hidden: Tensor, count: Sequence[int]) -> tuple[Tensor, Any]:
        """Compute the stage with gradients, and return the result and what ``backward`` needs.

        *Shape:* (batch, sequence, hidden) -> the same.
        """
        if not self.stage.training:
            self.stage.train()
        with torch.enable_grad():
            given = hidden.detach().requires_grad_()
            result = self.stage(given, count=count)
        return result.detach(), (given, result)

    def backward(self, kept: Any, gradient: Tensor) -> Tensor:
        """Add to the gradients of the parameters, and return the gradient for the input.

        *Shape:* (batch, sequence, hidden) -> the same.
        """
        given, result = kept
        if not result.requires_grad:  # no row had a token, so nothing was computed
            return torch.zeros_like(given)
        with using(self.stage.threads):
            result.backward(gradient)
        return given.grad  # type: ignore[no-any-return]

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, learning_rate: float | None) -> None:
        """Move the weights once, and write the checkpoint of the step.

        Raises:
            BundleError: ``train.value`` for gradients that aren't finite, which would spoil the weights for good;
                ``output.*`` if the checkpoint can't be written. Then the weights are as they were.
        """
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not all(bool(torch.isfinite(p.grad).all()) for p in learning if p.grad is not None):
            expected, got = "finite gradients", "NaN or infinity"
            hint = "No weight has moved: drop the gradients of the other parts, and go on with the next batch"
            raise BundleError(Problem(code="train.value", argument="step", expected=expected, got=got, hint=hint))
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        with using(self.stage.threads):
            self.optimizer.step()
        if self._checkpoints is not None:
            try:
                self._checkpoints.save(self.number + 1, self.stage, self.optimizer)
            except BundleError:
                self._checkpoints.load(self.stage, self.optimizer, step=self.number)
                raise
        self.discard()
        self.number += 1
