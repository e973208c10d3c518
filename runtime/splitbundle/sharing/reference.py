"""References: one grammar for the place of a bundle, on this machine or on another one.

    PATH
    https://HOST/PATH                     a static server, with the files of a bundle under PATH
    hf://ORG/NAME[/FOLDER][@REVISION]     a repository of the Hugging Face Hub
    oci://HOST/REPOSITORY[:TAG]           a registry of container images
    s3://BUCKET/PATH and others           a file system of fsspec (``FILE_SYSTEMS``)

Each of them may end with ``@sha256:`` and 64 digits: the bundle id, and then no other bundle is accepted. For ``oci://``
it may also be the digest of the registry's own manifest.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.records import record, replace

FILE_SYSTEMS: Final = ("s3", "sftp", "ssh", "ftp")
"""The schemes that go through fsspec. The tests hold each of them against a server."""
SCHEMES: Final = ("https", "http", "hf", "oci", *FILE_SYSTEMS)
DEFAULT_TAG: Final = "latest"
PLAIN_HTTP: Final = "SPLITBUNDLE_PLAIN_HTTP"
"""The variable with the hosts, separated by commas, that may be asked without TLS."""

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PIN: Final = re.compile(r"@(sha256:[0-9a-f]{64})\Z")
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?"
_HOST: Final = re.compile(rf"(?:{_NAME}|\[[0-9A-Fa-f:.]{{2,45}}\])(?::[0-9]{{1,5}})?")
_PASSWORD: Final = re.compile(r"(://[^/@:]*:)([^/]+)@")
_QUERY: Final = re.compile(r"([?#])(.+)")
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HUB_PART: Final = re.compile(r"[A-Za-z0-9_.-]{1,96}")
_REVISION: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,199}")


@record(frozen=True, slots=True, kw_only=True)
class Reference:
    """The place of a bundle."""

    scheme: str
    """One of ``SCHEMES``, or an empty text for a path of this machine."""
    host: str
    """The host with its port, or an empty text. Of ``s3`` it is the bucket."""
    path: str
    """A path of this machine; of a URL without the first ``/``; ``ORG/NAME`` or a repository."""
    folder: str = ""
    """A folder in a repository of the Hub."""
    revision: str | None = None
    """A tag of a registry, or a revision of the Hub."""
    pin: str | None = None
    """The expected bundle id."""

    def __str__(self) -> str:
        return f"{self.unpinned}{f'@{self.pin}' if self.pin else ''}"

    @property
    def unpinned(self) -> str:
        """Return the reference without the pin."""
        if not self.scheme:
            return self.path
        place = "/".join(part for part in (self.host, self.path, self.folder) if part)
        mark = "" if self.revision is None else f":{self.revision}" if self.scheme == "oci" else f"@{self.revision}"
        return f"{self.scheme}://{place}{mark}"


def parse_reference(text: str) -> Reference:
    """Parse a reference.

    Raises:
        BundleError: ``usage.reference``.
    """
    found = _PIN.search(text)
    if found is None and "@sha256:" in text:
        raise wrong_reference(text, "@sha256: and 64 of 0-9a-f at the end", "a pin of another form")
    pin = found[1] if found else None
    rest = text[: found.start()] if found else text
    scheme = _SCHEME.match(rest)
    if scheme is None:
        if not rest or "\0" in rest:
            raise wrong_reference(text, "a path or a reference", quoted(rest))
        return Reference(scheme="", host="", path=rest, pin=pin)
    name, inside = scheme[1].lower(), rest[scheme.end() :]
    if name not in SCHEMES:
        raise wrong_reference(text, f"one of the schemes {', '.join(SCHEMES)}", f"the scheme {quoted(scheme[1])}")
    if not inside.isascii() or not inside.isprintable() or " " in inside or "\\" in inside:
        raise wrong_reference(text, "printable ASCII without spaces", quoted(inside))
    if name == "hf":
        made = _hub(text, inside)
    elif name == "oci":
        made = _registry(text, inside)
    else:
        made = _url(text, name, inside)
    port = made.host.rpartition(":")[2] if ":" in made.host.rpartition("]")[2] else "1"
    if not 0 < int(port) < 65536:
        raise wrong_reference(text, "a port from 1 to 65535", port)
    return replace(made, pin=pin)


def _hub(text: str, inside: str) -> Reference:
    place, mark, revision = inside.partition("@")
    parts = place.removeprefix("models/").split("/")
    parts = parts[:-1] if parts[-1] == "" and len(parts) > 2 else parts
    good = len(parts) >= 2 and all(_HUB_PART.fullmatch(part) and part.strip(".") for part in parts)
    if not good or (mark and not _REVISION.fullmatch(revision)):
        raise wrong_reference(text, "hf://ORG/NAME[/FOLDER][@REVISION]", quoted(inside))
    folder = "/".join(parts[2:])
    return Reference(scheme="hf", host="", path="/".join(parts[:2]), folder=folder, revision=revision or None)


def _registry(text: str, inside: str) -> Reference:
    host, _, rest = inside.partition("/")
    repository, mark, tag = rest.partition(":")
    if not _HOST.fullmatch(host) or len(repository) > 255 or not _REPOSITORY.fullmatch(repository):
        expected = "oci://HOST[:PORT]/REPOSITORY[:TAG], a repository in lowercase"
        raise wrong_reference(text, expected, quoted(inside))
    if mark and not _TAG.fullmatch(tag):
        raise wrong_reference(text, "a tag of 1 to 128 of A-Z a-z 0-9 _ . -, not first . or -", quoted(tag))
    return Reference(scheme="oci", host=host, path=repository, revision=tag or None)


def _url(text: str, scheme: str, inside: str) -> Reference:
    host, _, path = inside.partition("/")
    if "@" in host and scheme in ("https", "http"):
        hint = "Keep it out of the reference: the variable SPLITBUNDLE_TOKEN has a token for this host"
        raise wrong_reference(text, "a URL without a user or a password", "one with them", hint)
    user, _, place = host.rpartition("@")
    if ":" in user:
        hint = "Keep the password out of the reference: use a key, or the library's own configuration"
        raise wrong_reference(text, "a reference without a password", "one with a password", hint)
    if not _HOST.fullmatch(place) or "?" in path or "#" in path:
        raise wrong_reference(text, f"{scheme}://HOST/PATH without ? and #", quoted(inside))
    if any(part in (".", "..") for part in path.split("/")):
        raise wrong_reference(text, "a path without . and ..", quoted(path))
    path = path.rstrip("/").removesuffix("/manifest.json")
    return Reference(scheme=scheme, host=host, path=path)


def wrong_reference(text: str, expected: str, got: str, hint: str | None = None) -> BundleError:
    """Return the error of a reference that can't be followed."""
    said = hint or "docs/guides/share.md has the grammar of references"
    shown = _QUERY.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))
    for secret in (found[2] for pattern in (_PASSWORD, _QUERY) for found in pattern.finditer(text)):
        for before, after in ((":", "@"), ("?", ""), ("#", "")):
            got = got.replace(f"{before}{secret}{after}", f"{before}***{after}")
    return BundleError(
        Problem(code="usage.reference", argument=quoted(shown, 120), expected=expected, got=got, hint=said)
    )


def host_name(host: str) -> str:
    """Return a host without its port and without the brackets of IPv6, in lowercase."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine itself."""
    name = host_name(host)
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def may_be_plain(host: str) -> bool:
    """Return whether a host may be asked without TLS: on this machine, or if ``SPLITBUNDLE_PLAIN_HTTP`` names it."""
    allowed = [each.strip().lower() for each in os.environ.get(PLAIN_HTTP, "").split(",")]
    return is_loopback(host) or host.lower() in allowed or host_name(host) in allowed
