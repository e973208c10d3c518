"""Add a mixture of experts to a graph. The equations are in ``spec/v1/decoder.md``.

The router computes in float32. A ``Loop`` over the chosen experts takes the matrices of one expert at a time from the
stacked weights. So onnxruntime reads only the chosen experts from the weight files, which it maps.
"""

from __future__ import annotations

import math

from splitbundle.format.architecture.experts import Experts
from splitbundle.format.weight_layout import SCALE
from splitbundle_converter.graphs.feedforward import add_activation, add_mlp
from splitbundle_converter.graphs.operations import Operations
from splitbundle_converter.graphs.products import add_integer_product, add_unpacked_product


def add_experts(operations: Operations, name: str, x: str, experts: Experts, hidden: int) -> str:
    """Add a mixture of experts, and return the name of its output. *Shape:* (rows, hidden) -> the same."""
    graph, shared, block = operations.graph, experts.shared, experts.shared_block
    weights, chosen = _Routing(operations, f"{name}.router", experts).add(x)
    result = _Chosen(operations, f"{name}.experts", x, experts, hidden).add(weights, chosen)
    if shared is None or block is None:
        return result
    other = add_mlp(operations, f"{name}.shared", x, block)
    if shared.gate:
        gate = operations.linear(f"{name}.shared_gate", x, bias=False)
        other = graph.op(
            "Mul", f"{name}.shared.gated_output", graph.op("Sigmoid", f"{name}.shared_gate.sigmoid", gate), other
        )
    result = graph.op("Add", f"{name}.sum", result, other)
    return operations.times(f"{name}.average", result, 0.5) if shared.average else result


