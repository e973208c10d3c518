"""Sign a bundle, and check who signed it. A signature covers the digests that the manifest lists, and the manifest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from splitbundle.errors import BundleError, Problem, VerificationError, quoted, wrong_argument
from splitbundle.format import names, strict_json
from splitbundle.format.manifest.document import checksums
from splitbundle.format.signature_document import (
    MEDIA_TYPE,
    Envelope,
    check_statement,
    digests_of,
    make_envelope,
    make_statement,
    parse_envelope,
    parse_statement,
    pre_authentication_encoding,
)
from splitbundle.records import record
from splitbundle.sharing import signing
from splitbundle.sharing.signing import Password, PublicKey
from splitbundle.storage import signature_files
from splitbundle.storage.files import Progress, is_there, read_file
from splitbundle.storage.reader import BundleReader
from splitbundle.verification.verify import check_digests
from splitbundle.writing.atomic_file import atomic_file

MAX_PROBLEMS = 100


@record(frozen=True, slots=True, kw_only=True)
class Signature:
    """A signature of a bundle that was made, or that was checked and holds."""

    path: str
    """The path of the file: in the bundle, or where it was given."""
    key: str
    """``sha256:`` and the digest of the public key in DER (SubjectPublicKeyInfo)."""
    public_key: str | None = None
    """The file of the public key that proved it."""
    files: int = 0
    """The number of files that it covers."""


def sign(
    bundle: BundleReader,
    key: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    name: str | None = None,
    password: str | Password | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Signature:
    """Sign a bundle. See ``Bundle.sign``."""
    given = password
    private = signing.load_private_key(key, given if callable(given) else lambda: given)
    public = private.public_key()
    digest = signing.key_digest(public)
    path = names.signature_path(digest[:16] if name is None else name)
    if not names.is_signature(path):
        expected = "a name of 1 to 86 of a-z 0-9 . _ -, not first . or -, and no name that Windows reserves"
        raise wrong_argument("name", expected, quoted(name))
    _check_files(bundle, progress)
    digests = digests_of(bundle.manifest.files, bundle.id.removeprefix("sha256:"))
    payload = make_statement(bundle.manifest.model.name, digests)
    signed = signing.sign(private, pre_authentication_encoding(payload))
    data = make_envelope(payload, signed, signing.key_hint(public))
    if len(data) > signature_files.MAX_BYTES:
        expected, got = f"a signature of at most {signature_files.MAX_BYTES} bytes", f"{len(data)} bytes"
        raise BundleError(Problem(code="json.size", file=path, expected=expected, got=got))
    if output is None:
        _check_number(bundle, path)
    target = bundle.path / path if output is None else Path(os.path.abspath(output))
    beside = _beside(bundle.path) if output is None else None
    with atomic_file(target, force=force, ours=_is_signature, beside=beside) as file:
        file.write(data)
    said = path if output is None else str(output)
    return Signature(path=said, key=f"sha256:{digest}", files=len(digests))


def verify(
    bundle: BundleReader,
    public_keys: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    signature: str | os.PathLike[str] | None = None,
) -> Signature:
    """Check that one of some keys signed a bundle. See ``Bundle.verify_signature``."""
    if isinstance(public_keys, str | os.PathLike):
        public_keys = [public_keys]
    if not public_keys:
        raise wrong_argument("public_keys", "a list of at least one file with a public key", quoted(public_keys))
    keys = [(str(path), signing.load_public_key(path)) for path in public_keys]
    expected = digests_of(bundle.manifest.files, bundle.id.removeprefix("sha256:"))
    problems: list[Problem] = []
    for root, path, said in _candidates(bundle, signature):
        try:
            envelope = parse_envelope(signature_files.read_signature(root, path), said)
            public_key, key = _proving(envelope, keys, said)
            check_statement(parse_statement(envelope.payload, said), expected, said)
        except BundleError as error:
            problems += error.problems
            continue
        digest = f"sha256:{signing.key_digest(key)}"
        return Signature(path=said, key=digest, public_key=public_key, files=len(expected))
    raise VerificationError(problems[:MAX_PROBLEMS])


def _candidates(bundle: BundleReader, signature: str | os.PathLike[str] | None) -> list[tuple[Path, str, str]]:
    """Return the files to look at: the directory and the path of each in it, and its path for messages.

    Raises:
        VerificationError: ``signature.missing``.
    """
    if signature is not None:
        place = Path(os.path.realpath(signature))  # a link here is the user's own
        if is_there(place.parent, place.name):
            return [(place.parent, place.name, str(signature))]
        file, got = str(signature), "no such file"
    else:
        found = [(bundle.path, path, path) for path in signature_files.signature_files(bundle.path)]
        if found:
            return found
        file, got = names.signature_path("NAME"), "none"
    hint = "Ask the person who made the bundle for it"
    raise VerificationError(Problem(code="signature.missing", file=file, expected="a signature", got=got, hint=hint))


def _proving(envelope: Envelope, keys: list[tuple[str, PublicKey]], file: str) -> tuple[str, PublicKey]:
    """Return the key that made a signature, with the path of its file.

    Raises:
        VerificationError: ``signature.invalid``.
    """
    message = pre_authentication_encoding(envelope.payload)
    for path, key in keys:
        if signing.is_signed(key, message, envelope.signature):
            return path, key
    named = any(signing.key_hint(key) == envelope.hint for _, key in keys)
    got = "one that names the key and isn't by it" if named else "one by another key"
    hint = "Don't trust this bundle" if named else "Check that the key is the signer's"
    expected = "a signature by the given key" if len(keys) == 1 else "a signature by one of the given keys"
    raise VerificationError(Problem(code="signature.invalid", file=file, expected=expected, got=got, hint=hint))


def _check_files(bundle: BundleReader, progress: Progress | None) -> None:
    """Check every file that is there, so that no damaged bundle is signed.

    Raises:
        BundleError: ``file.*``, ``sums.mismatch``.
    """
    absent = set(bundle.absent())
    check_digests(bundle, [path for path in bundle.manifest.files if path not in absent], progress)
    sums = checksums(bundle.manifest.files, bundle.id.removeprefix("sha256:"))
    if is_there(bundle.path, names.SUMS) and read_file(bundle.path, names.SUMS, strict_json.MAX_BYTES) != sums:
        expected, got = "the digests of the manifest", "other lines"
        raise BundleError(Problem(code="sums.mismatch", file=names.SUMS, expected=expected, got=got))


def _beside(root: Path) -> Path | None:
    """Return the path beside which an unfinished signature lies.

    It is the bundle's: where the process is killed, the bundle has no file that isn't listed. But the directory above
    the bundle may be another file system, or one that this user can't write to.
    """
    try:
        usable = os.access(root.parent, os.W_OK) and root.parent.stat().st_dev == root.stat().st_dev
    except OSError:
        return None
    return root if usable else None


def _check_number(bundle: BundleReader, path: str) -> None:
    there = signature_files.signature_files(bundle.path)
    if path not in there and len(there) >= signature_files.MAX_NUMBER:
        expected, got = f"at most {signature_files.MAX_NUMBER} signatures in a bundle", f"{len(there)} and this one"
        hint = "Remove one, or write this one elsewhere"
        raise BundleError(Problem(code="output.exists", file=path, expected=expected, got=got, hint=hint))


def _is_signature(path: Path) -> bool:
    """Return whether an existing file may be replaced: whether it is a signature, or empty."""
    try:
        data = read_file(path.parent, path.name, signature_files.MAX_BYTES)
        document = strict_json.parse(data, path.name) if data else {"mediaType": MEDIA_TYPE}
    except BundleError:
        return False
    return isinstance(document, dict) and document.get("mediaType") == MEDIA_TYPE
