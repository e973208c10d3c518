"""The certificates and the key of a machine: what is read, and what is refused."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from splitbundle import BundleError
from splitbundle.remote.tls_files import MAX_BYTES, fingerprint_of, read_identity
from splitbundle.serving import keys
from tests.support.certificates import other_signature


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(root)
    keys.client(root, "alice")
    keys.client(root, "bob")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A client's directory, which a test may change."""
    return Path(shutil.copytree(made / "clients" / "alice", tmp_path / "alice"))


def test_which_files_may_be_there(place: Path) -> None:
    data = {name: (place / f"{name}.pem").read_bytes() for name in ("ca", "cert", "key")}
    found = read_identity(place)
    assert (found.ca, found.certificate, found.key) == (data["ca"], data["cert"], data["key"])
    (place / "ca.pem").unlink()
    found = read_identity(place)
    assert (found.ca, found.certificate, found.key) == (None, data["cert"], data["key"])
    for name in ("cert", "key"):
        (place / f"{name}.pem").unlink()
    (place / "ca.pem").write_bytes(data["ca"] + data["cert"])  # several authorities
    found = read_identity(str(place))
    assert (found.ca, found.certificate, found.key) == (data["ca"] + data["cert"], None, None)


def encrypted(pem: bytes) -> bytes:
    key = load_pem_private_key(pem, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))