class _Routing:
    """The choice of experts for each row, in float32."""

    def __init__(self, operations: Operations, name: str, experts: Experts) -> None:
        self.operations, self.graph, self.name = operations, operations.graph, name
        self.experts, self.router = experts, experts.router

    def add(self, x: str) -> tuple[str, str]:
        """Add the router, and return the names of the weights and of the chosen experts.

        *Shape:* (rows, hidden) -> (rows, per_token), (rows, per_token).
        """
        graph, name, router = self.graph, self.name, self.router
        weight = graph.weight(f"{name}.weight", "float32")
        biases = [graph.weight(f"{name}.bias", "float32")] if router.bias else []
        logits = graph.op("Gemm", name, graph.cast(x, graph.dtype, "float32"), weight, *biases, transB=1)
        if router.logit_cap is not None:
            logits = self.operations.cap(f"{name}.capped", logits, router.logit_cap)
        weights, chosen = self._sparsemixer(logits) if router.function == "sparsemixer" else self._best(logits)
        if router.scale != 1.0:
            weights = graph.op("Mul", f"{name}.scaled", weights, graph.number(router.scale))
        return weights, chosen

    def _best(self, logits: str) -> tuple[str, str]:
        graph, name, router = self.graph, self.name, self.router
        if router.function == "softmax":
            scores = graph.op("Softmax", f"{name}.scores", logits, axis=-1)
        else:
            scores = graph.op("Sigmoid", f"{name}.scores", logits)
        ranked = scores
        if router.correction is not None:
            correction = graph.weight(f"{name}.correction", "float32")
            ranked = graph.op(
                "Add", f"{name}.corrected", scores if router.correction == "score" else logits, correction
            )
        if router.groups is not None:
            ranked = self._of_best_groups(ranked)
        _, chosen = graph.largest(f"{name}.best", ranked, self.experts.per_token)
        weights = graph.op("GatherElements", f"{name}.weights", scores, chosen, axis=1)
        if router.normalised:
            total = graph.op("ReduceSum", f"{name}.total", weights, graph.integers(1), keepdims=1)
            if router.epsilon:
                total = graph.op("Add", f"{name}.total.more", total, graph.number(router.epsilon))
            weights = graph.op("Div", f"{name}.normalised", weights, total)
        return weights, chosen

    def _of_best_groups(self, ranked: str) -> str:
        """Replace the scores of experts outside the best groups by -∞. *Shape:* (rows, experts) -> the same."""
        graph, name, groups, count = self.graph, f"{self.name}.groups", self.router.groups, self.experts.count
        if groups is None:
            return ranked
        shape = graph.integers(-1, groups.count, count // groups.count)
        by_group = graph.op("Reshape", f"{name}.scores", ranked, shape)
        largest, _ = graph.largest(f"{name}.largest", by_group, 1 if groups.score == "max" else 2)
        best = graph.op("ReduceSum", f"{name}.score", largest, graph.integers(2), keepdims=0)  # [rows, groups]
        _, kept = graph.largest(f"{name}.best", best, groups.kept)
        # A group is kept if its number is one of the kept numbers.
        each = graph.op("Unsqueeze", f"{name}.kept", kept, graph.integers(2))
        same = graph.op("Equal", f"{name}.same", each, graph.integers(*range(groups.count)))  # [rows, kept, groups]
        found = graph.op("ReduceSum", f"{name}.found", graph.float32(f"{name}.same.float32", same), graph.integers(1))
        inside = graph.op("Greater", f"{name}.inside", found, graph.number(0.0))  # [rows, 1, groups]
        inside = graph.op("Reshape", f"{name}.inside.by_group", inside, graph.integers(-1, groups.count, 1))
        masked = graph.op("Where", f"{name}.masked", inside, by_group, graph.number(-math.inf))
        return graph.op("Reshape", f"{name}.masked.flat", masked, graph.integers(-1, count))

    def _sparsemixer(self, logits: str) -> tuple[str, str]:
        """Choose the largest logit, twice. Its weight is a softmax over the logits near it (arXiv:2409.12136)."""
        graph, left, found = self.graph, logits, []
        least, numbers = graph.number(-math.inf), graph.integers(*range(self.experts.count))
        magnitude = graph.op("Max", f"{self.name}.magnitude", logits, graph.op("Neg", f"{self.name}.negative", logits))
        for i in range(self.experts.per_token):
            name = f"{self.name}.choice_{i}"
            largest, index = graph.largest(f"{name}.largest", left, 1)
            below = graph.op("Sub", f"{name}.below", largest, logits)
            scale = graph.op("Max", f"{name}.scale", magnitude, largest)
            distance = graph.op("Div", f"{name}.distance", below, scale)
            far = graph.op("Greater", f"{name}.far", distance, graph.number(2 * self.router.epsilon))
            near = graph.op("Softmax", f"{name}.near", graph.op("Where", f"{name}.left", far, least, left), axis=-1)
            found.append((graph.op("GatherElements", f"{name}.weight", near, index, axis=1), index))
            taken = graph.op("Equal", f"{name}.taken", index, numbers)
            left = graph.op("Where", f"{name}.others", taken, least, left)
        weights = graph.op("Concat", f"{self.name}.weights", *(weight for weight, _ in found), axis=1)
        return weights, graph.op("Concat", f"{self.name}.chosen", *(index for _, index in found), axis=1)


class _Chosen:
    """The sum of the chosen experts of each row."""

    def __init__(self, operations: Operations, name: str, x: str, experts: Experts, hidden: int) -> None:
        self.operations, self.graph, self.name = operations, operations.graph, name
        self.x, self.experts, self.hidden = x, experts, hidden

    def add(self, weights: str, chosen: str) -> str:
        """Add the loop over the experts that a row has chosen, and return the name of the sum.

        *Shape:* (rows, per_token), (rows, per_token) -> (rows, hidden).
        """
        graph, name = self.graph, self.name
        flat = graph.integers(-1)
        self.weights = graph.op("Reshape", f"{name}.weights", graph.to_compute_dtype(weights), graph.integers(-1, 1))
        self.chosen = graph.op("Reshape", f"{name}.chosen", chosen, flat)
        self.present = graph.op("Unique", f"{name}.present", self.chosen)
        count = graph.op("Size", f"{name}.count", self.present)
        shape = graph.op("Shape", f"{name}.shape", self.x)
        self.rows = {count: self._rows(count) for count in (self.experts.intermediate_size, self.hidden)}
        nothing = graph.op("Expand", f"{name}.nothing", graph.number(0.0, graph.dtype), shape)
        return graph.loop(name, count, nothing, self.hidden, self._one)

    def _one(self, iteration: str, result: str) -> str:
        """Add one expert's outputs to the rows that have chosen it."""
        graph, name, per_token = self.graph, self.name, self.experts.per_token
        self.expert = graph.op("Gather", f"{name}.expert", self.present, iteration)
        self.first = graph.op("Mul", f"{name}.first", self.expert, graph.integers(1, 0))
        own = graph.op("NonZero", f"{name}.own", graph.op("Equal", f"{name}.is_own", self.chosen, self.expert))
        choices = graph.op("Reshape", f"{name}.choices", own, graph.integers(-1))
        rows = graph.op("Div", f"{name}.rows", choices, graph.integer(per_token)) if per_token > 1 else choices
        x = graph.op("Gather", f"{name}.x", self.x, rows)
        weight = graph.op("Gather", f"{name}.weight", self.weights, choices)
        if self.experts.router.weighs == "input":
            y = self._block(graph.op("Mul", f"{name}.x.weighted", x, weight))
        else:
            y = graph.op("Mul", f"{name}.y.weighted", self._block(x), weight)
        # No row has chosen an expert twice, so each row is at most once in ``rows``.
        before = graph.op("Gather", f"{name}.before", result, rows)
        after = graph.op("Add", f"{name}.after", before, y)
        places = graph.op("Unsqueeze", f"{name}.places", rows, graph.integers(1))
        return graph.op("ScatterND", f"{name}.result", result, places, after)

    def _block(self, x: str) -> str:
        """Add one expert. *Shape:* (rows, hidden) -> the same."""
        operations, graph, name, experts = self.operations, self.graph, self.name, self.experts
        up, clamp = self._linear("up", x), experts.clamp
        if not experts.gated:
            up = operations.clip(f"{name}.up", up, clamp)
            return self._linear("down", add_activation(graph, f"{name}.up", up, experts.activation))
        gate = self._linear("gate", x)
        if clamp is not None:
            up = operations.clip(f"{name}.up", up, clamp)
            gate = graph.op("Min", f"{name}.gate.clipped", gate, graph.number(clamp, graph.dtype))
        if experts.gate_slope == 1.0:
            gate = add_activation(graph, f"{name}.gate", gate, experts.activation)
        else:
            steep = operations.times(f"{name}.gate.steep", gate, experts.gate_slope)
            gate = graph.op("Mul", f"{name}.gate.activation", gate, graph.op("Sigmoid", f"{name}.gate.sigmoid", steep))
        if experts.up_offset:
            up = graph.op("Add", f"{name}.up.moved", up, graph.number(experts.up_offset, graph.dtype))
        return self._linear("down", graph.op("Mul", f"{name}.gated", gate, up))

    def _linear(self, part: str, x: str) -> str:
        """Multiply by the expert's matrix and add its bias. *Shape:* (rows, in) -> (rows, out)."""
        name = f"{self.name}.{part}"
        graph, rows = self.graph, self.hidden if part == "down" else self.experts.intermediate_size
        # onnxruntime copies what it gathers: single rows on all threads, but a matrix on one thread.
        index = f"{self.name}.matrix_of_{rows}_rows"
        if not graph.has(index):
            graph.op("Add", index, self.rows[rows], self.first)
        biases = [self._own("Gather", f"{name}.bias", self.expert)] if self.experts.bias else []
        weight = f"{name}.weight"
        encoding = graph.encoding(weight)
        if encoding is None:
            return graph.op("Gemm", name, x, self._own("GatherND", weight, index), *biases, transB=1)
        codes = graph.op("GatherND", f"{weight}.own", graph.stored(weight), index)
        scale, own = self._own("Gather", f"{weight}{SCALE}", self.expert), f"{name}.product" if biases else name
        if encoding.block is None:
            y = add_integer_product(graph, own, x, codes, scale, graph.stored_shape(weight)[1:])
        else:
            y = add_unpacked_product(graph, own, x, codes, scale, encoding)
        return graph.op("Add", name, y, *biases) if biases else y

    def _own(self, operator: str, stacked: str, index: str) -> str:
        """Take one expert's tensor, and cast that alone."""
        graph = self.graph
        taken = graph.op(operator, f"{stacked}.own", graph.stored(stacked), index)
        return graph.cast(taken, graph.stored_dtype(stacked), graph.dtype)

    def _rows(self, count: int) -> str:
        """Return the places of the rows of the first expert's matrix. *Shape:* (count, 2)."""
        graph, name = self.graph, f"shapes.rows_{count}"
        if graph.has(name):
            return name
        numbers = graph.op("Range", f"{name}.numbers", graph.integer(0), graph.integer(count), graph.integer(1))
        column = graph.op("Reshape", f"{name}.column", numbers, graph.integers(-1, 1))
        return graph.op("Mul", name, column, graph.integers(0, 1))
