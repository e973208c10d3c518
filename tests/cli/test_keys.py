"""The command ``keys``: exit statuses, what people read, and what programs read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitbundle.cli.keys import MAX_DAYS
from splitbundle.remote.tls_files import fingerprint_of
from splitbundle.serving import keys
from tests.support.command_line import run


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """Run an action with ``--json``, and return its document."""
    status, out, err = run(capsys, "keys", *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_the_whole_life_of_a_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "keys"
    made = as_json(capsys, "init", root)
    assert made == {"ok": True, "path": str(root), "expires": made["expires"]}
    server = as_json(capsys, "server", root, "trunk.example", "10.0.0.7")
    place = root / "servers" / "trunk.example"
    assert server == {
        "ok": True,
        "name": "trunk.example",
        "kind": "server",
        "hosts": ["trunk.example", "10.0.0.7"],
        "fingerprint": fingerprint_of((place / "cert.pem").read_bytes()),
        "expires": server["expires"],
        "revoked": False,
        "path": str(place),
    }
    first = as_json(capsys, "client", root, "alice", "--days", "30")
    second = as_json(capsys, "rotate", root, "alice")
    assert first["expires"] < second["expires"] < made["expires"]
    assert first["path"] == second["path"] == str(root / "clients" / "alice")
    revoked = as_json(capsys, "revoke", root, "alice")
    assert sorted(revoked["revoked"]) == sorted([first["fingerprint"], second["fingerprint"]])
    assert revoked["lists"] == [str(root / "revoked.json"), str(place / "revoked.json")]
    listed = as_json(capsys, "list", root)["certificates"]
    server.pop("ok")
    first.pop("ok")
    assert listed[-1] == server
    assert listed[0] == first | {"revoked": True, "path": None}
    assert [each["revoked"] for each in listed] == [True, True, False]


def test_what_people_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, out, _ = run(capsys, "keys", "init", "keys")
    assert "keys/ca.key signs certificates: it never leaves this directory" in out
    _, out, _ = run(capsys, "keys", "client", "keys", "alice")
    assert "  Copy this directory to that machine, for example: scp -rp keys/clients/alice HOST:\n" in out
    _, out, _ = run(capsys, "keys", "revoke", "keys", "alice")
    assert out == "alice: 1 certificate is revoked\n"
    _, out, _ = run(capsys, "keys", "rotate", "keys", "alice")
    status, out, _ = run(capsys, "keys", "list", "keys")
    assert status == 0
    assert ", revoked, replaced or moved away\n" in out
    assert out.endswith("keys: 2 certificates\n")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("init", "{root}"), 1, "[keys.directory] {root}: expected an empty directory, or nothing there"),
        (("list", "{root}/none"), 1, "[keys.directory]"),
        (("client", "{root}", "alice"), 1, "[output.exists]"),
        (("client", "{root}", "a/b"), 1, "[input.value] name: expected 1 to 64 letters"),
        (("server", "{root}", "a:80"), 1, "[input.value] host: expected a host name or an IP address, without a port"),
        (("rotate", "{root}", "bob"), 1, "[input.value] name: expected the name of a client or a server, got 'bob'"),
        (("revoke", "{root}", "trunk.example"), 1, "[input.value] name: expected the name of a client, got a server"),
        (("init", "{root}", "x"), 2, "keys init DIR: got 1 names"),
        (("list", "{root}", "x"), 2, "keys list DIR: got 1 names"),
        (("server", "{root}"), 2, "keys server DIR HOST [HOST …]: got 0 names"),
        (("client", "{root}"), 2, "keys client DIR NAME: got 0 names"),
        (("client", "{root}", "a", "b"), 2, "keys client DIR NAME: got 2 names"),
        (("revoke", "{root}", "a", "b"), 2, "keys revoke DIR NAME: got 2 names"),
        (("revoke", "{root}", "alice", "--days", "3"), 2, "argument --days: keys revoke makes no certificate"),
        (("client", "{root}", "bob", "--days", "0"), 2, "argument --days: expected a number from 1 to 3650, got '0'"),
        (("renew", "{root}"), 2, "invalid choice: 'renew'"),
    ],
)
def test_wrong_calls(
    arguments: tuple[str, ...], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "keys"
    for before in (("init", root), ("client", root, "alice"), ("server", root, "trunk.example")):
        run(capsys, "keys", *before)
    given = [each.format(root=root) for each in arguments]
    got, out, err = run(capsys, "keys", *given)
    assert (got, out) == (status, "")
    assert said.format(root=root) in err
    assert json.loads(run(capsys, "keys", *given, "--json")[1])["ok"] is False


def test_the_limits_are_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line states them itself: the module that has them needs a library."""
    assert MAX_DAYS == keys.MAX_DAYS
    assert f"by default {keys.DAYS} days" in " ".join(run(capsys, "keys", "--help")[1].split())


WITHOUT = """
import sys
sys.modules["cryptography"] = None
from splitbundle.cli.main import main
print(main(["keys", "init", sys.argv[1]]))
"""


def test_without_the_library(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "keys")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "4\n"
    assert 'pip install "splitbundle[network]"' in done.stderr
    assert not (tmp_path / "keys").exists()