def old_encrypted(pem: bytes) -> bytes:
    key = load_pem_private_key(pem, None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret"))


def move_and_link(name: str) -> Callable[[Path, Path], object]:
    def change(place: Path, _: Path) -> None:
        shutil.move(place / name, place.parent / name)
        (place / name).symlink_to(place.parent / name)

    return change


CHANGES: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no file": (lambda p, _: [path.unlink() for path in p.iterdir()], r"\[keys\.file\] \S*alice: .* got none of them"),
    "no directory": (lambda p, _: shutil.rmtree(p), r"\[keys\.file\] .* got none of them"),
    "no key": (lambda p, _: (p / "key.pem").unlink(), r"key\.pem: expected the private key of cert\.pem, got no such"),
    "no certificate": (lambda p, _: (p / "cert.pem").unlink(), r"cert\.pem: expected the certificate of key\.pem, got"),
    "group": (lambda p, _: (p / "key.pem").chmod(0o640), r"\[keys\.file\] .*got mode 0640\. chmod 600 \S*key\.pem"),
    "others": (lambda p, _: (p / "key.pem").chmod(0o604), r"\[keys\.file\] .*got mode 0604"),
    "writable": (lambda p, _: (p / "key.pem").chmod(0o620), r"\[keys\.file\] .*got mode 0620"),
    "another pair": (
        lambda p, made: shutil.copy(made / "clients" / "bob" / "key.pem", p / "key.pem"),
        r"\[keys\.file\] \S*key\.pem: expected the private key of cert\.pem, got another key\. Copy the whole",
    ),
    "swapped": (
        lambda p, _: shutil.copy(p / "key.pem", p / "cert.pem"),
        r"expected a certificate in PEM, got a private",
    ),
    "certificate as key": (
        lambda p, _: (p / "key.pem").write_bytes((p / "cert.pem").read_bytes()),
        "expected a private key in PEM, got a certificate",
    ),
    "junk": (lambda p, _: (p / "cert.pem").write_bytes(b"junk"), r"\[keys\.file\] \S*cert\.pem: .*another file"),
    "junk in ca": (
        lambda p, _: (p / "ca.pem").write_bytes((p / "ca.pem").read_bytes().replace(b"MII", b"AAA")),
        r"\[keys\.file\] \S*ca\.pem: expected certificates in PEM",
    ),
    "junk in certificate": (
        lambda p, _: (p / "cert.pem").write_bytes((p / "cert.pem").read_bytes().replace(b"MII", b"AAA")),
        r"\[keys\.file\]",
    ),
    "DER": (
        lambda p, _: (p / "cert.pem").write_bytes(ssl.PEM_cert_to_DER_cert((p / "cert.pem").read_text())),
        r"expected a certificate in PEM",
    ),
    "not ASCII": (lambda p, _: (p / "ca.pem").write_bytes((p / "ca.pem").read_bytes() + b"\xff"), r"\[keys\.file\]"),
    "encrypted": (
        lambda p, _: (p / "key.pem").write_bytes(encrypted((p / "key.pem").read_bytes())),
        "expected a private key without a passphrase",
    ),
    "encrypted as of old": (
        lambda p, _: (p / "key.pem").write_bytes(old_encrypted((p / "key.pem").read_bytes())),
        "expected a private key without a passphrase",
    ),
    "large": (
        lambda p, _: (p / "ca.pem").write_bytes((p / "ca.pem").read_bytes().ljust(MAX_BYTES + 1)),
        r"\[file\.size\] \S*ca\.pem: expected at most 65536 bytes",
    ),
    "link to a key": (move_and_link("key.pem"), r"\[file\.kind\] \S*key\.pem"),
    "link to an authority": (move_and_link("ca.pem"), r"\[file\.kind\] \S*ca\.pem"),
    "link to nothing": (
        lambda p, _: ((p / "ca.pem").unlink(), (p / "ca.pem").symlink_to("nothing")),
        r"\[file\.kind\] \S*ca\.pem",
    ),
    "directory": (lambda p, _: ((p / "ca.pem").unlink(), (p / "ca.pem").mkdir()), r"\[file\.kind\] \S*ca\.pem"),
    "pipe": (lambda p, _: ((p / "key.pem").unlink(), os.mkfifo(p / "key.pem", 0o600)), r"\[file\.kind\] \S*key\.pem"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_refused(change: str, place: Path, made: Path) -> None:
    edit, said = CHANGES[change]
    edit(place, made)
    with pytest.raises(BundleError, match=said) as caught:
        read_identity(place)
    assert str(place) in str(caught.value)
    assert b"PRIVATE KEY" not in str(caught.value).encode()


def test_the_largest_file_is_read(place: Path) -> None:
    padded = (place / "ca.pem").read_bytes().ljust(MAX_BYTES, b"\n")
    (place / "ca.pem").write_bytes(padded)
    assert read_identity(place).ca == padded


def test_no_library_is_needed(place: Path) -> None:
    """A client that only connects needs no cryptography."""
    code = "import sys\nsys.modules['cryptography'] = sys.modules['grpc'] = None\n"
    code += "from splitbundle.remote.tls_files import read_identity\nprint(read_identity(sys.argv[1]).key is not None)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(place)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout == "True\n"


def test_fingerprints(place: Path, made: Path) -> None:
    pem = (place / "cert.pem").read_bytes()
    signed = x509.load_pem_x509_certificate(pem).tbs_certificate_bytes
    assert fingerprint_of(pem) == hashlib.sha256(signed).hexdigest()
    der = ssl.PEM_cert_to_DER_cert(pem.decode())
    other = (made / "clients" / "bob" / "cert.pem").read_bytes()
    assert fingerprint_of(der) == fingerprint_of(pem.decode()) == fingerprint_of(pem + other) != fingerprint_of(other)
    # The whole certificate has another digest in its second form, which is valid too.
    second = other_signature(pem)
    assert second != pem
    issuer = x509.load_pem_x509_certificate((place / "ca.pem").read_bytes())
    x509.load_pem_x509_certificate(second).verify_directly_issued_by(issuer)
    assert fingerprint_of(second) == fingerprint_of(pem)


def test_what_has_no_fingerprint(place: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert((place / "cert.pem").read_text())
    longer = b"\x30\x83\0" + der[2:4] + der[4:]  # a length in more bytes than it needs
    bad = [der[:end] for end in range(len(der))] + [
        der + b"\0",
        longer,
        der[:4] + b"\x31" + der[5:],
        b"\x30\x80" + der[4:],
    ]
    bad += [b"-----BEGIN CERTIFICATE-----\nMA=\n-----END CERTIFICATE-----\n", b"\x30\x02\x30\x00", b"\x30\xff"]
    for data in bad:
        with pytest.raises(BundleError) as caught:
            fingerprint_of(data)
        assert caught.value.codes == ("keys.file",)
    # The same without the shortest form of the length inside: no signature covers such bytes.
    inner = b"\x30\x83\0" + der[6:8] + der[8:]
    with pytest.raises(BundleError):
        fingerprint_of(b"\x30\x82" + len(inner).to_bytes(2, "big") + inner)
