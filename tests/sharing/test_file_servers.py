"""The servers for fsspec's file systems take a file in pieces, and give it back in pieces."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.file_servers import Server, ftp_server, s3_server, sftp_server

fsspec = pytest.importorskip("fsspec")
DATA = os.urandom(2**20) * 5
Run = Callable[[Path], contextlib.AbstractContextManager[Server]]
SERVERS = {
    "s3": lambda root: s3_server(),
    "sftp": sftp_server,
    "ftp": ftp_server,
    "anonymous ftp": lambda root: ftp_server(root, anonymous=True),
}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    run: Run = SERVERS[request.param]
    with run(tmp_path) as found:
        yield found


def test_a_file_in_pieces(server: Server) -> None:
    system, root = fsspec.core.url_to_fs(server.url, skip_instance_cache=True, **server.options)
    root = root.rstrip("/")
    if not server.url.startswith("s3:"):
        system.makedirs(f"{root}/a/b", exist_ok=True)
    with system.open(f"{root}/a/b/file", "wb") as file:
        for at in range(0, len(DATA), 300_000):
            file.write(DATA[at : at + 300_000])
    assert system.size(f"{root}/a/b/file") == len(DATA)
    with system.open(f"{root}/a/b/file", "rb") as file:
        file.seek(1_000_000)
        assert b"".join(iter(lambda: file.read(300_000), b"")) == DATA[1_000_000:]
        file.seek(5)
        assert file.read(10) == DATA[5:15]
    assert [name.rpartition("/")[2] for name in system.ls(f"{root}/a/b", detail=False)] == ["file"]
    assert not system.exists(f"{root}/a/none")
    with pytest.raises(FileNotFoundError):
        system.open(f"{root}/a/none", "rb").read()
    system.rm(f"{root}/a/b/file")
    assert not system.exists(f"{root}/a/b/file")


def test_a_directory_is_what_is_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    for run in (sftp_server, ftp_server):
        with run(tmp_path) as server:
            system, root = fsspec.core.url_to_fs(server.url, skip_instance_cache=True, **server.options)
            assert system.cat(f"{root.rstrip('/')}/file") == b"1"
            for path in ("/etc/passwd", "/../../../../../../etc/passwd"):
                assert not system.exists(path)


def test_a_wrong_key_and_a_wrong_password(tmp_path: Path) -> None:
    asyncssh = pytest.importorskip("asyncssh")
    with sftp_server(tmp_path) as server:
        other = {**server.options, "client_keys": [asyncssh.generate_private_key("ssh-ed25519")]}
        with pytest.raises(PermissionError):
            fsspec.core.url_to_fs(server.url, skip_instance_cache=True, **other)
        unknown = {**server.options, "known_hosts": asyncssh.import_known_hosts("")}
        with pytest.raises(asyncssh.HostKeyNotVerifiable):
            fsspec.core.url_to_fs(server.url, skip_instance_cache=True, **unknown)
    with ftp_server(tmp_path) as server, pytest.raises(Exception, match="530"):
        fsspec.filesystem("ftp", **{**server.options, "password": "wrong"}, skip_instance_cache=True)


def test_nothing_is_imported_before_it_is_used() -> None:
    libraries = "{'moto', 'boto3', 'asyncssh', 'pyftpdlib', 'fsspec'}"
    code = f"import sys, tests.support.file_servers; print({libraries} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("scheme", ["s3", "sftp"])
def test_the_environment_is_enough(scheme: str, tmp_path: Path) -> None:
    """A command gets no options: it finds the login where the libraries look for it."""
    (tmp_path / "root").mkdir()
    running = s3_server() if scheme == "s3" else sftp_server(tmp_path / "root", home=tmp_path / "home")
    code = """
import fsspec, sys
with fsspec.open(sys.argv[1], "wb") as file:
    file.write(b"1")
with fsspec.open(sys.argv[1]) as file:
    print(file.read())
"""
    with running as server:
        ran = subprocess.run(
            [sys.executable, "-c", code, f"{server.url}/file"],
            env=os.environ | server.variables,
            capture_output=True,
            text=True,
            check=False,
        )
    assert ran.stdout == "b'1'\n", ran.stderr
