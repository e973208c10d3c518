"""The client's own limits, where no other test sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitbundle.sharing.http_client import HttpClient
from splitbundle.sharing.network import NetworkError, Patience
from tests.support.static_server import static_server

TRUE = bytes(range(256)) * 4096


def read(client: HttpClient, url: str) -> bytes:
    answer, view, data = client.ask(url), memoryview(bytearray(2**20)), b""
    with answer:
        while count := answer.readinto(view):
            data += view[:count]
    return data


@pytest.mark.parametrize("lie", ["drip", "stall"])
def test_a_drip_ends_at_the_timeout(lie: str, tmp_path: Path) -> None:
    """A byte comes within each wait of the socket. The server would take ten days for this file."""
    (tmp_path / "file").write_bytes(TRUE)
    with static_server(tmp_path, lies={"/file": lie}) as server, pytest.raises(NetworkError) as caught:
        read(HttpClient(Patience(timeout=0.5)), f"{server.url}/file")
    assert caught.value.codes == ("network",)
    assert caught.value.transient


def test_bodies_in_chunks_and_without_a_length(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TRUE)
    for lies in ({}, {"/file": "no length"}, {"/file": "chunks"}):
        with static_server(tmp_path, lies=lies) as server:
            assert read(HttpClient(Patience()), f"{server.url}/file") == TRUE
