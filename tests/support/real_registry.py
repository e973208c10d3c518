"""Debian's ``docker-registry`` on loopback."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from benchmarks.transfer import registry

USER: Final = "me"
PASSWORD: Final = "secret"
_HASH: Final = "$2b$04$h6b6RaVPWubAdTtNwVoIfesgaZXe/ljH9sZbK/mFJhx2ACLRYj4Wu"
"""The password by bcrypt, the only form that the registry takes."""


@contextlib.contextmanager
def real_registry(root: Path, *, login: bool = False) -> Iterator[str]:
    """Run a registry, and yield its host and port. Skip where it isn't installed.

    Args:
        root: a directory that doesn't exist yet, for its storage.
        login: whether it wants ``USER`` and ``PASSWORD``, by Basic.
    """
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry isn't installed: apt-get install docker-registry")
    more = ""
    if login:
        passwords = root.with_name(f"{root.name}.htpasswd")
        passwords.write_text(f"{USER}:{_HASH}\n")
        more = f'auth: {{htpasswd: {{realm: test, path: "{passwords}"}}}}\n'
    with registry(root, more) as address:
        yield address
