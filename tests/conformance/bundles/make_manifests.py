"""Gives each vector of an accepted architecture the manifest of a bundle of this architecture, in one shard.

    python tests/conformance/bundles/make_manifests.py

So a reader that refuses everything fails these vectors. No weight file is there: only opening is asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from conformance.documents import document
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.architecture.sizes import count
from splitbundle.format.graph import OPSET, Graph, ports
from splitbundle.records import as_dict

NO_DIGEST = "0" * 64
HEADER = 4096
GRAPH = "all.onnx"
MOST = 2**53 - 1
"""The largest integer of a document."""


def main() -> None:
    """Rewrite the vectors."""
    for path in sorted((HERE.parent / "accept").glob("architecture-*.json")):
        vector = json.loads(path.read_text("utf-8"))
        vector["manifest"] = manifest(parse_architecture(document(vector)))
        if vector["manifest"]["model"]["parameters"] == MOST:
            vector["expect_of_manifest"] = {"code": "manifest.model", "pointer": "/model/parameters"}
        short = json.dumps(vector["manifest"], separators=(", ", ": "))
        text = json.dumps(vector | {"manifest": "@"}, indent=2, ensure_ascii=False).replace('"@"', short)
        path.write_text(text + "\n", "utf-8")


def manifest(architecture: Architecture) -> dict[str, Any]:
    """Return a manifest without the entry of ``architecture.json`` and the ids, which the kit adds."""
    units = {unit: architecture.tensors_of(unit) for unit in architecture.units()}
    files = {
        f"{unit}.safetensors": {
            "size": min(HEADER + 4 * count(tensors), 2**40),
            "sha256": NO_DIGEST,
            "header_sha256": NO_DIGEST,
        }
        for unit, tensors in units.items()
    }
    files[GRAPH] = {"size": 1, "sha256": NO_DIGEST}
    layers = len(architecture.layers)
    total = min(count(architecture.tensors()), MOST)
    return {
        "format": "splitbundle",
        "format_version": "1.0",
        "requires": list(architecture.extensions),
        "producer": {},
        "model": {
            "name": "vector",
            "family": "vector",
            "source": "vector",
            "revision": None,
            "license": None,
            "parameters": total,
            "context_length": None,
        },
        "storage": {"encoding": "plain", "dtype": "float32", "exceptions": {}},
        "shards": [
            {
                "name": "all",
                "layers": [0, layers],
                "embeds": True,
                "head": True,
                "units": list(units),
                "bytes": sum(int(str(each["size"])) for path, each in files.items() if path != GRAPH),
                "parameters": total,
                "graph": graph(architecture),
            }
        ],
        "boundaries": [],
        "units": {unit: {"files": [f"{unit}.safetensors"]} for unit in units},
        "files": files,
        "text": {"tokenizer": None, "stop_ids": []},
        "vectors": None,
        "source_names": [
            {"source": name, "tensors": [name], "groups": 1, "transposed": False} for name in _names(architecture)
        ],
        "extensions": {},
    }


def graph(architecture: Architecture) -> dict[str, Any]:
    """Return the entry of a graph of the whole model. Its ports follow from the facts of each layer (SB-O-003)."""
    inputs, outputs = ports(architecture, (0, len(architecture.layers)), embeds=True, head=True, dtype="float32")
    made = Graph(file=GRAPH, variant="standard", opset=OPSET, inputs=inputs, outputs=outputs)
    found: dict[str, Any] = json.loads(json.dumps(as_dict(made)))
    return found


def _names(architecture: Architecture) -> list[str]:
    """Return the logical names, with ``{layer}`` for those that every layer has."""
    names, layers = list(architecture.tensors()), len(architecture.layers)
    short: dict[str, int] = {}
    for name in names:
        start, _, rest = name.partition(".")
        _, _, rest = rest.partition(".")
        key = f"layers.{{layer}}.{rest}" if start == "layers" else name
        short[key] = short.get(key, 0) + 1
    found = [name for name, times in short.items() if "{layer}" not in name or times == layers]
    taken = {name.replace("{layer}", str(i)) for name in found for i in range(layers)}
    return [*found, *(name for name in names if name not in taken)]


if __name__ == "__main__":
    main()
