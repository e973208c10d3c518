"""What the requests to a file server mean: paths, ranges and validators."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from typing import Final

from splitbundle.sharing.reference import is_loopback

_RANGE: Final = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*")


def pull_command(url: str, name: str, shards: Sequence[str] | None) -> str:
    """Return the command that pulls a bundle from the server at ``url``, which ends with ``/``."""
    plain = "" if is_loopback(urllib.parse.urlsplit(url).netloc) else " --plain-http"
    parts = "".join(f" --shard {shard}" for shard in shards or ())
    return f"splitbundle pull {url}{name}{parts}{plain}"


def path_of(target: str) -> str | None:
    """Return the path that a request asks for, without the first ``/``, or None if no file can have it."""
    target = target.partition("?")[0]
    if not target.startswith("/"):
        return None
    path = urllib.parse.unquote_to_bytes(target[1:])
    if not path.isascii() or any(byte < 0x20 or byte in b"\\:\x7f" for byte in path):
        return None
    text = path.decode("ascii")
    return text if not text or all(part.strip(".") for part in text.split("/")) else None


def has_tag(conditions: list[str], tag: str) -> bool:
    """Return whether one of the tags in ``If-None-Match`` is the file's."""
    given = [each.strip() for condition in conditions for each in condition.split(",")]
    return tag in given or f"W/{tag}" in given or given == ["*"]


def byte_range(text: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte of a range, and the one after its last, or None for the whole file.

    The two are equal if no byte is in the range. A header with several ranges, or by other rules, means the whole file
    (RFC 9110, section 14.2).
    """
    found = _RANGE.fullmatch(text or "")
    if found is None or found.groups() == ("", ""):
        return None
    if not found[1]:
        return max(0, size - int(found[2])), size
    start = int(found[1])
    if found[2] and int(found[2]) < start:
        return None
    stop = min(size, int(found[2]) + 1) if found[2] else size
    return min(start, stop), stop
