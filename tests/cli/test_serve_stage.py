"""What the command serve-stage takes and refuses before it serves."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.cli.main import main
from splitbundle.cli.serve_stage import read_tokens
from tests.support.paths import TESTS

BUNDLE = str(TESTS / "golden" / "v1.0" / "gpt2.splitbundle")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["bottom"], 1),
        (["nothing"], 2),
        ([], 2),
        (["trunk", "--layers", "1:2"], 2),
        (["trunk", "--listen", "0.0.0.0:0"], 5),
        (["trunk", "--listen", "here"], 2),
        (["trunk", "--lora", "4"], 2),
        (["trunk", "--tls", "nowhere"], 1),
    ],
)
def test_exit_statuses(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = main(["serve-stage", BUNDLE, *arguments])
    except SystemExit as ended:
        found = int(str(ended.code))
    assert found == status, capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err


def test_files_of_tokens(tmp_path: Path) -> None:
    place = tmp_path / "tokens"
    place.write_text("# ours\nalice 1234567890123456\n\nbob 2345678901234567\n")
    assert read_tokens(str(place)) == {"alice": "1234567890123456", "bob": "2345678901234567"}
    for line in ("alice 3456789012345678", "carol 1234567890123456", "carol", "carol a b"):
        place.write_text(f"alice 1234567890123456\n{line}\n")
        with pytest.raises(BundleError, match=r"\[keys.file\] .*line 2: expected a new name, a space, and a new token"):
            read_tokens(str(place))
    with pytest.raises(BundleError, match=r"\[keys.file\] .*nothing: expected a file of tokens, up to .*, got none"):
        read_tokens(str(tmp_path / "nothing"))


def test_status_at_an_address_of_version_6() -> None:
    bundle = splitbundle.open(BUNDLE)
    try:
        server = StageServer(bundle, "trunk", status=("::1", 0))
    except BundleError:
        pytest.skip("no IPv6 here")
    with server, urllib.request.urlopen(f"{server.status_url}/healthz", timeout=10) as answer:
        assert answer.read() == b"ok\n"
