"""The random state of this process: torch's on each device, Python's, and numpy's if it is in use."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def capture(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Return the state of all generators: those of the process, and the given ones by their names."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "devices": [],
        "numpy": None,
    }
    device = _accelerator()
    if device is not None:
        module = torch.get_device_module(device)
        state["devices"] = [device, [module.get_rng_state(i) for i in range(module.device_count())]]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [
            str(name),
            [int(key) for key in keys],
            *(float(r) if i == 2 else int(r) for i, r in enumerate(rest)),
        ]
    return state


def is_one(state: object) -> bool:
    """Return whether a value has the members of a random state. ``restore`` checks their values."""
    known = {"torch", "python", "generators", "devices", "numpy"}
    if not isinstance(state, dict) or state.keys() != known or not isinstance(state["generators"], dict):
        return False
    own = state["python"]
    # ``random.setstate`` takes anything as the number that it keeps for the next draw.
    return isinstance(own, tuple) and len(own) == 3 and (own[2] is None or isinstance(own[2], float))


def restore(state: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> None:
    """Set all generators to a captured state."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    if state["devices"] and _accelerator() == state["devices"][0]:
        module = torch.get_device_module(state["devices"][0])
        for i, own in enumerate(state["devices"][1][: module.device_count()]):
            module.set_rng_state(own, i)
    numpy = sys.modules.get("numpy")
    if numpy is not None and state["numpy"] is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.asarray(keys, dtype="uint32"), *rest))


def _accelerator() -> str | None:
    """Return the type of the accelerator that torch has here, if its random state can be read by device."""
    if not torch.accelerator.is_available():
        return None
    name = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    return name if hasattr(torch.get_device_module(name), "get_rng_state") and name != "mps" else None
