"""The inputs and outputs of the graph of a part of the model: ``spec/v1/bundle.md``, section "Graphs"."""

from __future__ import annotations

from typing import Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.records import record

OPSET = 24
"""The ONNX operator set of the graphs."""
IR_VERSION = 12
"""The IR version of the ONNX release that has this operator set."""
STANDARD: Final = "standard"
NBITS: Final = "matmul_nbits"
"""The variant of graphs over matrices of 4 bits. It has one operator that ONNX doesn't define."""
VARIANTS: Final = {STANDARD: "float32", "float16": "float16", NBITS: "float32"}
"""A variant of graphs -> the dtype that it computes in."""
DOMAINS: Final = {NBITS: {"com.microsoft": 1}}
"""A variant of graphs -> the domains of its operators beside ONNX's own, with the version of each."""
BODY_NAMES: Final = ("iteration", "condition", "carried")
"""What the body of a loop takes, in order."""


@record(frozen=True, slots=True, kw_only=True)
class Port:
    """An input or an output of a graph."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """The size of each dimension, or its name if each call chooses the size."""

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join(map(str, self.shape))}]"


@record(frozen=True, slots=True, kw_only=True)
class Graph:
    """The ONNX graph of a shard. Its weights are the shard's weight files."""

    file: str
    variant: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def next_name(name: str) -> str:
    """Return the name of the output that becomes an input of the next call."""
    return f"{name}.next"


def cache_names(layers: tuple[int, int]) -> list[str]:
    """Return the names of the KV caches of some layers in a graph."""
    return [f"layers.{layer}.{which}" for layer in range(*layers) for which in ("key", "value")]


def cache_sizes(architecture: Architecture, name: str) -> tuple[int, int]:
    """Return the number of heads and of channels of a KV cache."""
    _, layer, which = name.split(".")
    attention = architecture.kind_of(int(layer)).attention
    return attention.kv_heads, attention.head_dim if which == "key" else attention.value_size


def ports(
    architecture: Architecture, layers: tuple[int, int], *, embeds: bool, head: bool, dtype: str
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Return the inputs and the outputs of a part's graph, in order. The graph computes in ``dtype``."""
    hidden = ("batch", "sequence", architecture.hidden_size)
    first = Port(name="token_ids", dtype="int64", shape=hidden[:2])
    inputs = [first if embeds else Port(name="hidden", dtype="float32", shape=hidden)]
    inputs += [Port(name=name, dtype="int64", shape=("batch",)) for name in ("past", "count")]
    if head:
        inputs.append(Port(name="selected", dtype="int64", shape=("selected",)))
        outputs = [Port(name="logits", dtype="float32", shape=("selected", architecture.vocab_size))]
    else:
        outputs = [Port(name=next_name("hidden"), dtype="float32", shape=hidden)]
    for name in cache_names(layers):
        heads, width = cache_sizes(architecture, name)
        port = Port(name=name, dtype=dtype, shape=("batch", heads, "slots", width))
        inputs.append(port)
        outputs.append(Port(name=next_name(name), dtype=port.dtype, shape=port.shape))
    return tuple(inputs), tuple(outputs)
