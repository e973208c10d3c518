"""The state of an optimizer in a checkpoint: its parameters, and whether it fits the optimizer of another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from splitbundle.backends.torch.training.checkpoint_files import Found
from splitbundle.backends.torch.training.state_tree import encode
from splitbundle.errors import BundleError, Problem, quoted


def _names(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of an optimizer's parameters in its order.

    Raises:
        BundleError: ``input.value`` for one that no stage has.
    """
    known = {id(parameter): name for name, parameter in parameters.items()}
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(own):
        if id(parameter) not in known:
            got = f"its number {i}, of the shape {list(parameter.shape)}, which isn't"
            expected = "parameters of the given stages"
            raise BundleError(Problem(code="input.value", argument="optimizer", expected=expected, got=got))
    return [known[id(parameter)] for parameter in own]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the state of an optimizer as JSON, with the names of its parameters. Add its tensors to ``tensors``.

    Raises:
        BundleError: ``input.value``.
    """
    state = optimizer.state_dict()
    return {
        "class": type(optimizer).__name__,
        "parameters": _names(optimizer, parameters),
        "state": encode(dict(state), "optimizer", tensors),
    }


def check_optimizer(
    found: Found, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Any]:
    """Return the stored state of an optimizer of the same class with the same parameters."""
    stored = found.state["optimizer"]
    if not isinstance(stored, dict) or stored.keys() != {"class", "parameters", "state"}:
        raise found.refuse("optimizer", "an object with class, parameters and state", quoted(stored))
    found.check("optimizer", type(optimizer).__name__, stored["class"])
    found.check("optimizer", _names(optimizer, parameters), stored["parameters"])
    state = found.value("optimizer", "state")
    groups = state.get("param_groups") if isinstance(state, dict) else None
    own = optimizer.state_dict()["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own) or not isinstance(state.get("state"), dict):
        raise found.refuse("optimizer", f"a state with {len(own)} groups", quoted(state))
    for mine, theirs in zip(own, groups, strict=True):
        # A schedule adds keys of its own. A key that is missing would fail at the next step.
        fits = isinstance(theirs, dict) and mine.keys() <= theirs.keys()
        numbered = theirs["params"] if fits else None
        fits = isinstance(numbered, list) and all(type(number) is int for number in numbered)
        if not fits or numbered != mine["params"] or any(_kind(mine[key]) != _kind(theirs[key]) for key in mine):
            got = quoted({key: value for key, value in mine.items() if key != "params"}, 300)
            raise found.refuse("optimizer", f"groups as in the checkpoint, with {quoted(theirs, 300)}", got)
    numbers = {number for group in own for number in group["params"]}
    for number, entry in state["state"].items():
        if (
            number not in numbers
            or not isinstance(entry, dict)
            or any(isinstance(v, bool | str) for v in entry.values())
        ):
            raise found.refuse("optimizer", "tensors and numbers for each parameter", quoted(entry))
    return state  # type: ignore[no-any-return]


def _kind(value: object) -> str:
    """Return what kind of option a value is. A number may become a tensor, and a switch may be left open."""
    if value is None or isinstance(value, bool):
        return "switch"
    return "number" if isinstance(value, int | float | Tensor) else type(value).__name__


def set_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Set the state of an optimizer, to the bit."""
    optimizer.load_state_dict(state)
    # torch converts the state to the dtype of the parameter. Put back what was saved, where this changed it.
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, own in state["state"].items():
        place = optimizer.state[ordered[number]]
        for key, value in own.items():
            if isinstance(value, Tensor) and place[key].dtype != value.dtype:
                place[key] = value.to(place[key].device)
