"""Signatures from strangers: each change of a good one is refused, with a code and a place."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import splitbundle
from splitbundle import Bundle, VerificationError
from splitbundle.format import signature_document
from splitbundle.sharing import signing
from tests.support.paths import TESTS
from tests.support.signing_keys import Keys, payload_of

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return splitbundle.open(shutil.copytree(GOLDEN, tmp_path / "b.splitbundle"))


def changed(edit: Callable[[Any], object]) -> Callable[[Any, Any, Any], bytes]:
    """Change the statement, and sign it again with the right key."""

    def make(document: Any, statement: Any, key: Any) -> bytes:
        edit(statement)
        digest = b"".join(bytes.fromhex(each["digest"]) for each in statement["predicate"].get("resources", []))
        if statement["subject"] and "forged" not in statement:
            statement["subject"][0]["digest"] = {"sha256": hashlib.sha256(digest).hexdigest()}
        return signed(json.dumps(statement).encode(), key)

    return make


def signed(payload: bytes, key: Any) -> bytes:
    signature = signing.sign(key, signature_document.pre_authentication_encoding(payload))
    return signature_document.make_envelope(payload, signature, signing.key_hint(key.public_key()))


def outside(edit: Callable[[Any], object]) -> Callable[[Any, Any, Any], bytes]:
    """Change the document around the statement."""

    def make(document: Any, statement: Any, key: Any) -> bytes:
        edit(document)
        return json.dumps(document).encode()

    return make


def flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    return base64.b64encode(data).decode()


def resources(statement: Any) -> list[dict[str, str]]:
    found: list[dict[str, str]] = statement["predicate"]["resources"]
    return found


def put(path: str, value: object) -> Callable[[Any], object]:
    """Set a member, by a path of keys with points."""

    def edit(document: Any) -> None:
        *keys, last = (int(key) if key.isdecimal() else key for key in path.split("/"))
        for key in keys:
            document = document[key]
        document[last] = value

    return edit


def on(path: str, function: Callable[[str], object]) -> Callable[[Any], object]:
    def edit(document: Any) -> None:
        value = document
        for key in path.split("/"):
            value = value[int(key) if key.isdecimal() else key]
        put(path, function(value))(document)

    return edit


SIG = "dsseEnvelope/signatures/0/sig"
PAYLOAD = "dsseEnvelope/payload"
HOSTILE: dict[str, tuple[Callable[[Any, Any, Any], bytes], str]] = {
    "a bit of the payload": (outside(on(PAYLOAD, flipped)), "signature.invalid"),
    "a bit of the signature": (outside(on(SIG, flipped)), "signature.invalid"),
    "no bytes of a signature": (outside(put(SIG, "")), "signature.invalid"),
    "a signature of 2 KiB": (outside(put(SIG, "A" * 2732)), "field.value"),
    "base64 with white space": (outside(on(SIG, lambda text: f"{text}\n")), "field.value"),
    "base64 with other last bits": (outside(put(SIG, "AB==")), "field.value"),
    "base64url": (outside(put(SIG, "-_-_")), "field.value"),
    "base64 cut off": (outside(put(SIG, "AAAAA")), "field.value"),
    "another type of payload": (outside(put("dsseEnvelope/payloadType", "text/plain")), "field.value"),
    "another media type": (outside(put("mediaType", "application/json")), "field.value"),
    "no signatures": (outside(put("dsseEnvelope/signatures", [])), "field.value"),
    "two signatures": (outside(put("dsseEnvelope/signatures", [{"sig": "AAAA"}] * 2)), "field.value"),
    "no key": (outside(put("verificationMaterial", {})), "field.missing"),
    "an array": (lambda document, statement, key: b"[]", "field.type"),
    "no JSON": (lambda document, statement, key: b"x", "json.syntax"),
    "nothing": (lambda document, statement, key: b"", "json.syntax"),
    "a key twice": (
        lambda document, statement, key: json.dumps(document).encode().replace(b"{", b'{"mediaType": 1, ', 1),
        "json.duplicate-key",
    ),
    "nested deeply": (lambda document, statement, key: b"[" * 100_000, "json.depth"),
    "another encoding": (lambda document, statement, key: json.dumps(document).encode("utf-16"), "json.encoding"),
    "a statement that is no JSON": (lambda document, statement, key: signed(b"x", key), "json.syntax"),
    "a statement with a key twice": (
        lambda document, statement, key: signed(
            json.dumps(statement).encode().replace(b"{", b'{"_type": "", ', 1), key
        ),
        "json.duplicate-key",
    ),
    "another type": (changed(put("_type", "https://in-toto.io/Statement/v0.1")), "field.value"),
    "another predicate": (changed(put("predicateType", "https://slsa.dev/provenance/v1")), "field.value"),
    "no subject": (changed(put("subject", [])), "field.value"),
    "two subjects": (changed(lambda s: s["subject"].append(s["subject"][0])), "field.value"),
    "another method": (changed(put("predicate/serialization/method", "shards")), "field.value"),
    "another hash": (changed(put("predicate/serialization/hash_type", "blake2")), "field.value"),
    "another algorithm": (changed(put("predicate/resources/3/algorithm", "md5")), "field.value"),
    "no resources": (changed(put("predicate/resources", [])), "field.value"),
    "a resource twice": (changed(lambda s: resources(s).append(dict(resources(s)[0]))), "field.value"),
    "a digest in capitals": (changed(on("predicate/resources/3/digest", str.upper)), "field.value"),
    "another root digest": (
        changed(lambda s: (put("subject/0/digest/sha256", "0" * 64)(s), put("forged", True)(s))),
        "signature.files",
    ),
    "a digest less": (changed(lambda s: resources(s).pop(4)), "signature.files"),
    "a digest more": (
        changed(lambda s: resources(s).append({**resources(s)[0], "name": "evil.safetensors"})),
        "signature.files",
    ),
    "another digest": (changed(put("predicate/resources/5/digest", "0" * 64)), "signature.files"),
    "without the manifest": (
        changed(lambda s: put("predicate/resources", [r for r in resources(s) if r["name"] != "manifest.json"])(s)),
        "signature.files",
    ),
    "a path in another form": (
        changed(lambda s: [r.update(name=f"./{r['name']}") for r in resources(s)]),
        "signature.files",
    ),
}
"""A change of a good signature, and the code of what follows."""


@pytest.mark.rule("SB-D-019", "SB-D-017", "SB-D-018", "SB-D-023")
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_signatures_from_strangers_are_refused(kind: str, case: str, bundle: Bundle, keys: Keys) -> None:
    private, public = keys.make(kind)
    place = bundle.path / bundle.sign(private).path
    make, code = HOSTILE[case]
    place.write_bytes(make(json.loads(place.read_text()), payload_of(place), keys.keys[kind]))
    with pytest.raises(VerificationError) as caught:
        bundle.verify_signature(public)
    assert set(caught.value.codes) == {code}, caught.value
    assert all(problem.file and problem.file.startswith("signatures/") for problem in caught.value.problems)


def test_the_cases_start_from_a_good_signature(bundle: Bundle, keys: Keys) -> None:
    private, public = keys.make("p256")
    place = bundle.path / bundle.sign(private).path
    for edit in (changed(lambda s: put("more", 1)(s)), outside(lambda d: put("more", [1])(d))):
        place.write_bytes(edit(json.loads(place.read_text()), payload_of(place), keys.keys["p256"]))
        assert bundle.verify_signature(public).files == 15


@pytest.mark.rule("SB-D-019")
def test_a_bundle_that_changes_loses_its_signature(bundle: Bundle, keys: Keys) -> None:
    """Also where every digest in the bundle was written anew."""
    private, public = keys.make("ed25519")
    bundle.sign(private)
    place = bundle.path / "manifest.json"
    place.write_text(place.read_text().replace('"golden-gpt2"', '"golden-gpt3"'))
    with pytest.raises(VerificationError) as caught:
        splitbundle.open(place.parent).verify_signature(public)
    assert set(caught.value.codes) == {"signature.files"}
    assert "sha256" in caught.value.problems[0].expected
    assert "'manifest.json'" in caught.value.problems[0].expected


def test_the_signature_tells_of_a_wrong_hint(bundle: Bundle, keys: Keys) -> None:
    """It names the key and isn't by it: somebody changed it."""
    private, public = keys.make("ed25519")
    place = bundle.path / bundle.sign(private).path
    place.write_bytes(outside(on(PAYLOAD, flipped))(json.loads(place.read_text()), None, None))
    with pytest.raises(
        VerificationError, match=r"got one that names the key and isn't by it\. Don't trust this bundle"
    ):
        bundle.verify_signature(public)
