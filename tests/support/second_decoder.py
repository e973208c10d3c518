"""A second decoder, written from ``spec/v1/decoder.md`` with Python's own floats, to compare with the runtime."""

from __future__ import annotations

import json
import math
from operator import mul
from typing import Any

import torch

from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.decoder import Embedding, Head, Layer
from splitbundle.backends.torch.positions import Positions
from splitbundle.format.architecture import decoder as architectures
from tests.support.variants import LENGTH

Vector = list[float]


def added(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


def sees(facts_: dict[str, Any], p: int, j: int) -> bool:
    """SB-C-009, for j up to p."""
    if facts_["window"] is not None:
        return j > p - int(facts_["window"])
    return facts_["chunk"] is None or j // facts_["chunk"] == p // facts_["chunk"]


def times(factor: float, x: Vector) -> Vector:
    return [factor * a for a in x]


def dot(x: Vector, y: Vector) -> float:
    return float(sum(map(mul, x, y)))


class Reference:
    """Computes a row of tokens by decoder.md, number by number: one call at a time, with the earlier calls'
    results."""

    def __init__(self, architecture: architectures.Architecture, tensors: dict[str, torch.Tensor]) -> None:
        self.document = json.loads(architecture.to_bytes())
        self.tensors = {name: tensor.double().tolist() for name, tensor in tensors.items()}
        self.past = 0
        self.seen: dict[str, list[tuple[list[Vector], list[Vector]]]] = {}
        """For each layer, the keys and values of each position's heads."""

    def linear(self, name: str, x: Vector) -> Vector:
        product = [dot(row, x) for row in self.tensors[f"{name}.weight"]]
        return added(product, self.tensors.get(f"{name}.bias", [0.0] * len(product)))

    def norm(self, name: str, norm: dict[str, Any], x: Vector) -> Vector:
        weight = self.tensors.get(f"{name}.weight")
        return self.normalise(norm, x, weight, self.tensors.get(f"{name}.bias"))

    def normalise(self, norm: dict[str, Any], x: Vector, weight: Vector | None, bias: Vector | None) -> Vector:
        """SB-C-005, SB-C-006."""
        n = len(x)
        assert (weight is not None, bias is not None) == (norm["affine"], norm["bias"])
        weight = [1.0] * n if weight is None else [w + norm["weight_offset"] for w in weight]
        mean = sum(x) / n if norm["kind"] == "layer_norm" else 0.0
        spread = math.sqrt(sum((a - mean) ** 2 for a in x) / n + norm["eps"])
        scaled = [w * (a - mean) / spread for w, a in zip(weight, x, strict=True)]
        return scaled if bias is None else added(scaled, bias)

    def rotate(self, x: Vector, p: int, n: int, position: dict[str, Any]) -> Vector:
        """SB-C-011 and SB-C-030, for a row of length n."""
        if position["kind"] != "rotary":
            return x
        result, half = list(x), position["dim"] // 2
        factor = position["scaling"].get("attention_factor", 1.0)
        for i in range(half):
            u, v = (i, i + half) if position["layout"] == "half" else (2 * i, 2 * i + 1)
            angle = (-p if position.get("direction") == "backward" else p) * frequency(position, i, n)
            cos, sin = factor * math.cos(angle), factor * math.sin(angle)
            result[u] = x[u] * cos - x[v] * sin
            result[v] = x[v] * cos + x[u] * sin
        return result

    def heads(self, name: str, part: str, facts_: dict[str, Any], x: Vector, p: int, n: int) -> list[Vector]:
        """A position's queries, keys or values, by heads: SB-C-008 with SB-C-020, SB-C-021 and SB-C-022."""
        own, width, norm_name = facts_["query_key_norm"], facts_["head_dim"], f"{name}.{part}_norm"
        width = facts_.get("value_dim", width) if part == "value" else width
        y = self.linear(f"{name}.{part}", x)
        if facts_["clip"] is not None:
            y = [max(-facts_["clip"], min(facts_["clip"], a)) for a in y]
        if part != "value" and own and own["width"] == "full":
            y = self.norm(norm_name, own["norm"], y)
        pieces = [y[start : start + width] for start in range(0, len(y), width)]
        if part == "value":
            return [times(facts_.get("value_multiplier", 1.0), piece) for piece in pieces]

        def normed() -> list[Vector]:
            weight, bias = (self.tensors.get(f"{norm_name}.{which}") for which in ("weight", "bias"))
            several = own["width"] == "heads"
            return [
                self.normalise(own["norm"], piece, *(it[h] if several and it else it for it in (weight, bias)))
                for h, piece in enumerate(pieces)
            ]

        if own and own["width"] != "full" and not own["after_rotation"]:
            pieces = normed()
        pieces = [self.rotate(piece, p, n, facts_["position"]) for piece in pieces]
        if own and own["after_rotation"]:
            pieces = normed()
        temperature = facts_["query_temperature"]
        if part == "query" and temperature:
            moved, length = p + temperature["offset"], temperature["original_positions"]
            growth = 1 + temperature["beta"] * math.log(1 + moved // length)
            if temperature.get("growth") == "power":
                growth = (1 + moved / length) ** temperature["beta"]
            pieces = [times(growth, piece) for piece in pieces]
        return pieces

    def attention(self, name: str, facts_: dict[str, Any], rows: list[Vector]) -> list[Vector]:
        n, groups = self.past + len(rows), facts_["heads"] // facts_["kv_heads"]
        seen = self.seen.setdefault(name, [])
        for p, x in enumerate(rows, self.past):
            key, value = (self.heads(name, part, facts_, x, p, n) for part in ("key", "value"))
            seen.append((key, value))
        results = []
        for p, x in enumerate(rows, self.past):
            queries = self.heads(name, "query", facts_, x, p, n)
            y: Vector = []
            for h, query in enumerate(queries):
                visible = [j for j in range(p + 1) if sees(facts_, p, j)]
                scores = [self.score(facts_, h, query, seen[j][0][h // groups], p, j) for j in visible]
                powers = [math.exp(s - max(scores)) for s in scores]
                whole = sum(powers)
                if facts_["sinks"]:
                    whole += math.exp(self.tensors[f"{name}.sinks"][h] - max(scores))
                mixed = [times(a / whole, seen[j][1][h // groups]) for a, j in zip(powers, visible, strict=True)]
                y += [sum(channel) for channel in zip(*mixed, strict=True)]
            if "output_gate" in facts_:
                y = [a * b for a, b in zip(y, self.gate(f"{name}.gate", facts_, x), strict=True)]
            results.append(self.linear(f"{name}.output", y))
        return results

    def gate(self, name: str, facts_: dict[str, Any], x: Vector) -> Vector:
        """SB-C-039, for each channel."""
        gate, width = facts_["output_gate"], facts_.get("value_dim", facts_["head_dim"])
        z = self.linear(name, x)
        if gate["width"] == "head":
            z = [a for a in z for _ in range(width)]
        if gate["bias"]:
            z = added(z, [b for b in self.tensors[f"{name}_bias"] for _ in range(width)])
        sigmoid = gate["function"] == "sigmoid"
        return [1 / (1 + math.exp(-a)) if sigmoid else math.log1p(math.exp(a)) for a in z]

    def score(self, facts_: dict[str, Any], h: int, query: Vector, key: Vector, p: int, j: int) -> float:
        """SB-C-009, SB-C-023 and SB-C-024."""
        score, cap, position = float(facts_["scale"] * dot(query, key)), facts_["logit_cap"], facts_["position"]
        if cap is not None:
            score = cap * math.tanh(score / cap)
        if position["kind"] == "alibi":
            score += position["multiplier"] * slope(h, facts_["heads"], position["max_bias"]) * (j - p)
        return score

    def mlp(self, name: str, mlp: dict[str, Any], x: Vector) -> Vector:
        if mlp.get("kind") == "experts":
            return self.experts(name, mlp, x)
        learned = [self.tensors.get(f"{name}.activation.{which}", [0.0])[0] for which in ("alpha_p", "alpha_n")]
        up = self.linear(f"{name}.up", x)
        if not mlp["gated"]:
            return self.linear(f"{name}.down", [activate(mlp["activation"], a, *learned) for a in up])
        gate = [activate(mlp["activation"], a, *learned) for a in self.linear(f"{name}.gate", x)]
        return self.linear(f"{name}.down", [a * b for a, b in zip(gate, up, strict=True)])

    def weights(self, name: str, mlp: dict[str, Any], x: Vector) -> dict[int, float]:
        """The chosen experts with their weights: SB-C-033 to SB-C-036."""
        router, count = mlp["router"], mlp["count"]
        z, cap = self.linear(name, x), router["logit_cap"]
        z = z if cap is None else [cap * math.tanh(a / cap) for a in z]
        if router["function"] == "sparsemixer":
            chosen: dict[int, float] = {}
            for _ in range(2):
                left = [i for i in range(count) if i not in chosen]
                best = max(left, key=lambda i: (z[i], -i))
                near = [i for i in left if (z[best] - z[i]) / max(abs(z[i]), z[best]) <= 2 * router["epsilon"]]
                whole = sum(math.exp(z[i] - z[best]) for i in near)
                chosen[best] = router["scale"] / whole
            return chosen
        if router["function"] == "softmax":
            powers = [math.exp(a - max(z)) for a in z]
            s = [a / sum(powers) for a in powers]
        else:
            s = [1 / (1 + math.exp(-a)) for a in z]
        t = list(z if router["correction"] == "logit" else s)
        if router["correction"] is not None:
            t = added(t, self.tensors[f"{name}.correction"])
        candidates = list(range(count))
        if router["groups"] is not None:
            size = count // router["groups"]["count"]
            groups = [range(start, start + size) for start in range(0, count, size)]
            most = 1 if router["groups"]["score"] == "max" else 2
            score = [sum(sorted((t[i] for i in group), reverse=True)[:most]) for group in groups]
            kept = sorted(range(len(groups)), key=lambda g: (-score[g], g))[: router["groups"]["kept"]]
            candidates = [i for g in kept for i in groups[g]]
        found = sorted(candidates, key=lambda i: (-t[i], i))[: mlp["per_token"]]
        whole = sum(s[i] for i in found) + router["epsilon"] if router["normalised"] else 1.0
        return {i: router["scale"] * s[i] / whole for i in found}

    def experts(self, name: str, mlp: dict[str, Any], x: Vector) -> Vector:
        """SB-C-037 and SB-C-038."""
        y = [0.0] * len(x)
        for i, weight in self.weights(f"{name}.router", mlp, x).items():
            into = mlp["router"]["weighs"] == "input"
            output = self.expert(f"{name}.experts", i, mlp, times(weight, x) if into else x)
            y = added(y, output if into else times(weight, output))
        if mlp["shared"] is None:
            return y
        dense = {key: mlp[key] for key in ("gated", "activation", "bias")}
        shared = self.mlp(f"{name}.shared", dense, x)
        if mlp["shared"]["gate"]:
            (logit,) = self.linear(f"{name}.shared_gate", x)
            shared = times(1 / (1 + math.exp(-logit)), shared)
        return times(0.5 if mlp["shared"]["average"] else 1.0, added(y, shared))

    def expert(self, name: str, i: int, mlp: dict[str, Any], x: Vector) -> Vector:
        def linear(part: str, x: Vector) -> Vector:
            product = [dot(row, x) for row in self.tensors[f"{name}.{part}.weight"][i]]
            return added(product, self.tensors[f"{name}.{part}.bias"][i]) if mlp["bias"] else product

        clamp, slope = mlp["clamp"], mlp["gate_slope"]
        up = linear("up", x)
        if clamp is not None:
            up = [max(-clamp, min(clamp, a)) for a in up]
        if not mlp["gated"]:
            return linear("down", [activate(mlp["activation"], a) for a in up])
        gate = [a if clamp is None else min(clamp, a) for a in linear("gate", x)]
        if mlp["activation"] == "silu":
            gate = [a / (1 + math.exp(-slope * a)) for a in gate]
        else:
            gate = [activate(mlp["activation"], a) for a in gate]
        return linear("down", [a * (b + mlp["up_offset"]) for a, b in zip(gate, up, strict=True)])

    def layer(self, at: str, kind: dict[str, Any], rows: list[Vector]) -> list[Vector]:
        """SB-C-004."""
        r, how = kind["residual_multiplier"], kind["placement"]

        def attention(rows: list[Vector]) -> list[Vector]:
            return self.attention(f"{at}.attention", kind["attention"], rows)

        def mlp(rows: list[Vector]) -> list[Vector]:
            return [self.mlp(f"{at}.mlp", kind["mlp"], x) for x in rows]

        def normed(name: str, rows: list[Vector]) -> list[Vector]:
            return [self.norm(f"{at}.{name}", kind["norm"], x) for x in rows]

        def scaled_sum(rows: list[Vector], *terms: list[Vector], kept: float = 1.0, own: float = 1.0) -> list[Vector]:
            for term in terms:
                rows = [added(times(kept, x), times(own * r, y)) for x, y in zip(rows, term, strict=True)]
            return rows

        if how in ("parallel", "parallel_two"):
            second = "attention_norm" if how == "parallel" else "mlp_norm"
            return scaled_sum(rows, attention(normed("attention_norm", rows)), mlp(normed(second, rows)))
        for block, name in ((attention, "attention"), (mlp, "mlp")):
            given = block(normed(f"{name}_norm", rows) if how in ("pre", "sandwich") else rows)
            if how == "output":
                given = normed(f"{name}_norm", given)
            if how == "sandwich":
                given = normed(f"{name}_output_norm", given)
            scale = kind.get("residual_scales", {}).get(name, {"kept": 1.0, "added": 1.0})
            rows = scaled_sum(rows, given, kept=scale["kept"], own=scale["added"])
            if how == "post":
                rows = normed(f"{name}_norm", rows)
        return rows

    def embed(self, token: int, p: int) -> Vector:
        """SB-C-003 and SB-C-019."""
        embedding, size = self.document["embedding"], self.document["hidden_size"]
        position = embedding["position"]
        x = times(embedding["multiplier"], self.tensors["embedding.token.weight"][token])
        if embedding["token_size"] != size:
            x = self.linear("embedding.projection", x)
        if position["kind"] == "learned":
            x = added(x, self.tensors["embedding.position.weight"][p + position["offset"]])
        if position["kind"] == "sinusoidal":
            half = size // 2
            angles = [(p + position["offset"]) * 10000 ** (-i / (half - 1)) for i in range(half)]
            x = added(x, [*map(math.sin, angles), *map(math.cos, angles), *([0.0] * (size % 2))])
        return x if embedding["norm"] is None else self.norm("embedding.norm", embedding["norm"], x)

    def logits(self, x: Vector) -> Vector:
        """SB-C-017."""
        head, size = self.document["head"], self.document["hidden_size"]
        if head["norm"] is not None:
            x = self.norm("head.norm", head["norm"], x)
        if self.document["embedding"]["token_size"] != size:
            x = self.linear("head.narrowing", x)
        if head["tied"]:
            self.tensors["head.projection.weight"] = self.tensors["embedding.token.weight"]
        x = times(head["multiplier"], self.linear("head.projection", x))
        return x if head["logit_cap"] is None else [head["logit_cap"] * math.tanh(a / head["logit_cap"]) for a in x]

    def run(self, ids: list[int]) -> list[list[Vector]]:
        """Compute a call. Return the hidden states before and after each layer, and the logits."""
        rows = [self.embed(token, p) for p, token in enumerate(ids, self.past)]
        states = [rows]
        for layer, name in enumerate(self.document["layers"]):
            rows = self.layer(f"layers.{layer}", self.document["layer_kinds"][name], rows)
            states.append(rows)
        self.past += len(ids)
        return [*states, [self.logits(x) for x in rows]]


def slope(h: int, heads: int, max_bias: float) -> float:
    """SB-C-024."""
    if heads & (heads - 1) == 0:
        return float(2 ** (-max_bias * (h + 1) / heads))
    n = 1
    while n < heads:
        n *= 2
    order = [*range(2, n + 1, 2), *range(1, n + 1, 2)]
    return float(2 ** (-max_bias * order[h] / n))


def frequency(position: dict[str, Any], i: int, n: int = 0) -> float:
    """SB-C-012 to SB-C-014 and SB-C-026 to SB-C-029, for a row of length n."""
    base, dim, scaling = position["base"], position["dim"], position["scaling"]
    s, c = scaling.get("factor", 1.0), scaling.get("original_positions", 1)
    if scaling["kind"] == "dynamic":
        base *= (s * max(n, c) / c - (s - 1)) ** (dim / (dim - 2))
    f = float(base ** (-2 * i / dim))
    if scaling["kind"] == "linear":
        return f / float(s)
    if scaling["kind"] == "proportional":
        return f / float(s) if i < scaling["pairs"] else 0.0
    if scaling["kind"] == "longrope":
        return f / float(scaling["long_factors" if n > c else "short_factors"][i])
    if scaling["kind"] == "yarn":
        low, high = (
            dim * math.log(c / (2 * math.pi * scaling[beta])) / (2 * math.log(base))
            for beta in ("beta_fast", "beta_slow")
        )
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        share = min(1.0, max(0.0, (i - low) / (high - low)))
        return float(share * f / s + (1 - share) * f)
    if scaling["kind"] == "llama3":
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        wavelength = 2 * math.pi / f
        if wavelength > c / low:
            return float(f / s)
        if wavelength >= c / high:
            r = (c / wavelength - low) / (high - low)
            return float((1 - r) * f / s + r * f)
    return f


def activate(name: str, x: float, alpha_p: float = 0.0, alpha_n: float = 0.0) -> float:
    """SB-C-016."""

    def xielu() -> float:
        if x > 0:
            return math.log(1 + math.exp(alpha_p)) * x**2 + 0.5 * x
        return (0.5 + math.log(1 + math.exp(alpha_n))) * (math.expm1(min(x, -1e-6)) - x) + 0.5 * x

    value: float = {
        "silu": lambda: x / (1 + math.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda: max(x, 0.0),
        "relu_squared": lambda: max(x, 0.0) ** 2,
        "xielu": xielu,
    }[name]()
    return value


class Runtime:
    """The runtime's embedding, layers and head over some tensors. It computes one call at a time, as a stage does."""

    def __init__(self, architecture: architectures.Architecture, tensors: dict[str, torch.Tensor]) -> None:
        def load(module: torch.nn.Module, prefix: str) -> Any:
            names = module.state_dict()
            module.load_state_dict({key: tensors[f"{prefix}.{key}"] for key in names}, assign=True)
            return module

        self.architecture, self.table = architecture, tensors["embedding.token.weight"]
        self.embedding = load(Embedding(architecture, embeds=True), "embedding")
        self.layers = [
            load(Layer(architecture.kind_of(i), architecture.hidden_size, i), f"layers.{i}")
            for i in range(len(architecture.layers))
        ]
        self.head = load(Head(architecture), "head")

    def cache(self, rows: int) -> KVCache:
        layers = (0, len(self.layers))
        return KVCache(self.architecture, layers, rows, LENGTH, torch.device("cpu"), torch.float32)

    def run(
        self, ids: torch.Tensor, cache: KVCache | None = None, count: list[int] | None = None
    ) -> list[torch.Tensor]:
        """A call: the hidden states before and after each layer, and the logits. *Shape:* each (batch, sequence, …)."""
        rows, length = ids.shape
        past = [0] * rows if cache is None else cache.lengths
        positions = Positions(past, count or [length] * rows, length, torch.device("cpu"), torch.float32)
        if cache is not None:
            cache.check(positions)
        with torch.no_grad():
            x = self.embedding(ids, positions)
            states = [x]
            for layer in self.layers:
                x = layer(x, positions, cache)
                states.append(x)
            if cache is not None:
                cache.advance(positions)
            return [*states, self.head(x, self.table)]


def made(architecture: architectures.Architecture) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors, and two rows of token ids."""
    generator = torch.Generator().manual_seed(11)
    shapes = {tensor: shape for unit in architecture.unit_tensors().values() for tensor, shape in unit.items()}
    # Large enough that the result moves if a step is left out, swapped or done twice.
    tensors = {
        tensor: torch.randn(shape, generator=generator)
        * (0.5 if "norm" in tensor or len(shape) == 1 else 1)
        / (1 if "norm" in tensor or len(shape) == 1 else math.sqrt(shape[-1]))
        for tensor, shape in shapes.items()
    }
    return tensors, torch.randint(architecture.vocab_size, (2, LENGTH), generator=generator)


def close(got: torch.Tensor, expected: list[Vector]) -> bool:
    """SB-C-001."""
    reference = torch.tensor(expected, dtype=torch.float64)
    return bool((got.double() - reference).abs().max() <= 1e-5 * reference.abs().max())
