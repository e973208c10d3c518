"""The facts of a mixture of experts: a feed-forward block of which each token uses a few parts, and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from splitbundle.format.architecture.feedforward import ACTIVATIONS, mlp_tensors
from splitbundle.format.architecture.feedforward import Mlp as Dense
from splitbundle.format.architecture.sizes import Shapes, linear_tensors
from splitbundle.format.fields import Field
from splitbundle.records import record

MAX_EXPERTS: Final = 65_536
FUNCTIONS: Final = ("softmax", "sigmoid", "sparsemixer")
EXTENSION: Final = "experts"
"""The name in ``requires`` of a bundle with experts."""


@record(frozen=True, slots=True, kw_only=True)
class Groups:
    """Groups of neighbouring experts. Only experts of the best groups can be chosen."""

    count: int
    kept: int
    score: str
    """``"max"`` or ``"top_two"``: a group's score is its largest score, or the sum of its two largest."""


@record(frozen=True, slots=True, kw_only=True)
class Router:
    """Chooses experts for each token, and weighs them."""

    function: str
    bias: bool
    logit_cap: float | None
    correction: str | None
    """``"score"`` or ``"logit"``: what a learned vector is added to, for choosing alone. None: there is none."""
    groups: Groups | None
    normalised: bool
    """Whether the weights of the chosen experts are divided by their sum."""
    epsilon: float
    """What is added to that sum. For sparsemixer: how near to the largest logit another has to be, to count."""
    scale: float
    weighs: str
    """``"output"`` or ``"input"``: what of an expert is multiplied by its weight."""


@record(frozen=True, slots=True, kw_only=True)
class Shared:
    """A dense block that every token uses beside the experts."""

    intermediate_size: int
    gate: bool
    """Whether a learned number for each token, from 0 to 1, multiplies it."""
    average: bool
    """Whether the sum of this block and the experts is halved."""


