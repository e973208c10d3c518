"""The documents of a signature: an in-toto statement about a bundle's files, in a Sigstore bundle.

The statement has the form of OpenSSF model signing, version 1.0. Its root digest is the SHA-256 digest of the digests
that it lists, in their order. A DSSE envelope has the signed statement, and the Sigstore bundle has the envelope.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, VerificationError, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.fields import MAX_PROBLEMS, Field, Problems
from splitbundle.format.manifest.document import File, checksums
from splitbundle.records import record

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
MAX_SIGNATURE_BYTES: Final = 1024
"""The longest signature. One by a key on P-521 has 139 bytes."""
_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}")


@record(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A signed payload."""

    payload: bytes
    signature: bytes
    hint: str | None
    """What the signer says of the key: the SHA-256 digest of its PEM form. It proves nothing."""


@record(frozen=True, slots=True, kw_only=True)
class Statement:
    """What is signed: the digests of all files of a bundle."""

    digests: dict[str, str]
    """The path of each file -> its SHA-256 digest, in the order of the document."""


def digests_of(files: Mapping[str, File], manifest_sha256: str) -> dict[str, str]:
    """Return the digest of every file that a whole bundle has, by path.

    Args:
        files: the listed files.
        manifest_sha256: the digest of manifest.json.
    """
    sums = hashlib.sha256(checksums(files, manifest_sha256)).hexdigest()
    unlisted = {names.MANIFEST: manifest_sha256, names.SUMS: sums}
    return {path: file.sha256 for path, file in files.items()} | unlisted


def make_statement(name: str, digests: Mapping[str, str]) -> bytes:
    """Return the statement about a bundle: its name, and the digests of its files by path."""
    # The order is that of OpenSSF model signing, which compares paths part by part.
    paths = sorted(digests, key=lambda path: path.split("/"))
    resources = [{"name": path, "algorithm": "sha256", "digest": digests[path]} for path in paths]
    return strict_json.dump_compact(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": _root_digest([digests[path] for path in paths])}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
                "resources": resources,
            },
        }
    )


def make_envelope(payload: bytes, signature: bytes, hint: str) -> bytes:
    """Return the Sigstore bundle with a signed statement."""
    return strict_json.dump(
        {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode("ascii"),
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": base64.b64encode(signature).decode("ascii"), "keyid": ""}],
            },
        }
    )


def pre_authentication_encoding(payload: bytes) -> bytes:
    """Return the bytes that a DSSE signature signs: the type of the payload and the payload, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode("ascii"), len(payload), payload)


def parse_envelope(data: bytes, file: str) -> Envelope:
    """Return the envelope in a Sigstore bundle. Members that nothing is read from may have any value.

    Raises:
        BundleError: ``json.*``, ``field.*``: every problem.
    """
    problems = Problems(file)
    root = Field(strict_json.parse(data, file), problems)
    members = root.members(["mediaType", "verificationMaterial", "dsseEnvelope"], open=True)
    members["mediaType"].choice([MEDIA_TYPE])
    key = members["verificationMaterial"].members(["publicKey"], open=True)["publicKey"].members([], open=True)
    hint = key["hint"].string() if "hint" in key else None
    envelope = members["dsseEnvelope"].members(["payload", "payloadType", "signatures"], open=True)
    envelope["payloadType"].choice([PAYLOAD_TYPE])
    payload = _decoded(envelope["payload"], strict_json.MAX_BYTES)
    signatures = [
        item.members(["sig"], open=True)["sig"] for item in envelope["signatures"].items(minimum=1, maximum=1)
    ]
    signed = [_decoded(each, MAX_SIGNATURE_BYTES) for each in signatures]
    problems.raise_if_any()
    return Envelope(payload=payload, signature=signed[0], hint=hint)


def parse_statement(payload: bytes, file: str) -> Statement:
    """Return the statement in a payload. Members that nothing is read from may have any value.

    Raises:
        BundleError: ``json.*``, ``field.*``; ``signature.files`` if its root digest isn't that of its digests.
    """
    said = f"{file} (statement)"
    problems = Problems(said)
    root = Field(strict_json.parse(payload, said), problems)
    members = root.members(["_type", "subject", "predicateType", "predicate"], open=True)
    members["_type"].choice([STATEMENT_TYPE])
    members["predicateType"].choice([PREDICATE_TYPE])
    subjects = [
        item.members(["name", "digest"], open=True)["digest"].members(["sha256"], open=True)["sha256"]
        for item in members["subject"].items(minimum=1, maximum=1)
    ]
    roots = [each.string(names.SHA256, "64 digits of 0-9a-f") for each in subjects]
    predicate = members["predicate"].members(["serialization", "resources"], open=True)
    serialization = predicate["serialization"].members(["method", "hash_type"], open=True)
    serialization["method"].choice(["files"])
    serialization["hash_type"].choice(["sha256"])
    digests: dict[str, str] = {}
    for item in predicate["resources"].items(minimum=1):
        resource = item.members(["name", "algorithm", "digest"], open=True)
        name = resource["name"].string()
        if name in digests:
            resource["name"].refuse("a name that no other resource has")
        resource["algorithm"].choice(["sha256"])
        digests[name] = resource["digest"].string(names.SHA256, "64 digits of 0-9a-f")
    problems.raise_if_any()
    if (computed := _root_digest(list(digests.values()))) != roots[0]:
        raise BundleError(
            Problem(
                code="signature.files",
                file=said,
                pointer="/subject/0/digest/sha256",
                expected=f"the digest of the listed digests, {computed}",
                got=roots[0],
            )
        )
    return Statement(digests=digests)


def check_statement(statement: Statement, expected: Mapping[str, str], file: str) -> None:
    """Check that a statement lists exactly the files of a bundle, with their digests.

    Raises:
        VerificationError: ``signature.files``, with every file that differs.
    """

    def problem(path: str, wanted: str | None, got: str | None) -> Problem:
        there = f"sha256 {wanted} for {quoted(path)}" if wanted else f"nothing for {quoted(path)}, which isn't listed"
        signed = f"sha256 {got}" if got else "none"
        hint = "It is the signature of another bundle, or the bundle was changed"
        return Problem(code="signature.files", file=file, expected=there, got=signed, hint=hint)

    # The manifest first: where it differs, all the rest may.
    paths = dict.fromkeys((names.MANIFEST, *expected, *statement.digests))
    pairs = ((path, expected.get(path), statement.digests.get(path)) for path in paths)
    problems = [problem(*each) for each in pairs if each[1] != each[2]]
    if problems:
        raise VerificationError(problems[:MAX_PROBLEMS])


def _root_digest(digests: list[str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _decoded(field: Field, maximum: int) -> bytes:
    """Return the bytes that a string in base64 stands for. One text stands for them, so that none has a second form."""
    text: Any = field.value
    if not isinstance(text, str):
        field.string()
        return b""
    if not _BASE64.fullmatch(text) or len(text) > 4 * -(-maximum // 3):
        field.refuse(f"at most {maximum} bytes in base64")
        return b""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        data = b""
    if base64.b64encode(data).decode("ascii") != text:
        field.refuse("base64 in its only form")
    return data
