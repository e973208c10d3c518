"""Add rotary positions to a graph: the frequencies, their scaling, and the rotation."""

from __future__ import annotations

import torch

from splitbundle.backends.torch.rotary import frequencies
from splitbundle.format.architecture.rotary import Dynamic, LongRope, Rotary
from splitbundle_converter.graphs.builder import GraphBuilder

CPU = torch.device("cpu")


def add_rotation(graph: GraphBuilder, name: str, x: str, waves: tuple[str, str], rotary: Rotary, head_dim: int) -> str:
    """Rotate the pairs of channels by ``waves``, the cosines and sines.

    *Shape:* (batch, heads, sequence, head_dim) -> the same.
    """
    attributes: dict[str, int] = {"interleaved": int(rotary.layout == "interleaved")}
    if rotary.dim != head_dim:
        attributes["rotary_embedding_dim"] = rotary.dim
    narrow = [graph.to_compute_dtype(wave) for wave in waves]
    return graph.op("RotaryEmbedding", f"{name}.rotated", x, *narrow, **attributes)


def add_frequencies(graph: GraphBuilder, rotary: Rotary, name: str, stop: str) -> str:
    """Add the frequencies. ``stop`` names the number of tokens of each row, (batch, 1).

    *Shape:* (dim / 2), or (batch, 1, dim / 2) if the frequencies depend on the length of the row.
    """
    scaling = rotary.scaling
    if isinstance(scaling, LongRope):
        original = scaling.original_positions
        short, long = (graph.floats(frequencies(rotary, n, CPU).tolist()) for n in (original, original + 1))
        length = graph.op("Unsqueeze", f"{name}.length", stop, graph.integers(2))
        is_long = graph.op("Greater", f"{name}.is_long", length, graph.integer(original))
        return graph.op("Where", f"{name}.frequencies", is_long, long, short)
    if isinstance(scaling, Dynamic):
        exponents = (torch.arange(0, rotary.dim, 2, dtype=torch.float32) / rotary.dim).tolist()
        original = scaling.original_positions
        length = graph.op("Unsqueeze", f"{name}.length", stop, graph.integers(2))
        longest = graph.op("Max", f"{name}.longest", length, graph.integer(original))
        times = graph.op(
            "Mul",
            f"{name}.times",
            graph.float32(f"{name}.float32", longest),
            graph.number(scaling.factor / original),
        )
        growth = graph.op("Sub", f"{name}.growth", times, graph.number(scaling.factor - 1))
        power = graph.op("Pow", f"{name}.power", growth, graph.number(rotary.dim / (rotary.dim - 2)))
        base = graph.op("Mul", f"{name}.base", power, graph.number(rotary.base))
        return graph.op(
            "Reciprocal", f"{name}.frequencies", graph.op("Pow", f"{name}.bases", base, graph.floats(exponents))
        )
    return graph.floats(frequencies(rotary, 0, CPU).tolist())
