"""Check that a certificate is for what a machine uses it for, before the other side of a connection refuses it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Final, Literal

from splitbundle.remote.tls_files import CERTIFICATE, KEY, bad_file

_INVALID_PURPOSE: Final = 26
"""OpenSSL's X509_V_ERR_INVALID_PURPOSE, for which the module ``ssl`` has no name."""
Side = Literal["server", "client"]


def check_purpose(directory: Path, side: Side) -> None:
    """Check that the certificate in a directory can be that of a server, or of a client.

    A certificate without an extended key usage can be both. That of a server needs a name besides.

    Raises:
        BundleError: ``keys.file``.
    """
    place = directory / CERTIFICATE
    expected = f"the certificate of a {side}"
    hint = f"Give the directory that splitbundle keys {side} made, in {side}s of the authority's directory"
    try:
        shown = _shown(directory, side)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _INVALID_PURPOSE:
            got = f"one that isn't for {side}s, by its extended key usage"
            raise bad_file(place, expected, got, hint) from None
        return  # the other side says the rest, such as the end of its time
    except ssl.SSLError:
        return
    if side == "server" and not shown.get("subjectAltName"):
        got = "one without the names by which clients call it (subject alternative name)"
        raise bad_file(place, expected, got, hint)


def _shown(directory: Path, side: Side) -> dict[str, Any]:
    """Return what a certificate says to the other side of a connection in memory, which believes just this one.

    Raises:
        ssl.SSLError: the other side doesn't take it.
    """
    accepting, calling = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.check_hostname = False
    judge, other = (calling, accepting) if side == "server" else (accepting, calling)
    other.verify_mode = ssl.CERT_NONE
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    judge.load_verify_locations(directory / CERTIFICATE)
    for context in {accepting, other}:  # a server always shows one
        context.load_cert_chain(directory / CERTIFICATE, directory / KEY, password="")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = {
        calling: calling.wrap_bio(to_client, to_server),
        accepting: accepting.wrap_bio(to_server, to_client, server_side=True),
    }
    waiting = list(sides.values())
    while waiting:
        for each in tuple(waiting):
            try:
                each.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(each)
    found: Any = sides[judge].getpeercert()
    return dict(found or {})
