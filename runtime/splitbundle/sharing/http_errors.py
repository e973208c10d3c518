"""What the statuses of HTTP mean, and what a server says with them."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import time
from typing import Any, Final

from splitbundle.errors import quoted
from splitbundle.sharing.network import NetworkError, network_error

MAX_ERROR_BYTES: Final = 4096
"""The bytes of an error's body that are read, for its message."""


def status_error(response: Any, place: str) -> NetworkError:
    """Return the error for a status that isn't the expected one. The body's first bytes may explain it."""
    status: int = response.status
    said = ""
    with contextlib.suppress(OSError, http.client.HTTPException):
        kind = response.headers.get("Content-Type", "")
        if "html" not in kind:
            said = " ".join(_said(response.read(MAX_ERROR_BYTES)).split())[:200]
    got = f"status {status} {quoted(response.reason or '', 60)}" + (f": {quoted(said, 200)}" if said else "")
    expected = "an answer with the content"
    if status == 401:
        hint = "It wants a login, or refuses this one: SPLITBUNDLE_TOKEN has a token for this host"
        return network_error("network.auth", place, "access", got, hint)
    if status == 403:
        hint = "The login isn't allowed to do this, or the model's license has to be accepted on its page first"
        return network_error("network.auth", place, "access", got, hint)
    if status in (404, 410):
        return network_error("network.missing", place, expected, got, "Check the spelling of the reference")
    if status in (301, 302, 303, 307, 308):
        where = quoted(response.headers.get("Location"), 120)
        return network_error("network.redirect", place, "a redirect that can be followed", f"{status} to {where}")
    wait = retry_after(response.headers.get("Retry-After"))
    if status in (429, 503):
        hint = "The server is busy: run this again later"
        return network_error("network.busy", place, expected, got, hint, transient=True, wait=wait)
    if status in (408, 425, 500, 502, 504):
        return network_error("network", place, expected, got, "Run this again", transient=True, wait=wait)
    return network_error("network.answer", place, expected, got)


def _said(body: bytes) -> str:
    """Return what the body of an error says. Registries and the Hub put their messages into JSON."""
    try:
        found = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")
    errors = found.get("errors", found.get("error", found)) if isinstance(found, dict) else found
    messages = []
    for each in errors if isinstance(errors, list) else [errors]:
        message = (each.get("message") or each.get("code")) if isinstance(each, dict) else each
        if isinstance(message, str):
            messages.append(message)
    return "; ".join(messages) or body.decode("utf-8", "replace")


def retry_after(text: str | None) -> float | None:
    """Return the seconds of a header ``Retry-After``, a number or a date (RFC 9110, section 10.2.3), or None."""
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:10])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
