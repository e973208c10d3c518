"""Validate a bundle's documents against the published schemas."""

from __future__ import annotations

import json

from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.manifest import document
from splitbundle.storage.reader import BundleReader


def check_schemas(bundle: BundleReader) -> None:
    """Validate the documents of a bundle, so that other implementations can read them.

    Raises:
        jsonschema.ValidationError: A document does not match its schema.
    """
    import jsonschema

    import splitbundle_schemas

    documents = {"manifest": document.FILE, "architecture": architectures.FILE}
    if bundle.manifest.model.text_file is not None:
        documents["text"] = bundle.manifest.model.text_file
    for schema, name in documents.items():
        value = json.loads((bundle.path / name).read_bytes())
        jsonschema.Draft202012Validator(splitbundle_schemas.load(schema)).validate(value)
