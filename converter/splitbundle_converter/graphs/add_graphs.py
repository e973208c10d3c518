"""Add graphs to a bundle that is being written: one graph for each shard, which refers to the bundle's weight files."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx
from onnx import shape_inference

from splitbundle.bundle import Bundle
from splitbundle.format.graph import OPSET, VARIANTS, Graph, ports
from splitbundle.format.manifest.document import File, Shard
from splitbundle.format.names import CARD
from splitbundle.opening import open_bundle
from splitbundle.verification import onnx_rules
from splitbundle.writing import documents
from splitbundle_converter.errors import line
from splitbundle_converter.graphs import decoder
from splitbundle_converter.graphs.genai import write_genai

UNREAD: Final = re.compile("Unable to (open|read|parse) proto|filesystem error|could not be canonicalized")
"""Messages of ``onnx.checker`` for errors of the operating system. The checker reads the files itself."""


def add_graphs(root: Path, variant: str, *, genai: bool = False) -> None:
    """Write a graph for each shard of the bundle in ``root``, and list the graphs in the manifest.

    Each graph must pass the rules of the runtime, the full check of ``onnx.checker``, and strict shape inference.

    Args:
        root: The directory of the bundle. It is not at its destination yet, so no other process uses it.
        variant: The variant of the graphs.
        genai: Whether to write the configuration and the graphs for onnxruntime-genai too.

    Raises:
        BundleError: ``usage.genai``.
        OSError: ``onnx.checker`` can't read a file.
    """
    bundle = open_bundle(root)
    listed = {path: file for path, file in bundle.manifest.files.items() if path != CARD}
    shards = []
    for shard in bundle.shards:
        path = f"{shard.name}.onnx"
        inputs, outputs = ports(
            bundle.architecture, shard.layers, embeds=shard.embeds, head=shard.head, dtype=VARIANTS[variant]
        )
        own = Graph(file=path, variant=variant, opset=OPSET, inputs=inputs, outputs=outputs)
        listed[path] = _write(bundle, shard, root, own)
        shards.append(replace(shard, graph=own))
    draft = replace(bundle.manifest, shards=tuple(shards), files=listed)
    if genai:
        draft = replace(draft, files=listed | write_genai(draft, bundle.architecture, root))
    documents.write_documents(root, draft, bundle.architecture)


def _write(bundle: Bundle, shard: Shard, root: Path, own: Graph) -> File:
    stored = bundle.locate_tensors(shard)
    model = decoder.build(bundle.architecture, shard, stored, own.variant)
    data = model.SerializeToString(deterministic=True)
    onnx_rules.check(data, own, onnx_rules.used(shard, stored))
    listed = documents.write_file(root, own.file, data)
    _check(root / own.file)
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return listed


def _check(place: Path) -> None:
    try:
        onnx.checker.check_model(str(place), full_check=True)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        if UNREAD.search(str(error)) is None:
            raise
        raise OSError(errno.EIO, line(error), str(place)) from error
