"""Write the small files of a bundle: the model card, the manifest, and the checksums."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from splitbundle.format import names
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest import document, rules
from splitbundle.format.manifest.document import File, Manifest
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.writing.card import model_card


def write_file(root: Path, path: str, data: bytes) -> File:
    """Write a small file of the bundle, and return its entry in the manifest."""
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return File(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_documents(root: Path, draft: Manifest, architecture: Architecture) -> Manifest:
    """Write the model card, manifest.json and SHA256SUMS. Check the manifest before, by the rules for readers.

    Returns:
        The manifest with all files listed.
    """
    listed = {**draft.files, names.CARD: write_file(root, names.CARD, model_card(draft, architecture))}
    complete = replace(draft, files=dict(sorted(listed.items())))
    data = complete.to_bytes()
    rules.check_against(parse_manifest(data), architecture)
    write_file(root, document.FILE, data)
    write_file(root, names.SUMS, document.checksums(complete.files, hashlib.sha256(data).hexdigest()))
    return complete
