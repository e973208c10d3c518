"""Code that breaks a rule of Windows: what is open isn't renamed, what is read-only isn't removed, and so on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from splitbundle.cli.main import main
from tests.support.paths import ROOT

NAMES = ("pull", "pull_into_a_directory", "pull_without_hard_links", "archive", "parts", "sign", "keys")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the rules are put on Linux, by way of /proc")


def run(code: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, with an empty cache."""
    environment = {**os.environ, "SPLITBUNDLE_CACHE": str(cache)}
    return subprocess.run([sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_does_with_bundles(name: str, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    command = ["-m", "tests.support.windows_scenarios", name, str(tmp_path / "place")]
    done = run(command, tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_on(tmp_path: Path) -> None:
    """Each rule refuses what it is for, so that a scenario that passes means something."""
    code = f"""
from tests.support import windows_rules
windows_rules.apply()
import mmap, os, pathlib, shutil
root = pathlib.Path({str(tmp_path)!r})

def refused(call):
    try:
        call()
    except OSError:
        return True
    return False

def inside(name, data=b"x"):
    (root / name).mkdir()
    (root / name / "file").write_bytes(data)
    return root / name / "file"

found = []
held = open(inside("held"), "rb")
found += [refused(lambda: (root / "held").rename(root / "new")), refused(lambda: (root / "held" / "file").unlink())]
with open(inside("mapped"), "rb") as file:
    mapping = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_COPY)
found += [refused(lambda: os.replace(root / "mapped" / "file", root / "new"))]
inside("locked").chmod(0o444)
found += [refused((root / "locked" / "file").unlink), refused(lambda: (root / "locked" / "file").write_bytes(b""))]
other = inside("other")
found += [refused(lambda: os.replace(other, root / "locked" / "file"))]
found += [refused(lambda: other.rename(root / "held" / "file"))]
with open(other, "rb") as file:
    found += [refused(lambda: os.fsync(file.fileno()))]
shutil.rmtree(root / "locked", ignore_errors=True)
found += [(root / "locked" / "file").exists(), refused(lambda: os.open(root, os.O_RDONLY))]
assert all(found), found
assert not hasattr(os, "O_NOFOLLOW")
try:
    import fcntl
except ImportError:
    print("on")
"""
    done = run(["-c", code], tmp_path / "cache")
    assert done.stdout == "on\n", done.stderr


def test_ctrl_break_ends_a_command_as_sigterm_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Windows sends SIGBREAK, also when the console is closed. No other process can send SIGTERM there."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("splitbundle.cli.inspect.open_bundle", interrupted)
    assert main(["inspect", str(tmp_path)]) == 130
    assert "[interrupted]" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize(("chosen", "expected"), [(None, "utf-8"), ("cp1252", "cp1252")])
def test_files_and_pipes_get_utf_8(chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code page of Windows has no Greek and no Chinese. On a console, Python writes both."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    if chosen is not None:
        monkeypatch.setenv("PYTHONIOENCODING", chosen)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, "cp1252", write_through=True))
    assert main(["inspect", "λόγος"]) == 1
    assert sys.stderr.encoding == expected
    assert ("λόγος".encode() in written.getvalue()) == (chosen is None)


def test_the_keys_that_end_a_chat() -> None:
    code = (
        "import sys, termios; sys.platform = 'win32'; from splitbundle.cli import chat, chat_terminal; "
        "assert chat_terminal.END_KEY in chat.HELP; print(chat_terminal.END_KEY)"
    )
    assert run(["-c", code], ROOT).stdout == "Ctrl-Z and Enter\n"
