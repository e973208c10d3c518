"""Products with quantized weights in a graph: what they compute for any input, and which rows of a table they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy
import onnxruntime
import pytest
import torch

from splitbundle.backends.onnxruntime.graph import FOLDER
from splitbundle.backends.torch.quantized import dequantized
from splitbundle.backends.torch.weights import DTYPES
from splitbundle.format.encodings import TABLE, Encoding
from splitbundle.format.graph import NBITS, STANDARD, Port
from splitbundle.format.weight_layout import Stored, Tensor
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.operations import Operations

ROWS, COLUMNS = 64, 256
ENCODINGS = [pytest.param(encoding, id=name) for name, encoding in TABLE.items()]


def stored(root: Path, encoding: Encoding) -> tuple[dict[str, Stored], torch.Tensor]:
    """Write a matrix with every code, and return its places and its numbers."""
    generator, data = torch.Generator().manual_seed(1), b""
    places, made = {}, []
    for name, tensor in encoding.stored("own.weight", (ROWS, COLUMNS)).items():
        if tensor.dtype == "bfloat16":
            value = (torch.randn(tensor.shape, generator=generator) / 64).bfloat16()
        else:
            bits = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
            value = bits.view(DTYPES[tensor.dtype])
        places[name] = Stored(
            file="weights.bin", offset=len(data), tensor=Tensor(dtype=tensor.dtype, shape=tensor.shape)
        )
        data += value.view(torch.uint8).numpy().tobytes()
        made.append(value)
    (root / "weights.bin").write_bytes(data)
    return places, dequantized(made[0], made[1], encoding, torch.float32)


def session(root: Path, graph: GraphBuilder) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(FOLDER, str(root))
    options.intra_op_num_threads = 1
    data = graph.model("product").SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.mark.rule("SB-O-021")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_product_with_any_input(encoding: Encoding, tmp_path: Path) -> None:
    """Each row has its own scale: zeros, small and large numbers, an outlier and NaN leave other rows as they are."""
    places, weight = stored(tmp_path, encoding)
    graph = GraphBuilder(places, STANDARD if encoding.block is None else NBITS)
    graph.input(Port(name="x", dtype="float32", shape=("rows", COLUMNS)))
    Operations(graph, cast("Any", None)).product("y", "x", "own.weight")
    graph.output(Port(name="y", dtype="float32", shape=("rows", ROWS)))
    run = session(tmp_path, graph)
    x = numpy.random.default_rng(2).standard_normal((8, COLUMNS)).astype(numpy.float32)
    x[1], x[2], x[3] = 0, x[0] * 1e-12, x[0] * 1e12
    x[4, 7] *= 100
    plain = run.run(None, {"x": x})[0]
    exact = x.astype(numpy.float64) @ weight.double().numpy().T
    largest = numpy.abs(exact).max(axis=1)
    off = numpy.abs(plain - exact).max(axis=1)
    limit = 5e-4 if encoding.block is None else 2e-2
    assert not plain[1].any()
    assert (off[[0, 2, 3, 5, 6, 7]] <= limit * largest[[0, 2, 3, 5, 6, 7]]).all()
    assert off[4] <= 10 * limit * largest[4]
    x[5], x[6] = numpy.nan, numpy.inf
    broken = run.run(None, {"x": x})[0]
    assert not numpy.isfinite(broken[5:7]).any()
    assert (numpy.delete(broken, (5, 6), axis=0) == numpy.delete(plain, (5, 6), axis=0)).all()
    assert run.run(None, {"x": x[:0]})[0].shape == (0, ROWS)
    numpy.testing.assert_allclose(run.run(None, {"x": x[:1]})[0], plain[:1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_of_a_table_are_exact(encoding: Encoding, tmp_path: Path) -> None:
    places, weight = stored(tmp_path, encoding)
    graph = GraphBuilder(places)
    graph.input(Port(name="ids", dtype="int64", shape=("batch", "sequence")))
    Operations(graph, cast("Any", None)).rows("own", "ids")
    graph.output(Port(name="own", dtype="float32", shape=("batch", "sequence", COLUMNS)))
    ids = numpy.array([[0, 63, 5], [5, 1, 2]])
    (found,) = session(tmp_path, graph).run(None, {"ids": ids})
    assert (found == weight[torch.from_numpy(ids)].numpy()).all()
