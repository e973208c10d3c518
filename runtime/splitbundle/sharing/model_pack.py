"""The two documents of a bundle in a registry, by the ModelPack specification of the CNCF.

The manifest is an OCI image manifest (https://github.com/opencontainers/image-spec), with one layer for each file. The
configuration describes the model (https://github.com/modelpack/model-spec). Both follow from the bundle alone, so the
same bundle has the same digest in every registry. ``spec/v1/sharing.md`` has the rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.manifest.document import FILE, File, Manifest

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE: Final = "application/vnd.cncf.model.weight.v1.raw"
DOCUMENT_TYPE: Final = "application/vnd.cncf.model.weight.config.v1.raw"
CARD_TYPE: Final = "application/vnd.cncf.model.doc.v1.raw"
FILE_PATH: Final = "org.cncf.model.filepath"
TITLE: Final = "org.opencontainers.image.title"
"""The name under which general tools for registries, such as oras, write a layer."""
BUNDLE_ID: Final = "splitbundle.bundle-id"
MAX_BYTES: Final = 4 * 2**20
"""The largest manifest that registries have to take."""


def configuration(manifest: Manifest, layers: Mapping[str, File]) -> bytes:
    """Return the configuration document."""
    model = manifest.model
    descriptor: dict[str, Any] = {"name": model.name, "family": model.family}
    if model.revision is not None:
        descriptor["revision"] = model.revision
    if model.license is not None:
        descriptor["licenses"] = [model.license]
    document = {
        "descriptor": descriptor,
        "config": {
            "architecture": "transformer",
            "format": "splitbundle",
            "paramSize": _size(model.parameters),
            "precision": ",".join((*manifest.storage.dtypes, *manifest.storage.extensions)),
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
        },
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in layers.values()]},
    }
    return strict_json.dump(document)


def _size(parameters: int) -> str:
    """Return a number of parameters with one digit after the point, and the letter of its magnitude."""
    for letter, magnitude in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if parameters >= magnitude:
            return f"{parameters / magnitude:.1f}{letter}"
    return str(parameters)


def image_manifest(bundle_id: str, config: bytes, layers: Mapping[str, File]) -> bytes:
    """Return the manifest of a registry.

    Args:
        bundle_id: the bundle id, for people and for ``list``. A reader doesn't believe it.
        config: the configuration document.
        layers: every file, in order, with the bundle's own manifest and its checksums.
    """
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, **_descriptor(len(config), hashlib.sha256(config).hexdigest())},
        "layers": [
            {
                "mediaType": _media_type(path),
                **_descriptor(file.size, file.sha256),
                "annotations": {FILE_PATH: path, TITLE: path},
            }
            for path, file in layers.items()
        ],
        "annotations": {BUNDLE_ID: bundle_id},
    }
    return strict_json.dump(document)


def _descriptor(size: int, sha256: str) -> dict[str, Any]:
    return {"digest": f"sha256:{sha256}", "size": size}


def _media_type(path: str) -> str:
    if path == names.CARD:
        return CARD_TYPE
    return WEIGHT_TYPE if path.endswith((".safetensors", ".onnx")) else DOCUMENT_TYPE


def parse_image_manifest(data: bytes, place: str) -> tuple[dict[str, File], str | None]:
    """Return the files of a registry's manifest by their paths, and the bundle id that it claims.

    Raises:
        BundleError: ``json.*``; ``remote.manifest`` for a manifest that isn't a bundle's.
    """
    found = strict_json.parse(data, place, max_bytes=MAX_BYTES)
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(layers, list):
        kind = found.get("mediaType") if isinstance(found, dict) else found
        raise _no_bundle(place, "", f"a manifest with layers, of the type {MANIFEST_TYPE}", quoted(kind))
    files: dict[str, File] = {}
    for i, layer in enumerate(layers):
        notes = layer.get("annotations") if isinstance(layer, dict) else None
        path = notes.get(FILE_PATH) if isinstance(notes, dict) else None
        if not isinstance(path, str):
            continue  # a layer of another program
        digest, size = layer.get("digest"), layer.get("size")
        good = isinstance(digest, str) and names.IDENTITY.fullmatch(digest)
        if not good or isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise _no_bundle(place, f"/layers/{i}", "a sha256 digest and a size", quoted(layer))
        if path in files:
            raise _no_bundle(place, f"/layers/{i}", "each file once", quoted(path))
        files[path] = File(size=size, sha256=str(digest).removeprefix("sha256:"))
    if FILE not in files:
        raise _no_bundle(place, "/layers", f"a layer with the file {FILE}", f"{len(layers)} layers without one")
    notes = found.get("annotations")
    claimed = notes.get(BUNDLE_ID) if isinstance(notes, dict) else None
    return files, claimed if isinstance(claimed, str) and names.IDENTITY.fullmatch(claimed) else None


def _no_bundle(place: str, pointer: str, expected: str, got: str) -> BundleError:
    hint = "It is no bundle, but something else that a registry can hold"
    return BundleError(
        Problem(code="remote.manifest", file=place, pointer=pointer, expected=expected, got=got, hint=hint)
    )
