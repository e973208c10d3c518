"""Tell the costs of a bundle's shards, and propose cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.dtypes import WEIGHTS
from splitbundle.format.manifest.document import Manifest
from splitbundle.integers import as_integer
from splitbundle.planning import cuts as choices
from splitbundle.planning.costs import ModelCosts, RangeCosts, bundle_costs
from splitbundle.records import as_dict, members, record
from splitbundle.writing.shards import shard_names

DEFAULT_CONTEXT: Final = 4096
"""The largest context that a plan takes by default. Many models have longer ones, which few sessions fill."""


@record(frozen=True, slots=True, kw_only=True)
class PlannedShard:
    """A shard, its costs, and its needs at the context and the batch of the plan."""

    name: str
    costs: RangeCosts
    flops_per_token_at_context: int
    """The FLOPs of a context's last token: ``RangeCosts.flops_per_token_at``."""
    memory_bytes: int
    """The memory for the weights and the cache: ``RangeCosts.memory_bytes``. Activations come on top."""
    capacity_bytes: int | None = None
    """The memory of the shard's machine, if the plan is for machines."""

    @property
    def use_percent(self) -> int | None:
        """Return memory_bytes in percent of capacity_bytes, rounded up; None without a machine."""
        return None if self.capacity_bytes is None else -(-100 * self.memory_bytes // self.capacity_bytes)

    def as_json(self) -> dict[str, Any]:
        """Return all fields under their names. Those of ``costs`` stand beside the others."""
        machine = {} if self.capacity_bytes is None else {"use_percent": self.use_percent}
        others = {name: value for name, value in members(self).items() if name != "costs" and value is not None}
        return {"name": self.name, **as_dict(self.costs), **others, **machine}


@record(frozen=True, slots=True, kw_only=True)
class Plan:
    """The costs of a bundle's shards, and perhaps of shards with other cuts."""

    context: int
    """The number of tokens of a row."""
    batch: int
    """The number of rows."""
    dtype: str
    """The dtype to compute in."""
    shards: tuple[PlannedShard, ...]
    """The shards of the bundle."""
    cuts: tuple[int, ...] | None = None
    """The proposed cuts, as ``resplit`` takes them; None if none were asked for."""
    proposed: tuple[PlannedShard, ...] | None = None
    """The shards between the proposed cuts, with their default names."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields under their names, as values that JSON has."""
        return {
            "context": self.context,
            "batch": self.batch,
            "dtype": self.dtype,
            "shards": [shard.as_json() for shard in self.shards],
            "cuts": None if self.cuts is None else list(self.cuts),
            "proposed": None if self.proposed is None else [shard.as_json() for shard in self.proposed],
        }


def make_plan(
    manifest: Manifest,
    architecture: Architecture,
    *,
    equal: int | None = None,
    max_shard_size: int | None = None,
    machines: Sequence[int] | None = None,
    context: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
) -> Plan:
    """Return the plan of a bundle. ``Bundle.plan`` says what the arguments are."""
    choices.check_only_one({"equal": equal, "max_shard_size": max_shard_size, "machines": machines})
    if dtype is not None and dtype not in WEIGHTS:
        expected = f"one of {', '.join(WEIGHTS)}"
        raise BundleError(Problem(code="input.dtype", argument="dtype", expected=expected, got=quoted(dtype)))
    rows = as_integer(batch)
    if rows is None or rows < 1:
        raise wrong_argument("batch", "a number from 1", quoted(batch))
    tokens = _context(manifest, architecture, context)
    costs = bundle_costs(manifest, architecture, dtype)
    cuts = None
    if equal is not None:
        cuts = choices.equal_cuts(costs, equal)
    elif max_shard_size is not None:
        cuts = choices.cuts_by_size(costs, max_shard_size)
    elif machines is not None:
        cuts = choices.cuts_for_machines(costs, machines, tokens, rows)
    names = tuple(shard.name for shard in manifest.shards)
    return Plan(
        context=tokens,
        batch=rows,
        dtype=dtype or manifest.storage.dtype,
        shards=_planned(costs, manifest.cuts, names, tokens, rows),
        cuts=cuts,
        proposed=None if cuts is None else _planned(costs, cuts, shard_names(cuts, None), tokens, rows, machines),
    )


def _context(manifest: Manifest, architecture: Architecture, given: int | None) -> int:
    limit = architecture.position_limit
    if given is None:
        bounds = (DEFAULT_CONTEXT, manifest.model.context_length, limit)
        return min(bound for bound in bounds if bound is not None)
    tokens = as_integer(given)
    if tokens is None or not 1 <= tokens <= (limit or tokens):
        expected = f"1 to {limit}, the positions of the model" if limit else "a number from 1"
        raise wrong_argument("context", expected, quoted(given))
    return tokens


def _planned(
    costs: ModelCosts,
    cuts: tuple[int, ...],
    names: tuple[str, ...],
    context: int,
    batch: int,
    machines: Sequence[int] | None = None,
) -> tuple[PlannedShard, ...]:
    shards = []
    for i, (name, own) in enumerate(zip(names, costs.of_shards(cuts), strict=True)):
        shards.append(
            PlannedShard(
                name=name,
                costs=own,
                flops_per_token_at_context=own.flops_per_token_at(context),
                memory_bytes=own.memory_bytes(context, batch),
                capacity_bytes=None if machines is None else as_integer(machines[i]),
            )
        )
    return tuple(shards)