@record(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538)."""

    kind: Literal["experts"] = "experts"
    count: int
    per_token: int
    gated: bool
    activation: str
    intermediate_size: int
    bias: bool
    clamp: float | None
    gate_slope: float
    up_offset: float
    router: Router
    shared: Shared | None

    @property
    def shared_block(self) -> Dense | None:
        """Return the facts of the shared block, or None."""
        if self.shared is None:
            return None
        size = self.shared.intermediate_size
        return Dense(gated=self.gated, activation=self.activation, intermediate_size=size, bias=self.bias)


def parse_experts(field: Field, size: int) -> Experts:
    """Read the object of a mixture of experts. ``size`` is the largest size."""
    members = field.members(
        [
            *("kind", "count", "per_token", "gated", "activation", "intermediate_size", "bias", "clamp"),
            *("gate_slope", "up_offset", "router", "shared"),
        ]
    )
    return Experts(
        count=members["count"].integer(1, MAX_EXPERTS),
        per_token=members["per_token"].integer(1, MAX_EXPERTS),
        gated=members["gated"].boolean(),
        activation=members["activation"].choice([name for name in ACTIVATIONS if name != "xielu"]),
        intermediate_size=members["intermediate_size"].integer(1, size),
        bias=members["bias"].boolean(),
        clamp=members["clamp"].optional_positive_number(),
        gate_slope=members["gate_slope"].positive_number(),
        up_offset=members["up_offset"].number((0.0, 1.0)),
        router=_router(members["router"]),
        shared=None if members["shared"].is_null else _shared(members["shared"], size),
    )


def _router(field: Field) -> Router:
    members = field.members(
        [
            *("function", "bias", "logit_cap", "correction", "groups", "normalised", "epsilon", "scale", "weighs"),
        ]
    )
    correction, groups, epsilon = members["correction"], members["groups"], members["epsilon"]
    return Router(
        function=members["function"].choice(FUNCTIONS),
        bias=members["bias"].boolean(),
        logit_cap=members["logit_cap"].optional_positive_number(),
        correction=None if correction.is_null else correction.choice(("score", "logit")),
        groups=None if groups.is_null else _groups(groups),
        normalised=members["normalised"].boolean(),
        epsilon=0.0 if epsilon.value == 0 and type(epsilon.value) in (int, float) else epsilon.positive_number(),
        scale=members["scale"].positive_number(),
        weighs=members["weighs"].choice(("output", "input")),
    )


def _groups(field: Field) -> Groups:
    members = field.members(["count", "kept", "score"])
    return Groups(
        count=members["count"].integer(1, MAX_EXPERTS),
        kept=members["kept"].integer(1, MAX_EXPERTS),
        score=members["score"].choice(("max", "top_two")),
    )


def _shared(field: Field, size: int) -> Shared:
    members = field.members(["intermediate_size", "gate", "average"])
    return Shared(
        intermediate_size=members["intermediate_size"].integer(1, size),
        gate=members["gate"].boolean(),
        average=members["average"].boolean(),
    )


def check_experts(experts: Experts, pointer: str, add: Callable[[str, str, object], None]) -> None:
    """Check the rules between the fields, and report with ``add`` what breaks one."""
    count, router, groups = experts.count, experts.router, experts.router.groups
    if experts.per_token > count:
        add(f"{pointer}/per_token", f"at most count ({count})", experts.per_token)
    if experts.gate_slope != 1 and not (experts.gated and experts.activation == "silu"):
        add(f"{pointer}/gate_slope", "1, as there is no gate with silu", experts.gate_slope)
    if experts.up_offset != 0 and not experts.gated:
        add(f"{pointer}/up_offset", "0, as there is no gate", experts.up_offset)
    if router.epsilon != 0 and not router.normalised and router.function != "sparsemixer":
        add(f"{pointer}/router/epsilon", "0, as the weights aren't normalised", router.epsilon)
    if router.function == "sparsemixer" and (
        groups is not None
        or router.correction is not None
        or router.normalised
        or experts.per_token != 2
        or not router.epsilon
    ):
        expected = "softmax or sigmoid, or per_token 2 without correction, groups and normalised"
        add(f"{pointer}/router/function", expected, router.function)
    if groups is None:
        return
    if count % groups.count:
        add(f"{pointer}/router/groups/count", f"a divisor of count ({count})", groups.count)
    elif groups.score == "top_two" and count // groups.count < 2:
        add(f"{pointer}/router/groups/score", "max, as a group has one expert", groups.score)
    elif groups.kept * (count // groups.count) < experts.per_token:
        expected = f"enough groups for {experts.per_token} experts a token"
        add(f"{pointer}/router/groups/kept", expected, groups.kept)
    if groups.kept > groups.count:
        add(f"{pointer}/router/groups/kept", f"at most {groups.count}", groups.kept)


def experts_tensors(name: str, experts: Experts, hidden: int) -> Shapes:
    """Return the tensors of a mixture of experts by name, in order of use.

    Args:
        name: the block's name, such as ``layers.3.mlp``.
        experts: its facts.
        hidden: the hidden size.
    """
    count, width, router = experts.count, experts.intermediate_size, experts.router
    tensors = linear_tensors(f"{name}.router", count, hidden, router.bias)
    if router.correction is not None:
        tensors[f"{name}.router.correction"] = (count,)
    for part in ("gate", "up") if experts.gated else ("up",):
        tensors |= _stacked(f"{name}.experts.{part}", count, width, hidden, experts.bias)
    tensors |= _stacked(f"{name}.experts.down", count, hidden, width, experts.bias)
    shared = experts.shared_block
    if shared is not None:
        tensors |= mlp_tensors(f"{name}.shared", shared, hidden)
    if experts.shared is not None and experts.shared.gate:
        tensors |= linear_tensors(f"{name}.shared_gate", 1, hidden, False)
    return tensors


def _stacked(name: str, count: int, rows: int, columns: int, bias: bool) -> Shapes:
    return {f"{name}.weight": (count, rows, columns)} | ({f"{name}.bias": (count, rows)} if bias else {})
