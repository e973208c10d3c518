"""The two documents of a bundle in a registry."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jsonschema
import pytest

import splitbundle
import splitbundle_schemas
from splitbundle import BundleError
from splitbundle.format.manifest.document import File
from splitbundle.sharing import model_pack
from splitbundle.sharing.pushing import all_files
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"


def documents() -> tuple[splitbundle.Bundle, dict[str, File], bytes, bytes]:
    bundle = splitbundle.open(GOLDEN)
    files = all_files(bundle)
    config = model_pack.configuration(bundle.manifest, files)
    return bundle, files, config, model_pack.image_manifest(bundle.id, config, files)


def plain(files: dict[str, File]) -> dict[str, tuple[int, str]]:
    return {path: (file.size, file.sha256) for path, file in files.items()}


@pytest.mark.rule("SB-S-020", "SB-S-021", "SB-S-022", "SB-S-023", "SB-S-024", "SB-S-025")
def test_both_documents_follow_their_schemas_and_the_bundle() -> None:
    bundle, files, config, data = documents()
    manifest: dict[str, Any] = json.loads(data)
    jsonschema.validate(manifest, splitbundle_schemas.load("image-manifest"))
    jsonschema.validate(json.loads(config), splitbundle_schemas.load("model-config"))
    assert documents()[2:] == (config, data)
    paths = [layer["annotations"]["org.cncf.model.filepath"] for layer in manifest["layers"]]
    assert paths == ["manifest.json", "SHA256SUMS", *bundle.manifest.files]
    for layer, path in zip(manifest["layers"], paths, strict=True):
        content = (GOLDEN / path).read_bytes()
        assert layer["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        assert layer["size"] == len(content)
        kind = "weight" if path.endswith((".safetensors", ".onnx")) else "doc" if path == "README.md" else None
        assert layer["mediaType"] == f"application/vnd.cncf.model.{kind or 'weight.config'}.v1.raw"
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(config).hexdigest()}"
    assert manifest["annotations"] == {"splitbundle.bundle-id": bundle.id}
    found, claimed = model_pack.parse_image_manifest(data, "x")
    assert plain(found) == plain(files)
    assert claimed == bundle.id


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(12, "12"), (1_500, "1.5K"), (124_439_808, "124.4M"), (6_700_000_000, "6.7B"), (10**12, "1.0T")],
)
def test_the_number_of_parameters(parameters: int, text: str) -> None:
    assert model_pack._size(parameters) == text


def without_manifest(document: dict[str, Any]) -> None:
    del document["layers"][0]


def twice(document: dict[str, Any]) -> None:
    document["layers"].append(document["layers"][3])


def other_digest(document: dict[str, Any]) -> None:
    document["layers"][3]["digest"] = "sha512:" + "0" * 128


def negative(document: dict[str, Any]) -> None:
    document["layers"][3]["size"] = -1


def an_index(document: dict[str, Any]) -> None:
    del document["layers"]
    document["manifests"] = []


@pytest.mark.rule("SB-S-027")
@pytest.mark.parametrize("damage", [without_manifest, twice, other_digest, negative, an_index])
def test_what_is_no_bundle(damage: Any) -> None:
    document = json.loads(documents()[3])
    damage(document)
    with pytest.raises(BundleError) as caught:
        model_pack.parse_image_manifest(json.dumps(document).encode(), "oci://x/y:z")
    assert caught.value.codes == ("remote.manifest",)
    assert caught.value.problems[0].file == "oci://x/y:z"


def test_layers_of_others_are_ignored() -> None:
    _, files, _, data = documents()
    document = json.loads(data)
    document["layers"].append({"mediaType": "text/plain", "digest": "sha256:" + "0" * 64, "size": 3})
    document["unknown"] = {"a": 1}
    assert plain(model_pack.parse_image_manifest(json.dumps(document).encode(), "x")[0]) == plain(files)
