"""The names that certificates hold: of clients, and of the hosts of servers."""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address
from typing import Final

from splitbundle.errors import quoted, wrong_argument

MAX_NAME: Final = 64
"""The longest name of a client: what a certificate's common name may have (RFC 5280, appendix A.1)."""
MAX_HOST: Final = 253
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?")
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def client_name(name: str) -> str:
    """Return the name of a client, which also names a directory.

    Raises:
        BundleError: ``input.value``.
    """
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        expected = f"1 to {MAX_NAME} letters, digits and . _ -, not first . _ or -, and not last ."
        raise wrong_argument("name", expected, quoted(name))
    return name


def host_name(name: str) -> str:
    """Return a host name in small letters, or an IP address in its usual form.

    Raises:
        BundleError: ``input.value``.
    """
    try:
        address = ip_address(name)
    except ValueError:
        pass
    else:
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise wrong_argument("host", "an address that every machine understands", quoted(name))
        return str(address)
    host = name.lower()
    labels = host.split(".")
    # No top-level domain is a number. So 10.0.0.256 is an address with a slip, and no host name.
    if len(host) > MAX_HOST or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        expected = "a host name or an IP address, without a port"
        hint = "Write a name with other letters in its ASCII form, xn--…" if not name.isascii() else None
        raise wrong_argument("host", expected, quoted(name), hint)
    return host


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def directory_of(host: str) -> str:
    """Return the name of a server's directory. An IPv6 address is written without colons, as scp splits at them."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return address.exploded.replace(":", "-") if isinstance(address, IPv6Address) else host
