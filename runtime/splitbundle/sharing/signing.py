"""Sign bytes, and check signatures, with Ed25519 or ECDSA. Only this module imports ``cryptography``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from splitbundle.errors import BundleError, Problem
from splitbundle.records import replace
from splitbundle.storage.files import read_file

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey
Password = Callable[[], str | None]
"""A function that returns the passphrase of an encrypted key. It is called only if the key is encrypted."""
MAX_KEY_BYTES: Final = 2**16
KINDS: Final = "a key for Ed25519, or for ECDSA on P-256, P-384 or P-521"
HINT: Final = (
    "openssl genpkey -algorithm ed25519 -out key.pem makes one; "
    "openssl pkey -in key.pem -pubout -out pub.pem gives its public key"
)
_HASHES: Final = {"secp256r1": hashes.SHA256(), "secp384r1": hashes.SHA384(), "secp521r1": hashes.SHA512()}
"""The curves for ECDSA, and the hash function of each."""


def load_private_key(path: str | os.PathLike[str], password: Password) -> PrivateKey:
    """Load a private key from a PEM file.

    Raises:
        BundleError: ``signature.key`` for a file that isn't such a key, or a passphrase that is missing or wrong;
            ``file.*``.
    """
    data = _read(path)
    key: object
    try:
        key = load_pem_private_key(data, None)
    except TypeError:  # the key is encrypted
        key = _load_encrypted(path, data, password)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _bad_key(path, "a private key in PEM", "another file") from error
    if isinstance(key, Ed25519PrivateKey | EllipticCurvePrivateKey) and _is_known(key.public_key()):
        return key
    raise _bad_key(path, KINDS, "another kind of key")


def _load_encrypted(path: str | os.PathLike[str], data: bytes, password: Password) -> object:
    text = password()
    if not text:
        raise _bad_key(path, "the passphrase of this encrypted key", "none")
    try:
        return load_pem_private_key(data, text.encode("utf-8"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _bad_key(path, "the passphrase of this encrypted key", "another passphrase, or a damaged file") from error


def load_public_key(path: str | os.PathLike[str]) -> PublicKey:
    """Load a public key from a PEM file.

    Raises:
        BundleError: ``signature.key`` for a file that isn't such a key; ``file.*``.
    """
    data = _read(path)
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        got = "a private key" if b"PRIVATE KEY" in data else "another file"
        raise _bad_key(path, "a public key in PEM", got) from error
    if isinstance(key, Ed25519PublicKey | EllipticCurvePublicKey) and _is_known(key):
        return key
    raise _bad_key(path, KINDS, "another kind of key")


def key_digest(key: PublicKey) -> str:
    """Return the SHA-256 digest of a public key in DER (SubjectPublicKeyInfo), in hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def key_hint(key: PublicKey) -> str:
    """Return the SHA-256 digest of a public key in PEM. OpenSSF model signing looks for it in a signature."""
    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def sign(key: PrivateKey, message: bytes) -> bytes:
    """Return the signature of a message. One by ECDSA is another one each time."""
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(message)
    return key.sign(message, ECDSA(_HASHES[key.curve.name]))


def is_signed(key: PublicKey, message: bytes, signature: bytes) -> bool:
    """Return whether a signature is one of this message by this key."""
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, message)
        else:
            key.verify(signature, message, ECDSA(_HASHES[key.curve.name]))
    except InvalidSignature:
        return False
    return True


def _is_known(key: PublicKey) -> bool:
    return isinstance(key, Ed25519PublicKey) or key.curve.name in _HASHES


def _read(path: str | os.PathLike[str]) -> bytes:
    place = Path(os.path.realpath(path))  # a link to a key is the user's own
    try:
        return read_file(place.parent, place.name, MAX_KEY_BYTES)
    except BundleError as error:
        problems = [replace(problem, file=str(path), expected="a key in PEM", hint=HINT) for problem in error.problems]
        raise BundleError(problems) from error


def _bad_key(path: str | os.PathLike[str], expected: str, got: str) -> BundleError:
    hint = HINT
    if "passphrase" in expected:
        hint = "Set SPLITBUNDLE_KEY_PASSWORD, or run the command on a terminal"
    return BundleError(Problem(code="signature.key", file=str(path), expected=expected, got=got, hint=hint))
