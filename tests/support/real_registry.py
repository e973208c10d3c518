"""Debian's ``docker-registry`` on loopback."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.transfer import registry


@contextlib.contextmanager
def real_registry(root: Path) -> Iterator[str]:
    """Run a registry with its storage in ``root``, and yield its host and port. Skip where it isn't installed."""
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry isn't installed: apt-get install docker-registry")
    with registry(root) as address:
        yield address
