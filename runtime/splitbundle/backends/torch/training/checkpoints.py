"""Training checkpoints: changed weights, optimizer, schedule, random state and position, from which a run goes on.

A checkpoint is a directory ``step-NNNNNNNNNN`` with ``checkpoint.json`` and ``tensors.safetensors``. It appears
complete, or not at all. Nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from splitbundle.backends.torch.changes import unchanged
from splitbundle.backends.torch.stage import Stage, stages_in
from splitbundle.backends.torch.training import random_state
from splitbundle.backends.torch.training.checkpoint_files import (
    FILE,
    FORMAT,
    TENSORS,
    VERSION,
    Found,
    as_json,
    read_checkpoint,
)
from splitbundle.backends.torch.training.lora import adapters_of
from splitbundle.backends.torch.training.optimizer_state import check_optimizer, optimizer_state, set_optimizer
from splitbundle.backends.torch.training.state_tree import encode
from splitbundle.backends.torch.weight_files import write_weights
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format import weight_layout
from splitbundle.integers import as_integer
from splitbundle.records import as_dict, record
from splitbundle.writing.atomic_directory import atomic_directory, remove_unfinished

_STEP: Final = re.compile(r"step-(\d{10,16})")
_REMOVED: Final = ".removed-"


class Stateful(Protocol):
    """An object with a state: an optimizer, a schedule, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Set the state."""


@record(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on."""

    step: int
    position: Any
    """What the caller gave as the position in the data."""


