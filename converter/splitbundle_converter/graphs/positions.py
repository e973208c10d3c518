"""Add the part of a graph that depends only on positions: slots, rotations, masks. All layers share it.

The equations are those of ``spec/v1/decoder.md``. B rows, S positions of this call, T slots of a cache, H heads.
"""

from __future__ import annotations

import math

import torch

from splitbundle.backends.torch.positions import slopes
from splitbundle.format.architecture.positions import Alibi, AttentionSpan, QueryTemperature
from splitbundle.format.architecture.rotary import Rotary
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.rotary import add_frequencies

CPU = torch.device("cpu")


class GraphPositions:
    """Values of a graph that depend only on positions. Each is added when it is first needed."""

    def __init__(self, graph: GraphBuilder, tokens: str, cache: str) -> None:
        """Add the positions of the call.

        Args:
            graph: The builder of the graph.
            tokens: The first input of the graph, of shape (batch, sequence, …).
            cache: The name of the graph's first cache.
        """
        self.graph, self._cache = graph, cache
        self._built: dict[object, str] = {}
        shape = graph.op("Shape", "positions.shape", tokens, start=0, end=2)
        self.both = shape
        sequence = graph.op("Gather", "positions.sequence", shape, graph.integer(1))
        offsets = graph.op("Range", "positions.offsets", graph.integer(0), sequence, graph.integer(1))
        column = graph.integers(1)
        past = graph.op("Unsqueeze", "positions.past", "past", column)
        count = graph.op("Unsqueeze", "positions.count", "count", column)
        stop = graph.op("Add", "positions.stop", past, count)
        last = graph.op("Sub", "positions.last", stop, graph.integer(1))
        last = graph.op("Max", "positions.last_or_first", last, graph.integer(0))
        self.stop = stop
        # Padding gets the last position of its row, so that every table has a row for it.
        unbounded = graph.op("Add", "positions.unbounded", past, offsets)
        self.slots = graph.op("Min", "positions", unbounded, last)
        """The positions. *Shape:* (batch, sequence), int64."""

    def real(self) -> str:
        """Return the positions in float32. *Shape:* (batch, sequence, 1)."""
        if "real" not in self._built:
            wide = self.graph.op("Unsqueeze", "positions.column", self.slots, self.graph.integers(2))
            self._built["real"] = self.graph.float32("positions.float32", wide)
        return self._built["real"]

    def rotation(self, rotary: Rotary) -> tuple[str, str]:
        """Return the cosines and sines of a rotation. *Shape:* twice (batch, sequence, dim / 2)."""
        if (rotary, "cos") not in self._built:
            graph = self.graph
            name = f"rotation.{sum(isinstance(key, tuple) and key[1:] == ('cos',) for key in self._built)}"
            angles = graph.op("Mul", f"{name}.angles", self.real(), add_frequencies(graph, rotary, name, self.stop))
            factor = getattr(rotary.scaling, "attention_factor", 1.0)
            for part, kind in (("cos", "Cos"), ("sin", "Sin")):
                wave = graph.op(kind, f"{name}.{part}", angles)
                if factor != 1.0:
                    wave = graph.op("Mul", f"{name}.{part}.scaled", wave, graph.number(factor))
                if part == "sin" and rotary.direction is not None:
                    wave = graph.op("Neg", f"{name}.{part}.backward", wave)
                self._built[rotary, part] = wave
        return self._built[rotary, "cos"], self._built[rotary, "sin"]

    def sinusoids(self, offset: int, size: int) -> str:
        """Return sinusoidal positions. *Shape:* (batch, sequence, size)."""
        graph, half = self.graph, size // 2
        rates = torch.exp(torch.arange(half).float() * -(math.log(10000.0) / (half - 1))).tolist()
        moved = graph.op("Add", "embedding.position.moved", self.real(), graph.number(float(offset)))
        angles = graph.op("Mul", "embedding.position.angles", moved, graph.floats(rates))
        waves = [graph.op(kind, f"embedding.position.{kind.lower()}", angles) for kind in ("Sin", "Cos")]
        if size % 2:
            waves.append(graph.op("Mul", "embedding.position.zero", moved, graph.number(0.0)))
        return graph.op("Concat", "embedding.position", *waves, axis=-1)

    def temperature(self, temperature: QueryTemperature) -> str:
        """Return the factor of the queries at each position. *Shape:* (batch, 1, sequence, 1)."""
        if temperature not in self._built:
            graph = self.graph
            name = f"temperature.{sum(isinstance(key, QueryTemperature) for key in self._built)}"
            moved = graph.op("Add", f"{name}.moved", self.slots, graph.integer(temperature.offset))
            if temperature.growth == "power":
                real, length = graph.float32(f"{name}.float32", moved), float(temperature.original_positions)
                share = graph.op("Div", f"{name}.share", real, graph.number(length))
            else:
                whole = graph.op("Div", f"{name}.whole", moved, graph.integer(temperature.original_positions))
                share = graph.float32(f"{name}.float32", whole)
            more = graph.op("Add", f"{name}.more", share, graph.number(1.0))
            grown = graph.op(
                "Mul", f"{name}.grown", graph.op("Log", f"{name}.log", more), graph.number(temperature.beta)
            )
            if temperature.growth == "power":
                factor = graph.op("Exp", f"{name}.factor", grown)
            else:
                factor = graph.op("Add", f"{name}.factor", grown, graph.number(1.0))
            self._built[temperature] = graph.op("Unsqueeze", name, factor, graph.integers(1, 3))
        return self._built[temperature]

    def bias(self, span: AttentionSpan, alibi: Alibi | None, heads: int, kv_heads: int) -> str:
        """Return the bias of the scores: 0 or the ALiBi term where a query may attend to a key, and -∞ elsewhere.

        *Shape:* (batch, 1, 1, sequence, slots), or (batch, kv_heads, heads / kv_heads, sequence, slots) with ALiBi.
        """
        key = (span, alibi, heads, kv_heads) if alibi is not None else (span,)
        if key not in self._built:
            number = sum(isinstance(other, tuple) and isinstance(other[0], AttentionSpan) for other in self._built)
            self._built[key] = self._bias(f"mask.{number}", span, alibi, heads, kv_heads)
        return self._built[key]

    def _bias(self, name: str, span: AttentionSpan, alibi: Alibi | None, heads: int, kv_heads: int) -> str:
        graph = self.graph
        if "keys" not in self._built:
            slots = graph.op("Shape", "mask.slots", self._cache, start=2, end=3)
            slots = graph.op("Squeeze", "mask.slots.number", slots)
            self._built["keys"] = graph.op("Range", "mask.keys", graph.integer(0), slots, graph.integer(1))
            self._built["queries"] = graph.op("Unsqueeze", "mask.queries", self.slots, graph.integers(1, 2, 4))
        keys, queries = self._built["keys"], self._built["queries"]  # [T] and [B, 1, 1, S, 1]
        sees = graph.op("LessOrEqual", f"{name}.causal", keys, queries)
        if span.window is not None:
            first = graph.op("Sub", f"{name}.first", queries, graph.integer(span.window))
            near = graph.op("Greater", f"{name}.near", keys, first)
            sees = graph.op("And", f"{name}.window", sees, near)
        if span.chunk is not None:
            chunks = [
                graph.op("Div", f"{name}.{which}_chunk", value, graph.integer(span.chunk))
                for which, value in (("key", keys), ("query", queries))
            ]
            same = graph.op("Equal", f"{name}.same_chunk", *chunks)
            sees = graph.op("And", f"{name}.chunk", sees, same)
        if alibi is None:
            added = graph.number(0.0)
        else:
            distance = graph.op("Sub", f"{name}.distance", keys, queries)
            slope = slopes(alibi, heads, CPU).reshape(1, kv_heads, heads // kv_heads, 1, 1).tolist()
            added = graph.op("Mul", f"{name}.alibi", graph.float32(f"{name}.float32", distance), graph.floats(slope))
        return graph.op("Where", name, sees, added, graph.number(float("-inf")))
