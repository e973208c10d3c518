"""The command ``plan``: tell the costs of each shard, and propose cuts."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from splitbundle.cli.arguments import add_cut_arguments, positive, sizes
from splitbundle.cli.console import Command, Console
from splitbundle.cli.inspect import ends
from splitbundle.format.dtypes import WEIGHTS
from splitbundle.opening import open_bundle
from splitbundle.planning.plan import DEFAULT_CONTEXT, Plan, PlannedShard

COLUMNS: Final = (
    "shard",
    "layers",
    "with",
    "bytes",
    "parameters",
    "FLOPs/token",
    "cache/token",
    "boundary/token",
    "memory",
)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory; its weights may be missing")
    choice = parser.add_mutually_exclusive_group()
    add_cut_arguments(choice, "propose")
    choice.add_argument(
        "--machines",
        type=sizes,
        metavar="SIZE,SIZE",
        help="propose a shard for each machine, in this order; each SIZE is a machine's memory for weights and cache",
    )
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help=f"the number of tokens of a row; by default {DEFAULT_CONTEXT}, or the context of a shorter model",
    )
    parser.add_argument("--batch", type=positive, metavar="N", default=1, help="the number of rows, by default 1")
    parser.add_argument("--dtype", choices=WEIGHTS, help="the dtype to compute in, by default that of the weights")


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, shard=(), progress=console.transfer)
    plan = bundle.plan(
        equal=args.equal,
        max_shard_size=args.max_shard_size,
        machines=args.machines,
        context=args.context,
        batch=args.batch,
        dtype=args.dtype,
    )
    command = None if plan.cuts is None else resplit_command(args.bundle, plan.cuts)
    console.json({"ok": True, "bundle_id": bundle.id, **plan.as_json(), "command": command})
    model = bundle.manifest.model
    console.text(f"{model.name}: {len(bundle.architecture.layers)} layers, {model.parameters:,} parameters")
    console.text(f"  context  {_context(plan, args.context, model.context_length)}")
    console.text(f"  batch    {plan.batch:,} {'row' if plan.batch == 1 else 'rows'}")
    console.text(f"  dtype    {plan.dtype}, to compute in")
    console.text("")
    console.text("shards, sizes in bytes; memory is for weights and cache at this context and batch")
    console.table(COLUMNS, [_row(shard) for shard in plan.shards])
    if plan.proposed is not None and command is not None:
        console.text("")
        console.text("proposed")
        _show(plan.proposed, console)
        console.text("")
        console.text(f"  {command}")
    return 0


def _show(proposed: Sequence[PlannedShard], console: Console) -> None:
    if proposed[0].capacity_bytes is None:
        console.table(COLUMNS, [_row(shard) for shard in proposed])
        return
    rows = [(*_row(shard), shard.capacity_bytes or 0, f"{shard.use_percent} %") for shard in proposed]
    console.table((*COLUMNS, "machine", "use"), rows)


def _row(shard: PlannedShard) -> tuple[object, ...]:
    costs = shard.costs
    return (
        shard.name,
        f"[{costs.layers[0]}, {costs.layers[1]})",
        ends(costs.embeds, costs.head),
        costs.bytes,
        costs.parameters,
        shard.flops_per_token_at_context,
        costs.cache_bytes_per_token,
        costs.boundary_bytes_per_token,
        shard.memory_bytes,
    )


def _context(plan: Plan, asked: int | None, own: int | None) -> str:
    tokens = f"{plan.context:,} {'token' if plan.context == 1 else 'tokens'} a row"
    if asked is not None:
        return tokens
    return f"{tokens}, by default" if plan.context != own else f"{tokens}, the model's context"


def resplit_command(bundle: str, cuts: tuple[int, ...]) -> str:
    """Return the command that writes a bundle with these cuts beside the present one."""
    path = Path(bundle)
    output = path.with_name(f"{path.name.removesuffix('.splitbundle')}-{len(cuts) + 1}.splitbundle")
    split = ["--split", ",".join(map(str, cuts))] if cuts else []
    return shlex.join(["splitbundle", "resplit", bundle, *split, "-o", str(output)])


COMMAND: Final = Command(
    name="plan", help="tell the costs of each shard, and propose cuts", configure=_add_arguments, run=_run
)
