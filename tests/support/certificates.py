"""Certificates for tests: authorities, handshakes by the standard library, and signatures with a second form."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from splitbundle.remote.tls_files import CA, CERTIFICATE, KEY

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The order of the group of the curve P-256 (FIPS 186-4, D.1.2.3)."""


def other_signature(pem: bytes) -> bytes:
    """Return the same certificate in PEM with the second valid form of its ECDSA signature: (r, n - s)."""
    certificate = x509.load_pem_x509_certificate(pem)
    r, s = decode_dss_signature(certificate.signature)
    signature = b"\0" + encode_dss_signature(r, _ORDER - s)
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    body = certificate.tbs_certificate_bytes + algorithm + b"\x03" + bytes([len(signature)]) + signature
    return ssl.DER_cert_to_PEM_cert(b"\x30\x82" + len(body).to_bytes(2, "big") + body).encode()


def shake_hands(server: Path, client: Path, host: str, *, ca: Path | None = None) -> tuple[bytes, bytes]:
    """Make a TLS connection in memory. Return what each side shows to the other, in DER.

    Args:
        server: the directory with the server's files.
        client: the directory with the client's.
        host: the name by which the client calls the server.
        ca: the authority that the client believes; by default its own.

    Raises:
        ssl.SSLError: one side refuses the other.
    """
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server / CERTIFICATE, server / KEY)
    accepting.load_verify_locations(server / CA)
    accepting.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.load_verify_locations(ca or client / CA)
    calling.load_cert_chain(client / CERTIFICATE, client / KEY)
    for context in (accepting, calling):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        calling.wrap_bio(to_client, to_server, server_hostname=host),
        accepting.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(sides)
    while waiting:
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    shown = [side.getpeercert(binary_form=True) for side in sides]
    assert shown[0] is not None
    assert shown[1] is not None
    return shown[0], shown[1]
