"""Servers for the file systems of fsspec: S3, SFTP and FTP, each on loopback and at a port that the system chooses.

Each skips with a reason where its library is missing. Importing this module imports none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import warnings
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

HOST: Final = "127.0.0.1"
USER: Final = "me"
PASSWORD: Final = "secret"
BUCKET: Final = "bucket"


class Server(NamedTuple):
    """A file server."""

    url: str
    """The URL of a directory of it, without ``/`` at its end."""
    options: dict[str, Any]
    """What ``fsspec.url_to_fs`` needs beside the URL."""
    variables: dict[str, str]
    """The environment in which it needs nothing beside the URL."""


@contextlib.contextmanager
def s3_server() -> Iterator[Server]:
    """Run moto's S3 server with an empty bucket."""
    server_module = pytest.importorskip("moto.server", reason="the S3 server needs moto[s3], flask and flask-cors")
    pytest.importorskip("s3fs", reason="the client for S3 needs s3fs")
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        key = {"aws_access_key_id": USER, "aws_secret_access_key": PASSWORD}
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **key)
        client.create_bucket(Bucket=BUCKET)
        client.close()
        variables = {name.upper(): value for name, value in key.items()}
        yield Server(
            f"s3://{BUCKET}",
            {"key": USER, "secret": PASSWORD, "endpoint_url": url},
            variables | {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"},
        )
    finally:
        server.stop()


@contextlib.contextmanager
def sftp_server(root: Path, *, home: Path | None = None) -> Iterator[Server]:
    """Run an SFTP server for the directory ``root``, with keys that are made now.

    Args:
        root: what it serves. Its clients see nothing above it.
        home: a directory that gets ``.ssh/id_ed25519``, ``.ssh/known_hosts`` and ``.ssh/config``, for a client that
            reads them. Then ``HOME`` in ``variables`` is it.
    """
    asyncssh = pytest.importorskip("asyncssh", reason="the SFTP server needs asyncssh")
    pytest.importorskip("sshfs", reason="the client for SFTP needs sshfs")
    host_key, user_key = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    authorized = asyncssh.import_authorized_keys(user_key.export_public_key().decode())

    class Rooted(asyncssh.SFTPServer):  # type: ignore[name-defined,misc]
        def __init__(self, channel: Any) -> None:
            super().__init__(channel, chroot=str(root).encode())

    async def begin() -> Any:
        return await asyncssh.create_server(
            asyncssh.SSHServer,
            HOST,
            0,
            server_host_keys=[host_key],
            authorized_client_keys=authorized,
            sftp_factory=Rooted,
            allow_scp=False,
        )

    with _loop() as run:
        server = run(begin())
        port = server.get_port()
        known = f"[{HOST}]:{port} {host_key.export_public_key().decode()}"
        variables = {} if home is None else _ssh_directory(home, user_key.export_private_key().decode(), known)
        try:
            yield Server(
                f"sftp://{USER}@{HOST}:{port}",
                {"client_keys": [user_key], "known_hosts": asyncssh.import_known_hosts(known)},
                variables,
            )
        finally:
            run(_close(server))


async def _close(server: Any) -> None:
    server.close()
    with contextlib.suppress(asyncio.TimeoutError):  # it waits for its clients, and some never leave
        await asyncio.wait_for(server.wait_closed(), 1)


def _ssh_directory(home: Path, key: str, known: str) -> dict[str, str]:
    directory = home / ".ssh"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "id_ed25519").write_text(key)
    (directory / "id_ed25519").chmod(0o600)
    (directory / "known_hosts").write_text(known)
    (directory / "config").write_text(f"Host *\n  IdentityFile {directory / 'id_ed25519'}\n")
    return {"HOME": str(home)}


@contextlib.contextmanager
def _loop() -> Iterator[Any]:
    """Run an event loop in a thread, and yield a function that runs a coroutine there to its end."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    try:
        yield run
    finally:
        run(_cancel_all())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@contextlib.contextmanager
def ftp_server(root: Path, *, anonymous: bool = False) -> Iterator[Server]:
    """Run an FTP server for the directory ``root``.

    Args:
        root: what it serves.
        anonymous: whether everybody may read and write. Then the URL has no login, as in references.
    """
    pytest.importorskip("pyftpdlib", reason="the FTP server needs pyftpdlib")
    pytest.importorskip("fsspec", reason="the client for FTP needs fsspec")
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    # Without a handler, it would configure logging for the whole process.
    logging.getLogger("pyftpdlib").addHandler(logging.NullHandler())
    logging.getLogger("pyftpdlib").setLevel(logging.CRITICAL)
    authorizer = DummyAuthorizer()
    rights = "elradfmwMT"
    if anonymous:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of everybody who may write
            authorizer.add_anonymous(str(root), perm=rights)
    else:
        authorizer.add_user(USER, PASSWORD, str(root), perm=rights)
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer, "banner": "test", "auth_failed_timeout": 0})
    server = ThreadedFTPServer((HOST, 0), handler)
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            server.serve_forever(timeout=0.05, blocking=False)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    port = server.address[1]
    options: Mapping[str, Any] = {} if anonymous else {"username": USER, "password": PASSWORD}
    login = "" if anonymous else f"{USER}:{PASSWORD}@"
    try:
        yield Server(f"ftp://{login}{HOST}:{port}", {"host": HOST, "port": port, **options}, {})
    finally:
        ended.set()
        thread.join()
        server.close_all()
