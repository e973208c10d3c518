"""The directories of a certificate authority and of the machines that it knows, and records of what it made.

``serving/keys.py`` makes the keys and certificates in them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format.revoked_certificates import FILE as REVOKED
from splitbundle.records import record
from splitbundle.remote.tls_files import CA, CERTIFICATE, KEY
from splitbundle.serving import key_names
from splitbundle.storage.files import open_file
from splitbundle.writing.atomic_directory import lock_file

CA_KEY: Final = "ca.key"
ISSUED: Final = "issued"
Kind = Literal["server", "client"]
ROOMS: Final[dict[Kind, str]] = {"server": "servers", "client": "clients"}


@record(frozen=True, slots=True, kw_only=True)
class Authority:
    """A new authority."""

    path: Path
    expires: datetime.datetime
    """When it ends, in UTC. No certificate of it is valid after that."""


@record(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate that the authority made."""

    name: str
    """The client's name, or the first host of the server."""
    kind: Kind
    hosts: tuple[str, ...]
    """The host names and IP addresses of a server."""
    fingerprint: str
    """``remote.tls_files.fingerprint_of`` the certificate."""
    expires: datetime.datetime
    """When it ends, in UTC."""
    path: Path | None
    """The directory for the machine; None if the machine has a newer certificate."""
    revoked: bool


@record(frozen=True, slots=True, kw_only=True)
class Revocation:
    """What a revocation did."""

    certificates: tuple[Certificate, ...]
    """Every certificate that the client ever had."""
    lists: tuple[Path, ...]
    """The lists that were written: of the authority, and of each server."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Check that this is an authority, and keep other processes from changing it.

    Raises:
        BundleError: ``keys.directory``; ``file.*`` for a link.
    """
    check_authority(root)
    with open_file(root, CA) as file:
        with contextlib.suppress(OSError):  # some file systems lock no file that was opened for reading
            lock_file(file, wait=True)
        yield


def check_authority(root: Path) -> None:
    """Check that a directory is one of an authority.

    Raises:
        BundleError: ``keys.directory``.
    """
    for name in (CA, CA_KEY, REVOKED):
        if not os.path.lexists(root / name):
            hint = "splitbundle keys init makes an authority in a new directory"
            raise bad_directory(root, f"the directory of an authority, with {name}", "none", hint)


def directories(root: Path, kind: Kind) -> list[Path]:
    """Return the directories of the servers or of the clients, without those that are being written."""
    room = root / ROOMS[kind]
    places = sorted(room.iterdir()) if room.is_dir() else []
    return [place for place in places if not place.name.startswith(".") and place.is_dir() and not place.is_symlink()]


def existing(root: Path, name: str) -> tuple[Kind, Path]:
    """Return the kind and the directory of a client or a server.

    Raises:
        BundleError: ``input.value``.
    """
    for kind in ROOMS:
        for place in directories(root, kind):
            if place.name in (name, key_names.directory_of(name.lower()) if kind == "server" else name):
                return kind, place
    raise wrong_argument("name", "the name of a client or a server", quoted(name))


def write_key(place: Path, data: bytes) -> None:
    """Write a private key into a new file, which others can't read at any moment."""
    with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def is_empty(place: Path) -> bool:
    """Return whether this is an empty directory."""
    return place.is_dir() and not place.is_symlink() and not any(place.iterdir())


def is_identity(place: Path) -> bool:
    """Return whether a directory has the files of a machine, and no others, which a rotation would remove."""
    ours = {CA, CERTIFICATE, KEY, REVOKED}
    return place.is_dir() and not place.is_symlink() and {each.name for each in place.iterdir()} <= ours


def bad_directory(root: Path, expected: str, got: str, hint: str) -> BundleError:
    """Return the error of a directory that isn't as an authority's must be: ``keys.directory``."""
    return BundleError(Problem(code="keys.directory", file=str(root), expected=expected, got=got, hint=hint))
