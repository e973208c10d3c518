"""Pairs of keys that sign bundles, and what a signature says."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

KINDS: dict[str, Callable[[], Any]] = {
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed448": ed448.Ed448PrivateKey.generate,
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
}
GOOD = ("ed25519", "p256", "p384", "p521")


class Keys:
    """Pairs of keys in files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys: dict[str, Any] = {}

    def make(self, kind: str, name: str | None = None, password: bytes | None = None) -> tuple[Path, Path]:
        """Return the files of a private key and of its public key."""
        private, public = (self.directory / f"{name or kind}{end}" for end in (".pem", ".pub"))
        if not private.exists():
            key = self.keys[name or kind] = KINDS[kind]()
            encryption = BestAvailableEncryption(password) if password else NoEncryption()
            private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
            public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        return private, public


def payload_of(place: Path) -> Any:
    return json.loads(base64.b64decode(json.loads(place.read_text())["dsseEnvelope"]["payload"]))
