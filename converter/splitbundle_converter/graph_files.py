"""Adding graphs to a bundle that is being written: one a shard, over the weight files that are there."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx
from onnx import shape_inference

from splitbundle.bundle import Bundle, open_bundle
from splitbundle.graphs import OPSET, ports
from splitbundle.manifest import File, Graph, Shard
from splitbundle.names import CARD
from splitbundle_converter import graph, write
from splitbundle_converter.graph_builder import Stored
from splitbundle_converter.refusal import line

UNREAD: Final = re.compile("Unable to (open|read|parse) proto|filesystem error|could not be canonicalized")
"""How ``onnx.checker``, which reads the files itself, says that the system doesn't let it."""


def add_graphs(root: Path) -> None:
    """Writes a graph for each shard of the bundle in ``root``, which nobody else sees yet, and lists them.

    Each is checked by ``onnx.checker`` in full, and its shapes are inferred strictly.
    """
    bundle = open_bundle(root)
    listed = {path: file for path, file in bundle.manifest.files.items() if path != CARD}
    shards = []
    for shard in bundle.shards:
        path = f"{shard.name}.onnx"
        listed[path] = _write(bundle, shard, root, path)
        inputs, outputs = ports(bundle.architecture, shard.layers, embeds=shard.embeds, head=shard.head)
        own = Graph(file=path, variant="standard", opset=OPSET, inputs=inputs, outputs=outputs)
        shards.append(replace(shard, graph=own))
    write.finish(root, replace(bundle.manifest, shards=tuple(shards), files=listed), bundle.architecture)


def _write(bundle: Bundle, shard: Shard, root: Path, path: str) -> File:
    stored: dict[str, Stored] = {}
    for unit in shard.units:
        for file, (_, found) in zip(bundle.manifest.units[unit], bundle.open_weights(unit), strict=True):
            for name, (tensor, offset) in found.layout.items():
                stored[name] = Stored(file=file, offset=found.start + offset, tensor=tensor)
    model = graph.build(bundle.architecture, shard, stored)
    listed = write.write_file(root, path, model.SerializeToString(deterministic=True))
    _check(root / path)
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return listed


def _check(place: Path) -> None:
    try:
        onnx.checker.check_model(str(place), full_check=True)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        if UNREAD.search(str(error)) is None:
            raise
        raise OSError(errno.EIO, line(error), str(place)) from error
