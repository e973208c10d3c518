"""The model card of an exported checkpoint. It marks the directory as one that an export may replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from splitbundle.bundle import Bundle
from splitbundle.errors import printable
from splitbundle_converter.checkpoint.file_names import CARD, CONFIG, GENERATION, TEMPLATES, TEXT_FILES

_FRONT: Final = "---\nlibrary_name: transformers\ntags:\n- splitbundle-export\n"
_NAMES: Final = frozenset({CARD, CONFIG, GENERATION, TEMPLATES, *TEXT_FILES})


def exported_card(bundle: Bundle, adapter: str | None) -> bytes:
    """Return the card, with the facts of the manifest, and the name of the adapter that was merged."""
    model = bundle.manifest.model
    front = [f"license: {json.dumps(model.license)}"] if model.license else []
    if "/" in model.source:
        front.append(f"base_model: {json.dumps(model.source)}")
    facts = [f"Exported from a splitbundle with the fingerprint `{bundle.fingerprint}`."]
    if model.parent is not None:
        facts.append(f"Its weights were changed; those of its parent have the fingerprint `{model.parent}`.")
    if adapter is not None:
        facts.append(f"The adapter `{printable(adapter)}` is merged into the weights.")
    lines = [*front, "---", "", f"# {printable(model.name)}", "", f"The model `{printable(model.source)}`.", "", *facts]
    return (_FRONT + "\n".join(lines) + "\n").encode("utf-8")


def is_export(path: Path) -> bool:
    """Return whether a directory is empty, or is an exported checkpoint and nothing else. Only such may be replaced."""
    if path.is_symlink() or not path.is_dir():
        return False
    entries = list(path.iterdir())
    if not entries:
        return True
    weights = (".safetensors", ".safetensors.index.json")
    known = all(
        entry.name in _NAMES or (entry.name.startswith("model") and entry.name.endswith(weights)) for entry in entries
    )
    card = path / CARD
    if not known or card.is_symlink() or not card.is_file():
        return False
    with card.open("rb") as opened:
        return opened.read(len(_FRONT)) == _FRONT.encode("ascii")
