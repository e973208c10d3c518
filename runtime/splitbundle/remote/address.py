"""The address of a stage server: ``grpcs://HOST:PORT``, or ``grpc://HOST:PORT`` without TLS."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from splitbundle.errors import wrong_argument
from splitbundle.records import record

SERVICE: Final = "splitbundle.v1.Stage"
METHOD: Final = "Call"
"""One frame, and its answer."""
STREAM: Final = "Stream"
"""One frame after another, each with its answer."""
_FORM: Final = re.compile(r"(grpcs?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})/?")


@record(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is."""

    text: str
    """As the user wrote it."""
    host: str
    port: int
    secure: bool

    @property
    def target(self) -> str:
        """Return the host and the port, as gRPC writes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: object, *, insecure: bool = False) -> Address:
    """Return the address that a text means.

    Args:
        text: the text.
        insecure: whether an address without TLS may be one of another machine.

    Raises:
        BundleError: ``input.value`` for another form, and for an address without TLS that isn't a loopback address.
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None or not 0 < int(found[3]) < 2**16:
        raise wrong_argument("remote", "grpcs://HOST:PORT, or grpc://HOST:PORT without TLS", ascii(text)[:200])
    host = found[2].strip("[]")
    address = Address(text=found[0], host=host, port=int(found[3]), secure=found[1] == "grpcs")
    if not address.secure and not insecure and not is_loopback(host):
        hint = "insecure=True sends hidden states to it in the clear, where everybody on the way can read them"
        raise wrong_argument("remote", "grpcs://, as this is another machine", address.text, hint)
    return address


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, and no other machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
