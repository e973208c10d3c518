"""The facts of a mixture of experts: where a configuration has each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from splitbundle.format.architecture.experts import Experts, Groups, Router, Shared, check_experts
from splitbundle.format.architecture.feedforward import Mlp
from splitbundle_converter.families.config_reader import ConfigReader


def all_layers(config: ConfigReader, layers: int) -> list[bool]:
    """Return that all layers have experts."""
    return [True] * layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFacts:
    """The facts of a mixture of experts. A string is the name of a field; a function gets the configuration."""

    count: str | int = "num_experts"
    per_token: str | int = "num_experts_per_tok"  # noqa: S105  # the name of a field
    inner: str | int = "moe_intermediate_size"
    layers: Callable[[ConfigReader, int], list[bool]] = all_layers
    """Returns for each layer whether it has experts."""
    bias: bool = False
    clamp: str | None = None
    """The name of a field."""
    gate_slope: float | str = 1.0
    up_offset: float = 0.0
    function: str = "softmax"
    """A value, as ``correction`` and ``weighs``."""
    router_bias: bool = False
    logit_cap: str | None = None
    """The name of a field. 0 means none."""
    correction: str | None = None
    groups: Callable[[ConfigReader], Groups | None] | None = None
    normalised: bool | str = True
    """A value, or the name of a field."""
    epsilon: float | str = 0.0
    scale: float | str = 1.0
    weighs: str = "output"
    shared: Callable[[ConfigReader], Shared | None] | None = None

    def replace(self, **changes: Any) -> ExpertFacts:
        """Return the facts with changes."""
        return replace(self, **changes)

    def read(self, config: ConfigReader, mlp: Mlp, layers: int) -> list[Experts | Mlp]:
        """Return the feed-forward block of each layer: with experts, or dense."""
        sparse = self.layers(config, layers)
        if any(sparse):
            experts = self._experts(config, mlp)
        else:  # the fields of experts then change nothing
            unused, experts = config.apart(), None
            self._experts(unused, mlp)
            config.ignored(unused.read)
        return [experts if experts is not None and own else mlp for own in sparse]

    def _experts(self, config: ConfigReader, mlp: Mlp) -> Experts:
        count, per_token, width = (
            config.integer(each) if isinstance(each, str) else each for each in (self.count, self.per_token, self.inner)
        )
        if per_token > count:
            config.refuse(str(self.per_token), f"at most {self.count} ({count})")
            per_token = count
        normalised = config.boolean(self.normalised) if isinstance(self.normalised, str) else self.normalised
        epsilon = config.number(self.epsilon) if isinstance(self.epsilon, str) else self.epsilon
        experts = Experts(
            count=count,
            per_token=per_token,
            gated=mlp.gated,
            activation=mlp.activation,
            intermediate_size=width,
            bias=self.bias,
            clamp=None if self.clamp is None else config.number(self.clamp),
            gate_slope=config.number(self.gate_slope) if isinstance(self.gate_slope, str) else self.gate_slope,
            up_offset=self.up_offset,
            router=Router(
                function=self.function,
                bias=self.router_bias,
                logit_cap=self._cap(config),
                correction=self.correction,
                groups=None if self.groups is None else self.groups(config),
                normalised=normalised,
                epsilon=epsilon if normalised or self.function == "sparsemixer" else 0.0,
                scale=config.number(self.scale) if isinstance(self.scale, str) else self.scale,
                weighs=self.weighs,
            ),
            shared=None if self.shared is None else self.shared(config),
        )
        fields = {
            "router/groups/kept": "topk_group",
            "gate_slope": "hidden_act",
            "router/function": str(self.per_token),
        }

        def refuse(pointer: str, expected: str, got: object) -> None:
            config.refuse(fields.get(pointer[1:], "n_group"), expected, got)

        check_experts(experts, "", refuse)
        return experts

    def _cap(self, config: ConfigReader) -> float | None:
        return None if self.logit_cap is None or not config.raw(self.logit_cap) else config.number(self.logit_cap)


# Readers of facts that several families share.


def sparse_steps(config: ConfigReader, layers: int) -> list[bool]:
    """Return which layers have experts: every ``decoder_sparse_step``-th one that ``mlp_only_layers`` doesn't name."""
    step, dense = config.integer("decoder_sparse_step"), config.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(each) is not int for each in dense):
        config.refuse("mlp_only_layers", "numbers of layers")
        dense = []
    if not (config.raw("num_experts") or config.raw("num_local_experts")):
        return [False] * layers
    return [i not in dense and (i + 1) % step == 0 for i in range(layers)]


def first_dense(config: ConfigReader, layers: int) -> list[bool]:
    """Return which layers have experts: all but the first ``first_k_dense_replace``."""
    return [i >= config.integer("first_k_dense_replace", minimum=0) for i in range(layers)]


def block_groups(config: ConfigReader) -> Groups | None:
    """Return the groups of DeepSeek V3's router (DeepSeek-AI 2024, arXiv:2412.19437), or None for a single group."""
    count, kept = config.integer("n_group"), config.integer("topk_group")
    return None if count == kept else Groups(count=count, kept=kept, score="top_two")


def shared_block(size: str, *, gate: bool = False) -> Callable[[ConfigReader], Shared | None]:
    """Return a reader of a shared block. ``size`` is the field with its width; there is none if it is 0."""

    def read(config: ConfigReader) -> Shared | None:
        width = config.integer(size, minimum=0)
        return Shared(intermediate_size=width, gate=gate, average=False) if width else None

    return read


def shared_experts(number: str, size: str = "moe_intermediate_size") -> Callable[[ConfigReader], Shared | None]:
    """Return a reader of shared experts: so many experts of this width are one block."""

    def read(config: ConfigReader) -> Shared | None:
        count = config.integer(number, minimum=0) if config.raw(number) is not None else 0
        width = count * config.integer(size)
        return Shared(intermediate_size=width, gate=False, average=False) if count else None

    return read
