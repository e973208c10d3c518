"""A mixture of experts: a router chooses a few experts for each token. The equations are in ``spec/v1/decoder.md``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from splitbundle.backends.torch.feedforward import ACTIVATIONS, Mlp
from splitbundle.backends.torch.joint import NOTHING
from splitbundle.backends.torch.kernels import linear
from splitbundle.backends.torch.modules import Linear
from splitbundle.format.architecture import experts as facts
from splitbundle.format.architecture.feedforward import Mlp as Dense


class Router(nn.Module):
    """Chooses experts for each token, and weighs them. It computes in float32."""

    def __init__(self, experts: facts.Experts, hidden: int) -> None:
        super().__init__()
        router, count = experts.router, experts.count
        self.facts, self.per_token = router, experts.per_token
        self.weight = nn.Parameter(torch.empty(count, hidden, device="meta"))
        self.bias = nn.Parameter(torch.empty(count, device="meta")) if router.bias else None
        self.correction = None if router.correction is None else nn.Parameter(torch.empty(count, device="meta"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the chosen experts, in float32, and their numbers, the best one first.

        *Shape:* (tokens, hidden) -> (tokens, per_token), (tokens, per_token).
        """
        logits = self.logits(x)
        scores = self._scores(logits)
        chosen = self.choose(logits, scores)
        return self.weights(logits, chosen, scores), chosen

    def logits(self, x: Tensor) -> Tensor:
        """Return the scores before the function. *Shape:* (tokens, hidden) -> (tokens, experts)."""
        bias = None if self.bias is None else self.bias.float()
        logits, cap = linear(x.float(), self.weight.float(), bias), self.facts.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def choose(self, logits: Tensor, scores: Tensor | None = None) -> Tensor:
        """Return the numbers of the chosen experts, the best one first. *Shape:* (tokens, experts) -> (tokens, …)."""
        groups = self.facts.groups
        scores = self._scores(logits) if scores is None else scores
        if self.correction is not None:
            ranked = (scores if self.facts.correction == "score" else logits) + self.correction.float()
        else:  # logits have the order of their scores, of which several may be rounded to 1
            ranked = logits if groups is None or groups.score == "max" else scores
        if groups is not None:
            by_group = ranked.view(len(ranked), groups.count, -1)
            best = by_group.amax(-1) if groups.score == "max" else by_group.topk(2).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, _largest(best, groups.kept), True)
            ranked = by_group.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        return _largest(ranked, self.per_token)

    def _scores(self, logits: Tensor) -> Tensor:
        if self.facts.function == "sparsemixer":  # it weighs the logits themselves
            return logits
        return logits.softmax(-1) if self.facts.function == "softmax" else logits.sigmoid()

    def weights(self, logits: Tensor, chosen: Tensor, scores: Tensor | None = None) -> Tensor:
        """Return the weights of the chosen experts. *Shape:* (tokens, experts), (tokens, per_token) -> the second."""
        if self.facts.function == "sparsemixer":
            return self._sparsemixer(logits, chosen)
        weights = (self._scores(logits) if scores is None else scores).gather(-1, chosen)
        if self.facts.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + self.facts.epsilon)
        return weights * self.facts.scale if self.facts.scale != 1.0 else weights

    def _sparsemixer(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weigh each expert by a softmax over the logits near its own that are left (arXiv:2409.12136)."""
        weights, left = [], logits
        for index in torch.split(chosen, 1, dim=-1):
            largest = left.gather(-1, index)
            distance = (largest - logits) / torch.maximum(logits.abs(), largest)
            near = left.masked_fill(distance > 2 * self.facts.epsilon, -math.inf).softmax(-1)
            weights.append(near.gather(-1, index))
            left = left.scatter(-1, index, -math.inf)
        return torch.cat(weights, -1) * self.facts.scale


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest scores, the lowest index first among equals, which ``topk`` doesn't promise."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


class Stacked(nn.Module):
    """The matrices of one projection of all experts, as one tensor. It starts without weights."""

    def __init__(self, count: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs, device="meta"))
        self.bias = nn.Parameter(torch.empty(count, outputs, device="meta")) if bias else None

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Return x Wᵀ + b for one expert. No other expert's weights are read. *Shape:* (…, inputs) -> (…, outputs)."""
        return linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class Experts(nn.Module):
    """The experts of a block."""

    def __init__(self, experts: facts.Experts, hidden: int) -> None:
        super().__init__()
        self.facts, width, bias = experts, experts.intermediate_size, experts.bias
        self.gate = Stacked(experts.count, hidden, width, bias=bias) if experts.gated else None
        self.up = Stacked(experts.count, hidden, width, bias=bias)
        self.down = Stacked(experts.count, width, hidden, bias=bias)
        self.activation = ACTIVATIONS[experts.activation]

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        *Shape:* (tokens, hidden), (tokens, per_token), (tokens, per_token) -> (tokens, hidden).
        """
        into, weights = self.facts.router.weighs == "input", weights.to(x.dtype)
        if len(x) == 1:
            result = torch.zeros_like(x)
            for i, expert in enumerate(chosen[0].tolist()):
                weight = weights[:, i, None]
                result = result + (self._one(x * weight, expert) if into else self._one(x, expert) * weight)
            return result
        # The tokens of each expert lie together, so that each expert's weights are read once.
        order = chosen.flatten().argsort(stable=True)
        tokens, given = order // chosen.shape[1], weights.flatten()[order, None]
        counts = chosen.flatten().bincount(minlength=self.facts.count).tolist()
        inputs = x[tokens] * given if into else x[tokens]
        outputs, start = [], 0
        for expert, count in enumerate(counts):
            if count:
                outputs.append(self._one(inputs[start : start + count], expert))
                start += count
        result = torch.cat(outputs)
        return torch.zeros_like(x).index_add(0, tokens, result if into else result * given)

    def _one(self, x: Tensor, expert: int) -> Tensor:
        up, clamp = self.up(x, expert), self.facts.clamp
        if self.gate is None:
            up = up if clamp is None else up.clamp(-clamp, clamp)
            return self.down(self.activation(up), expert)  # type: ignore[no-any-return]
        gate, slope, offset = self.gate(x, expert), self.facts.gate_slope, self.facts.up_offset
        if clamp is not None:
            gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
        gate = self.activation(gate) if slope == 1.0 else gate * torch.sigmoid(slope * gate)
        return self.down(gate * (up + offset if offset else up), expert)  # type: ignore[no-any-return]


class MixtureOfExperts(nn.Module):
    """The feed-forward block of a layer with experts."""

    def __init__(self, experts: facts.Experts, hidden: int) -> None:
        super().__init__()
        shared = experts.shared
        self.router = Router(experts, hidden)
        self.experts = Experts(experts, hidden)
        self.shared = None if experts.shared_block is None else Mlp(experts.shared_block, hidden)
        self.shared_gate = Linear(hidden, 1, bias=False) if shared is not None and shared.gate else None
        self.average = shared is not None and shared.average
        self.joint = NOTHING

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block. *Shape:* (batch, sequence, hidden) -> the same."""
        rows = x.flatten(0, -2)
        result = self.experts(rows, *self.router(rows)).view_as(x)
        if self.shared is None:
            return result  # type: ignore[no-any-return]
        other = self.shared(x)
        if self.shared_gate is not None:
            other = torch.sigmoid(self.shared_gate(x)) * other
        result = result + other
        return result / 2 if self.average else result  # type: ignore[no-any-return]


def feedforward(block: Dense | facts.Experts, hidden: int) -> nn.Module:
    """Return the module of a feed-forward block, with experts or dense."""
    return MixtureOfExperts(block, hidden) if isinstance(block, facts.Experts) else Mlp(block, hidden)
