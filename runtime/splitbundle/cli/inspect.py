"""The command ``inspect``: show a bundle's model, shards and files."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Final

from splitbundle.bundle import Bundle
from splitbundle.cli.console import Command, Console
from splitbundle.format.manifest.document import BOUNDARY_TENSORS, version_text
from splitbundle.opening import open_bundle
from splitbundle.records import as_dict
from splitbundle.version import FORMAT_VERSION


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, shard=(), progress=console.transfer)
    console.json(describe(bundle))
    model, architecture = bundle.manifest.model, bundle.architecture
    revision = f" at {model.revision}" if model.revision else ""
    console.text(f"{model.name}: {model.family}, {model.parameters:,} parameters in {bundle.manifest.storage.dtype}")
    console.text(f"  source       {model.source}{revision}{f', {model.license}' if model.license else ''}")
    console.text(
        f"  size         {len(architecture.layers)} layers, hidden {architecture.hidden_size}, "
        f"vocabulary {architecture.vocab_size:,}, context {model.context_length or 'not stated'}"
    )
    encodings = bundle.manifest.storage.encodings
    if encodings:
        counts = ", ".join(f"{n} in {name}" for name, n in sorted(Counter(encodings.values()).items()))
        console.text(f"  quantized    {len(encodings)} matrices: {counts}")
    part = bundle.manifest.extensions.get("part")
    if isinstance(part, dict):
        out = [item.get("module") for item in part.get("left_out", []) if isinstance(item, dict)]
        left = f"; without {', '.join(map(str, out))}" if out else ""
        console.text(f"  part         {part.get('name')} of {part.get('of')}{left}")
    if bundle.manifest.requires:
        console.text(f"  requires     {', '.join(bundle.manifest.requires)}")
    console.text(f"  bundle id    {bundle.id}")
    console.text(f"  fingerprint  {bundle.fingerprint}")
    if bundle.manifest.model.parent is not None:
        console.text(f"  parent       a changed copy of {bundle.manifest.model.parent}")
    console.text(f"  architecture {bundle.architecture_id}")
    text, vectors = bundle.manifest.text, bundle.manifest.vectors
    stops = f", stops at {', '.join(map(str, text.stop_ids))}" if text.stop_ids else ""
    console.text(f"  text         {text.tokenizer or 'no tokenizer'}{stops}")
    checked = "none" if vectors is None else f"sequences of {', '.join(map(str, vectors.lengths))} tokens"
    own = "" if vectors is None else f", of {'this bundle itself' if vectors.of_itself else 'the original model'}"
    console.text(f"  vectors      {checked}{own}")
    absent = set(bundle.absent())
    whole = ", ".join(bundle.whole_shards()) or "none"
    state = f"partial: {len(absent)} of {len(bundle.manifest.files)} files are absent; whole shards: {whole}"
    console.text(f"  files        {state if absent else f'all {len(bundle.manifest.files)} are here'}")
    console.text("")
    console.text("shards")
    rows = [
        (
            s.name,
            f"[{s.layers[0]}, {s.layers[1]})",
            ends(s.embeds, s.head),
            s.parameters,
            s.bytes,
            "-" if s.graph is None else s.graph.file,
        )
        for s in bundle.shards
    ]
    console.table(("name", "layers", "with", "parameters", "bytes", "graph"), rows)
    if bundle.manifest.cuts:
        console.text("")
        console.text("boundaries")
        shape = f"(batch, sequence, {architecture.hidden_size})"
        rows_ = [(f"at layer {cut}", f"hidden {shape}, past (batch), count (batch)") for cut in bundle.manifest.cuts]
        console.table(("where", "tensors"), rows_)
    console.text("")
    console.text("files")
    units = {path: unit for unit, paths in bundle.manifest.units.items() for path in paths}
    files = [
        (path, file.size, file.sha256[:16], units.get(path, ""), "absent" if path in absent else "")
        for path, file in bundle.manifest.files.items()
    ]
    console.table(("path", "bytes", "sha256", "unit", ""), files)
    return 0


def ends(embeds: bool, head: bool) -> str:
    """Return what a shard has beside its layers, for people."""
    return " and ".join(part for part, there in (("embedding", embeds), ("head", head)) if there) or "-"


def describe(bundle: Bundle) -> dict[str, object]:
    """Return the output of ``inspect --json``. Its names are those of the manifest."""
    manifest = bundle.manifest
    model = manifest.model
    shapes = (["batch", "sequence", bundle.architecture.hidden_size], ["batch"], ["batch"])
    boundary = dict(zip(BOUNDARY_TENSORS, shapes, strict=True))
    return {
        "ok": True,
        "format_version": version_text(FORMAT_VERSION),
        "requires": list(manifest.requires),
        "bundle_id": bundle.id,
        "fingerprint": bundle.fingerprint,
        "parent": bundle.manifest.model.parent,
        "architecture_id": bundle.architecture_id,
        "model": as_dict(model),
        "architecture": bundle.architecture.as_json(),
        "storage": {
            "dtype": manifest.storage.dtype,
            "exceptions": manifest.storage.exceptions,
            "encodings": manifest.storage.encodings,
        },
        "shards": [as_dict(shard) for shard in manifest.shards],
        "boundaries": [{"at": cut, "tensors": boundary} for cut in manifest.cuts],
        "units": {unit: list(paths) for unit, paths in manifest.units.items()},
        "text": {"tokenizer": manifest.text.tokenizer, "stop_ids": list(manifest.text.stop_ids)},
        "files": {path: {"size": file.size, "sha256": file.sha256} for path, file in manifest.files.items()},
        "absent": list(bundle.absent()),
        "partial": bool(bundle.absent()),
        "whole_shards": list(bundle.whole_shards()),
        "vectors": None if manifest.vectors is None else list(manifest.vectors.lengths),
        "vectors_origin": None if manifest.vectors is None else manifest.vectors.origin,
        "extensions": manifest.extensions,
    }


COMMAND: Final = Command(
    name="inspect", help="show a bundle's model, shards and files", configure=_add_arguments, run=_run
)
