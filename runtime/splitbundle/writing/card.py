"""Write the model card of a bundle."""

from __future__ import annotations

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import Manifest


def model_card(draft: Manifest, architecture: Architecture) -> bytes:
    """Return the bundle's README.md: a model card with front matter. It has only facts of the manifest."""
    model = draft.model
    front = ["---", "library_name: splitbundle", "tags:", "- splitbundle", f"- {model.family}"]
    if model.license:
        front.append(f"license: {model.license}")
    if "/" in model.source:
        front.append(f"base_model: {model.source}")
    rows = [
        f"| {shard.name} | [{shard.layers[0]}, {shard.layers[1]}) | {'yes' if shard.embeds else ''} "
        f"| {'yes' if shard.head else ''} | {shard.parameters:,} | {shard.bytes:,} |"
        for shard in draft.shards
    ]
    changed = (
        [] if model.parent is None else [f"A changed copy of the model with the fingerprint `{model.parent}`.", ""]
    )
    dtype = draft.storage.dtype
    if draft.storage.encodings:
        dtype += f", quantized to {' and '.join(sorted(set(draft.storage.encodings.values())))}"
    text = [
        *front,
        "---",
        "",
        f"# {model.name}",
        "",
        f"The {model.family} model `{model.source}`, {model.parameters:,} parameters in {dtype}, "
        f"{len(architecture.layers)} layers, as a splitbundle: shards that run on their own.",
        "",
        *changed,
        "| shard | layers | embeds | head | parameters | bytes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "```python",
        "import splitbundle",
        "",
        'bundle = splitbundle.open("path/of/this/directory")',
        "logits = bundle.pipeline()(token_ids)",
        f'part = bundle.stage("{draft.shards[0].name}")',
        "```",
        "",
        "`sha256sum -c SHA256SUMS` verifies every file.",
        "",
    ]
    return "\n".join(text).encode("utf-8")
