"""Read the certificates and the private key of a machine: ``ca.pem``, ``cert.pem`` and ``key.pem`` of a directory."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import ssl
import sys
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.records import record, replace
from splitbundle.storage import files

CA: Final = "ca.pem"
CERTIFICATE: Final = "cert.pem"
KEY: Final = "key.pem"
MAX_BYTES: Final = 2**16
"""The largest file, in bytes. An authority or a certificate takes about a thousand."""
_CERTIFICATE: Final = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]*)-----END CERTIFICATE-----")
_KEY: Final = re.compile(
    rb"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----[A-Za-z0-9+/=\s]*-----END (?:[A-Z]+ )?PRIVATE KEY-----"
)


@record(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What a machine shows to others, and what it believes. Each is PEM, or None without the file."""

    ca: bytes | None
    """The certificates of the authorities that this machine believes."""
    certificate: bytes | None
    """The machine's own certificate."""
    key: bytes | None
    """The private key of this certificate."""


def read_identity(directory: str | os.PathLike[str]) -> TlsFiles:
    """Read the files of a machine. They may be ``ca.pem`` alone, or a certificate and its key with or without it.

    Raises:
        BundleError: ``keys.file`` for a certificate without its key and the reverse, a key that others can read, a
            file that isn't PEM, or none of the files; ``file.*`` for links, directories and files that are too large.
    """
    root = Path(directory)
    ca, certificate = (read_certificates(root, name) if _is_there(root, name) else None for name in (CA, CERTIFICATE))
    key = read_private_key(root, KEY) if _is_there(root, KEY) else None
    if ca is None and certificate is None and key is None:
        hint = "splitbundle keys makes such directories, for servers and for clients"
        raise bad_file(root, f"a directory with {CA}, or with {CERTIFICATE} and {KEY}", "none of them", hint)
    if key is None and certificate is not None:
        raise bad_file(root / KEY, f"the private key of {CERTIFICATE}", "no such file")
    if key is not None and certificate is None:
        raise bad_file(root / CERTIFICATE, f"the certificate of {KEY}", "no such file")
    if ca is not None:
        _check_authorities(root, ca)
    if key is not None:
        _check_pair(root)
    return TlsFiles(ca=ca, certificate=certificate, key=key)


def read_certificates(root: Path, name: str) -> bytes:
    """Read a file with one or more certificates in PEM.

    Raises:
        BundleError: ``keys.file``, ``file.*``.
    """
    data, _ = _read(root, name)
    if not _CERTIFICATE.search(data):
        raise bad_file(
            root / name, "a certificate in PEM", "a private key" if b"PRIVATE KEY" in data else "another file"
        )
    return data


def read_private_key(root: Path, name: str) -> bytes:
    """Read a private key in PEM that nobody but its owner can read.

    Raises:
        BundleError: ``keys.file``, ``file.*``.
    """
    data, mode = _read(root, name)
    if mode & 0o077 and sys.platform != "win32":  # Windows has no such modes
        expected, got = "a private key that only its owner can read", f"mode {mode & 0o777:04o}"
        raise bad_file(root / name, expected, got, f"chmod 600 {root / name}")
    if b"ENCRYPTED" in data:
        raise bad_file(root / name, "a private key without a passphrase", "an encrypted one")
    if not _KEY.search(data):
        raise bad_file(
            root / name, "a private key in PEM", "a certificate" if b"CERTIFICATE" in data else "another file"
        )
    return data


def fingerprint_of(certificate: bytes | str) -> str:
    """Return the SHA-256 digest of the part of a certificate that its authority signed, in hexadecimal.

    This part is ``tbsCertificate`` (RFC 5280, section 4.1). The digest of the whole certificate wouldn't name it for
    good: without any key, one ECDSA signature can be changed into a second one that is valid too.

    Args:
        certificate: the certificate in PEM or DER. Of several in PEM, the first one counts.

    Raises:
        BundleError: ``keys.file`` for anything else.
    """
    data = certificate.encode("utf-8") if isinstance(certificate, str) else certificate
    if not data.startswith(b"\x30"):
        data = _der(data)
    start, end = _sequence(data, 0)
    signed, signed_end = _sequence(data, start)
    if end != len(data) or not signed < signed_end < end:
        raise _no_certificate()
    return hashlib.sha256(data[start:signed_end]).hexdigest()


def bad_file(place: Path, expected: str, got: str, hint: str | None = None) -> BundleError:
    """Return the error of a certificate or a key that can't be used: ``keys.file``."""
    return BundleError(Problem(code="keys.file", file=str(place), expected=expected, got=got, hint=hint))


def _read(root: Path, name: str) -> tuple[bytes, int]:
    """Return the content of a file, and its mode."""
    try:
        with files.open_file(root, name) as file:
            mode = os.fstat(file.fileno()).st_mode
            data = files.read_fully(file, MAX_BYTES + 1)
    except OSError as error:
        raise BundleError(replace(files.unreadable(name, error), file=str(root / name))) from error
    except BundleError as error:
        hint = "Make it again, or copy it from where it was made" if error.codes == ("file.missing",) else None
        raise BundleError(
            replace(each, file=str(root / name), hint=hint or each.hint) for each in error.problems
        ) from error
    if len(data) > MAX_BYTES:
        expected, got = f"at most {MAX_BYTES} bytes", f"more than {MAX_BYTES} bytes"
        raise BundleError(Problem(code="file.size", file=str(root / name), expected=expected, got=got))
    return data, mode


def _is_there(root: Path, name: str) -> bool:
    """Return whether anything has this name, even a link to nothing: such a link isn't an absent file."""
    try:
        os.lstat(root / name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BundleError(replace(files.unreadable(name, error), file=str(root / name))) from error
    return True


def _check_authorities(root: Path, data: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (OSError, ValueError) as error:
        raise bad_file(root / CA, "certificates in PEM", f"{error}") from error


def _check_pair(root: Path) -> None:
    """Check that the certificate and the private key belong together, and that TLS can use them."""
    try:
        # The empty passphrase keeps OpenSSL from asking for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(root / CERTIFICATE, root / KEY, password="")
    except OSError as error:
        got = "another key" if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH" else f"{error}"
        hint = "Copy the whole directory again from where it was made"
        raise bad_file(root / KEY, f"the private key of {CERTIFICATE}", got, hint) from error


def _der(pem: bytes) -> bytes:
    found = _CERTIFICATE.search(pem)
    try:
        return base64.b64decode(b"".join(found[1].split()), validate=True) if found else b""
    except binascii.Error:
        return b""


def _sequence(data: bytes, at: int) -> tuple[int, int]:
    """Return where the content of a sequence in DER starts and ends. Its header is at ``at``."""
    if data[at : at + 1] != b"\x30" or at + 2 > len(data):
        raise _no_certificate()
    length, start = data[at + 1], at + 2
    if length >= 0x80:
        count = length - 0x80
        length, start = int.from_bytes(data[start : start + count], "big"), start + count
        if not 1 <= count <= 3 or length < 0x80 or length >> 8 * (count - 1) == 0:
            raise _no_certificate()  # DER has only the shortest form of a length
    if start + length > len(data):
        raise _no_certificate()
    return start, start + length


def _no_certificate() -> BundleError:
    return BundleError(Problem(code="keys.file", expected="a certificate in PEM or DER", got="other bytes"))