class Checkpoints:
    """The checkpoints of a run in a directory, of which the last few are kept."""

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3) -> None:
        """Name the directory. It is made by the first ``save``.

        Args:
            directory: the directory.
            keep: the number of checkpoints to keep.

        Raises:
            BundleError: ``input.value``.
        """
        number = as_integer(keep)
        if number is None or number < 1:
            raise wrong_argument("keep", "a number from 1", quoted(keep))
        self.directory, self.keep = Path(os.path.abspath(directory)), number

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in order."""
        if not self.directory.is_dir():
            return []
        found = (_STEP.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)

    def save(
        self,
        step: int,
        stages: Stage | Sequence[Stage] | nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Stateful | None = None,
        *,
        position: Any = None,
        others: Mapping[str, Stateful] | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
    ) -> Path:
        """Save a checkpoint, and then remove those that are older than the last ``keep``.

        Of the weights it has those that take gradients, and those that aren't as the bundle has them. To know that, it
        reads the frozen ones. If the bundle isn't where it was, it saves all of them.

        Args:
            step: the number of steps that were taken.
            stages: the stages that are trained: one, several, or a pipeline.
            optimizer: a torch optimizer of their parameters. Its state must be tensors, numbers and text.
            schedule: the schedule of the learning rate, if there is one.
            position: where the data goes on: anything that JSON has. It comes back from ``load``.
            others: further objects with a state, by names of your own, such as a gradient scaler.
            generators: random generators of your own, by names of your own. Those of torch, Python and numpy are saved
                always.

        Returns:
            The directory of the checkpoint.

        Raises:
            BundleError: ``input.value`` for a state that can't be stored, or parameters that aren't those of the
                stages; ``output.exists`` if there is a checkpoint of this step; ``output.failed``.
        """
        number = as_integer(step)
        if number is None or not 0 <= number < 10**16:
            raise wrong_argument("step", "a number from 0", quoted(step))
        parameters = _parameters(stages)
        left_out = {found for stage in stages_in(stages) for found in unchanged(stage)}
        tensors: dict[str, Tensor] = {
            f"weights/{name}": parameter.detach()
            for name, parameter in parameters.items()
            if id(parameter) not in left_out
        }
        state = {
            "optimizer": None if optimizer is None else optimizer_state(optimizer, parameters, tensors),
            "schedule": None if schedule is None else _object_state(schedule, "schedule", tensors),
            "others": {name: _object_state(one, f"others/{name}", tensors) for name, one in (others or {}).items()},
            "adapters": _adapters(stages),
            "random": encode(random_state.capture(generators or {}), "random", tensors),
        }
        target = self.directory / f"step-{number:010d}"
        self._remove_leftovers()
        if target.exists():
            hint = "Remove it, or give another step or directory"
            problem = Problem(code="output.exists", file=str(target), expected="no such step", got="one", hint=hint)
            raise BundleError(problem)
        with atomic_directory(target, force=False, ours=lambda path: False) as root:  # none is ever replaced
            stored = {name: _stored(tensor) for name, tensor in tensors.items()}
            entry = write_weights(root / TENSORS, stored, lambda name: tensors[name].to("cpu"))()
            document = {
                "format": FORMAT,
                "format_version": VERSION,
                "step": number,
                "bundles": sorted({stage.fingerprint for stage in stages_in(stages)}),
                "position": position,
                "state": state,
                "tensors": [
                    {"name": name, "dtype": one.dtype, "shape": list(one.shape)} for name, one in stored.items()
                ],
                "file": as_dict(entry),
            }
            (root / FILE).write_bytes(as_json(document))
        with contextlib.suppress(OSError):  # the new one is in place, and the next save tries again
            for old in self.steps()[: -self.keep]:
                if old < number:
                    self._remove(old)
        return target

    def load(
        self,
        stages: Stage | Sequence[Stage] | nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Stateful | None = None,
        *,
        others: Mapping[str, Stateful] | None = None,
        generators: Mapping[str, torch.Generator] | None = None,
        step: int | None = None,
        weights_only: bool = False,
    ) -> Resumed | None:
        """Go on from a checkpoint: set weights, optimizer, schedule and random state as they were.

        Everything is set, or nothing: if an object doesn't take its state, all objects get their own state back.

        Args:
            stages: stages of the same bundles, with the same parameters that take gradients.
            optimizer: an optimizer of the same kind, with the same parameters in the same order.
            schedule: a schedule of the same kind.
            others: as for ``save``.
            generators: as for ``save``.
            step: the step of the checkpoint; by default the last one.
            weights_only: set the weights, and nothing else: to compute with them, or to save them. The run may have had
                any optimizer, and the stages needn't be trainable. They need the adapters of the run.

        Returns:
            The step and the position, or None if there is no checkpoint yet.

        Raises:
            BundleError: ``file.*``, ``json.*`` and ``field.*`` for a damaged checkpoint; ``checkpoint.mismatch`` for
                one of other parameters, another bundle, or other objects; ``input.value``.
        """
        if weights_only and any(one for one in (optimizer, schedule, others, generators)):
            expected, got = "nothing beside the stages, or False", "True, with other objects"
            raise wrong_argument("weights_only", expected, got)
        known = self.steps()
        if step is None and not known:
            return None
        chosen = known[-1] if step is None else step
        if chosen not in known:
            got = f"{quoted(step)}; there are {', '.join(map(str, known)) or 'none'}"
            raise wrong_argument("step", f"the step of a checkpoint in {self.directory}", got)
        found = read_checkpoint(self.directory / f"step-{chosen:010d}")
        parameters = _parameters(stages)
        found.check("bundles", sorted({stage.fingerprint for stage in stages_in(stages)}), found.bundles)
        weights = {name.removeprefix("weights/"): own for name, own in found.tensors.items() if name[:8] == "weights/"}
        _check_weights(found, weights, parameters)
        found.check("adapters", _adapters(stages), found.state["adapters"])
        if not weights_only:
            self._resume(found, parameters, optimizer, schedule, others or {}, generators or {})
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        return Resumed(step=chosen, position=found.position)

    @staticmethod
    def _resume(
        found: Found,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        schedule: Stateful | None,
        others: Mapping[str, Stateful],
        generators: Mapping[str, torch.Generator],
    ) -> None:
        """Set what isn't a weight."""
        given = {"optimizer": optimizer, "schedule": schedule}
        for name, one in given.items():
            found.check(name, "given" if one is not None else "none", "none" if found.state[name] is None else "given")
        found.check("others", sorted(others), sorted(found.state["others"]))
        random = found.value("random")
        if not random_state.is_one(random):
            raise found.refuse("random", "the random state of a process", quoted(random))
        found.check("generators", sorted(generators), sorted(random["generators"]))
        values: list[tuple[Stateful, Any]] = []
        if optimizer is not None:
            values.append((optimizer, check_optimizer(found, optimizer, parameters)))
        objects = {"schedule": schedule, **{f"others/{name}": one for name, one in others.items()}}
        for name, own in objects.items():
            if own is not None:
                found.check(f"class of {name}", type(own).__name__, found.value(*name.split("/"), "class"))
                values.append((own, found.value(*name.split("/"), "state")))
        _set_all(found, values, random, generators)

    def _remove(self, step: int) -> None:
        """Remove a checkpoint. It disappears in one step, so that no half of it is ever found."""
        away = self.directory / f"{_REMOVED}{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):  # the next save tries again
            (self.directory / f"step-{step:010d}").rename(away)
            shutil.rmtree(away)

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left: checkpoints that it was writing or removing."""
        if not self.directory.is_dir():
            return
        for path in list(self.directory.iterdir()):
            if path.name.startswith(_REMOVED):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith(".step-") and ".tmp-" in path.name:
                remove_unfinished(self.directory / path.name[1:].partition(".tmp-")[0])


def _parameters(stages: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of all stages by name. Stages of one pipeline share a tied table.

    Stages that were loaded apart may hold two tables of one name: each is stored under the name of its stage, too.
    """
    found: dict[str, nn.Parameter] = {}
    for stage in stages_in(stages):
        for name, parameter in stage.named_parameters(remove_duplicate=False):
            if hasattr(parameter, "full_tensor"):
                hint = "torch.distributed.checkpoint saves such parameters"
                raise wrong_argument("stages", "whole parameters", f"{quoted(name)}, divided among processes", hint)
            own = f"{stage.name}:{name}"
            if found.setdefault(name, parameter) is not parameter and found.setdefault(own, parameter) is not parameter:
                raise wrong_argument("stages", "stages of different names", f"{quoted(stage.name)} twice")
    if not found:
        raise wrong_argument("stages", "at least one stage", "none")
    return found


