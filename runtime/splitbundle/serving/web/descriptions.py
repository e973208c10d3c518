"""What the page shows of a model: its parts, where each of them runs and how fast, and what is verified."""

from __future__ import annotations

import time
from typing import Any

from splitbundle.format.manifest.document import version_text
from splitbundle.serving.web.models import Model
from splitbundle.version import FORMAT_VERSION


def describe(model: Model) -> dict[str, Any]:
    """Return what the page shows of a model. ``milliseconds`` is the time of a stage for a call of one token a row."""
    bundle, pipeline = model.bundle, model.pipeline
    manifest, own = bundle.manifest, bundle.manifest.model
    stages = {stage.name: stage for stage in getattr(pipeline, "stages", ())}
    times = getattr(pipeline, "stage_seconds", {})
    elsewhere = getattr(pipeline, "where", "here")
    absent = set(bundle.absent())
    shards = [
        {
            "name": shard.name,
            "layers": list(shard.layers),
            "embeds": shard.embeds,
            "head": shard.head,
            "bytes": shard.bytes,
            "parameters": shard.parameters,
            "backend": getattr(stages.get(shard.name), "backend", None),
            "where": getattr(stages.get(shard.name), "where", elsewhere),
            "milliseconds": round(1000 * times[shard.name], 3) if shard.name in times else None,
            "files": [
                {"name": path, "bytes": file.size, "sha256": file.sha256, "absent": path in absent}
                for path, file in ((path, manifest.files[path]) for path in bundle.files_of(shard))
            ],
        }
        for shard in manifest.shards
    ]
    return {
        "id": model.name,
        "loaded": pipeline is not None,
        "bundle_id": bundle.id,
        "format_version": version_text(FORMAT_VERSION),
        "fingerprint": bundle.fingerprint,
        "name": own.name,
        "architecture": own.family,
        "license": own.license,
        "parameters": own.parameters,
        "layers": len(bundle.architecture.layers),
        "hidden_size": bundle.architecture.hidden_size,
        "vocab_size": bundle.architecture.vocab_size,
        "context_length": own.context_length,
        "dtype": manifest.storage.dtype,
        "backend": next((each["backend"] for each in shards if each["backend"]), None),
        "bytes": sum(file.size for file in manifest.files.values()),
        "chat": model.has_template,
        "verified": "hashes" if bundle.strict else "sizes",
        "shards": shards,
    }


def status(model: Model) -> dict[str, Any]:
    """Return how busy a model is."""
    pipeline = model.pipeline
    if pipeline is None:
        return {"loaded": False}
    state = pipeline.state
    computed = state.get("compute_seconds")
    return {
        "loaded": True,
        "uptime_seconds": round(time.monotonic() - model.loaded_at, 1),
        "tokens_per_second": round(state["new_tokens"] / computed, 1) if computed else None,
        **state,
    }
