"""Adding graphs to a bundle that is being written: one a shard, over the weight files that are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
from onnx import shape_inference

from splitbundle.bundle import Bundle, open_bundle
from splitbundle.graphs import OPSET, ports
from splitbundle.manifest import VARIANTS, File, Graph, Shard
from splitbundle.names import CARD
from splitbundle_converter import graph, write
from splitbundle_converter.genai_files import write_genai
from splitbundle_converter.graph_builder import Stored


def add_graphs(root: Path, variant: str, *, genai: bool = False) -> None:
    """Writes a graph for each shard of the bundle in ``root``, which nobody else sees yet, and lists them.

    Each is checked by ``onnx.checker`` in full, and its shapes are inferred strictly.

    Args:
        root: the bundle's directory.
        genai: whether to write what onnxruntime-genai needs, too.

    Raises:
        BundleError: ``usage.genai``.
    """
    bundle = open_bundle(root)
    listed = {path: file for path, file in bundle.manifest.files.items() if path != CARD}
    shards = []
    for shard in bundle.shards:
        path = f"{shard.name}.onnx"
        dtype = VARIANTS[variant]
        listed[path] = _write(bundle, shard, root, path, dtype)
        inputs, outputs = ports(bundle.architecture, shard.layers, embeds=shard.embeds, head=shard.head, dtype=dtype)
        own = Graph(file=path, variant=variant, opset=OPSET, inputs=inputs, outputs=outputs)
        shards.append(replace(shard, graph=own))
    draft = replace(bundle.manifest, shards=tuple(shards), files=listed)
    if genai:
        draft = replace(draft, files=listed | write_genai(draft, bundle.architecture, root))
    write.finish(root, draft, bundle.architecture)


def _write(bundle: Bundle, shard: Shard, root: Path, path: str, dtype: str) -> File:
    stored: dict[str, Stored] = {}
    for unit in shard.units:
        for file, (_, found) in zip(bundle.manifest.units[unit], bundle.open_weights(unit), strict=True):
            for name, (tensor, offset) in found.layout.items():
                stored[name] = Stored(file=file, offset=found.start + offset, tensor=tensor)
    model = graph.build(bundle.architecture, shard, stored, dtype)
    listed = write.write_file(root, path, model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(root / path), full_check=True)
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return listed