def _adapters(stages: Any) -> list[dict[str, Any]]:
    """Return what belongs to adapters beside their weights."""
    return [
        {
            "layer": path,
            "rank": adapter.rank,
            "alpha": adapter.alpha,
            "rslora": adapter.rslora,
            "dropout": adapter.dropout.p,
        }
        for stage in stages_in(stages)
        for path, adapter in adapters_of(stage)
    ]


def _object_state(own: Stateful, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {"class": type(own).__name__, "state": encode(dict(own.state_dict()), where, tensors)}


def _stored(tensor: Tensor) -> weight_layout.Tensor:
    return weight_layout.Tensor(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def _check_weights(found: Found, weights: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    trained = sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    missing = [name for name in trained if name not in weights]
    more = [name for name in weights if name not in parameters]
    if missing or more:
        got = f"{quoted(more[0])} in the checkpoint alone" if more else f"{quoted(missing[0])} in the stages alone"
        raise found.refuse("stages", "the parameters of the checkpoint", got)
    for name, value in weights.items():
        own = parameters[name]
        if own.shape != value.shape or own.dtype != value.dtype:
            got = f"{own.dtype} {list(own.shape)}"
            raise found.refuse("stages", f"{quoted(name)} of {value.dtype} {list(value.shape)}", got)


def _set_all(
    found: Found,
    values: Sequence[tuple[Stateful, Any]],
    random: Mapping[str, Any],
    generators: Mapping[str, torch.Generator],
) -> None:
    """Set the state of every object, or of none: a state that one of them doesn't take puts all of them back."""
    before = [(own, copy.deepcopy(own.state_dict())) for own, _ in values]
    drawn = random_state.capture(generators)
    try:
        for own, state in values:
            if isinstance(own, torch.optim.Optimizer):
                set_optimizer(own, state)
            else:
                own.load_state_dict(state)
        random_state.restore(random, generators)
    except Exception as error:  # whatever an object of the caller raises at a state of another one
        for own, state in before:
            own.load_state_dict(state)
        random_state.restore(drawn, generators)
        got = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise found.refuse("state", "states that these objects take", got) from error
