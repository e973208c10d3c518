"""The child process that reads a pickle: its rights, its answers, and its end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch

from splitbundle_converter.checkpoint import pickles
from tests.support.paths import ROOT
from tests.support.pickled import BIN, WHOLE, convert, refused

pytestmark = pytest.mark.usefixtures("one_thread")


WITHOUT_TORCH: Final = """
import types
class Torch(types.ModuleType):
    Tensor = object
    def __getattr__(self, name):
        return lambda *_, **__: None
sys.modules["torch"] = Torch("torch")
"""
"""Something in place of torch, whose import takes most of a child's time. Only ``torch.load`` is called of it."""


def bypassed(monkeypatch: pytest.MonkeyPatch, body: str, *, torch: bool = True) -> None:
    """Start a child in which ``body`` runs in place of ``torch.load``, as if code got past ``weights_only``.

    Args:
        monkeypatch: the fixture.
        body: statements.
        torch: Whether the child has torch.
    """
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    boot = pickles.CHILD_CODE.replace("import main; main(", "import main\nSTART\nmain(")
    patch = f"import torch\ndef load(path, **named):\n    import os, signal, sys, time\n{lines}\ntorch.load = load"
    assert boot != pickles.CHILD_CODE
    if not torch:
        before, code, after = boot.partition("from splitbundle_converter")
        boot = f"{before}{WITHOUT_TORCH}{code}{after}"
    monkeypatch.setattr(pickles, "CHILD_CODE", boot.replace("START", patch))


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process that read it ended by SIGKILL"),
        ("os.abort()", "the process that read it ended by SIGABRT"),
        ("os._exit(3)", "the process that read it ended with status 3"),
        ("os._exit(0)", "the process that read it ended with status 0"),
        ("sys.exit('farewell')", "the process that read it ended with status 1 (farewell)"),
        ("import ctypes; ctypes.string_at(8)", "the process that read it ended by SIGSEGV"),
        ("torch.empty(2**40)", "RuntimeError: "),
        ("[bytearray(2**31) for _ in range(8)]", "a file that needs much more memory than its size"),
    ],
)
def test_a_child_that_dies(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch, body: str, got: str
) -> None:
    path = pickled("llama")
    bypassed(monkeypatch, body, torch="torch" in body or "SIGKILL" in body)
    text = str(refused(path, output))
    assert text.startswith(f"[source.state-dict] {BIN}: expected a state dict")
    assert f", got {got}" in text


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("os.write(1, b'noise'); os.write(2, b'noise'); raise ValueError('x')", "ValueError: x"),
        # The channel is the first descriptor above those that everybody has.
        ("os.write(3, b'hello\\n'); time.sleep(60)", "an invalid message of the process that reads it"),
        ("os.write(3, b'x' * 10**6); time.sleep(60)", "an invalid message of the process that reads it"),
        ("os.write(3, b'{\"bytes\": -1}\\n'); time.sleep(60)", "an invalid message of the process that reads it"),
        ("os.write(3, b'{\"bytes\": 1e9}\\n'); time.sleep(60)", "an invalid message of the process that reads it"),
        ("os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)", "no output of the process that reads it"),
        (
            "os.symlink('/etc/hostname', '00000.safetensors'); os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)",
            "no output of the process that reads it",
        ),
        (
            "os.mkfifo('00000.safetensors'); os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)",
            "no output of the process that reads it",
        ),
        (
            "open('00000.safetensors', 'wb').write(b'x' * 99); os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)",
            "SafetensorError",
        ),
        ('os.write(3, b\'{"refused": 99, "got": "\\\\u001b[31m\\\\n"}\\n\'); time.sleep(60)', r"\x1b[31m\n"),
    ],
)
def test_a_child_that_lies(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch, body: str, got: str
) -> None:
    """The child ends at once. The parent doesn't wait until it wakes."""
    path = pickled("llama")
    woke = output.parent.parent / "woke"
    bypassed(monkeypatch, f"{body}; open({str(woke)!r}, 'w').close()", torch="noise" in body)
    text = str(refused(path, output))
    assert BIN in text
    assert f"got {got}" in text
    assert "\x1b" not in text
    assert not woke.exists()


def test_what_the_child_gets(pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child gets no secret, no input and no descriptor, and it has its own home directory and limits."""
    seen = output.parent.parent / "seen.json"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    path = pickled("llama")
    body = (
        "import json, resource\n"
        "limits = {name: resource.getrlimit(getattr(resource, name)) for name in "
        "('RLIMIT_CORE', 'RLIMIT_FSIZE', 'RLIMIT_AS', 'RLIMIT_CPU')}\n"
        "seen = {'environment': dict(os.environ), 'input': sys.stdin.read(), 'limits': limits, 'place': os.getcwd(),\n"
        "        'isolated': sys.flags.isolated, 'mode': os.stat('.').st_mode,\n"
        "        'named': sorted(map(repr, named.items()))}\n"
        f"json.dump(seen, open({str(seen)!r}, 'w'))\n"
        "raise ValueError"
    )
    bypassed(monkeypatch, body)
    refused(path, output)
    found = json.loads(seen.read_text())
    assert not {
        name for name in found["environment"] if "TOKEN" in name or "SECRET" in name or name.startswith("TORCH")
    }
    assert found["environment"].keys() <= {
        *pickles.KEPT_VARIABLES, "HOME", "TMPDIR", "TEMP", "TMP", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES", "LC_CTYPE", "USERPROFILE",
    }  # fmt: skip
    assert found["environment"]["HOME"] == found["place"]
    assert (found["input"], found["isolated"], found["mode"] & 0o777) == ("", 1, 0o700)
    assert re.fullmatch(rf"\.{output.name}\.tmp-[0-9a-f]{{16}}", Path(found["place"]).name)
    assert found["named"] == ["('map_location', 'cpu')", "('mmap', True)", "('weights_only', True)"]
    size = (path / BIN).stat().st_size
    assert found["limits"]["RLIMIT_CORE"] == [0, 0]
    assert found["limits"]["RLIMIT_FSIZE"] == [4 * size + 2**30] * 2
    soft, hard = found["limits"]["RLIMIT_CPU"]
    assert 60 < soft < 180
    assert hard == soft + 5
    if sys.platform == "linux":
        assert 2**30 < found["limits"]["RLIMIT_AS"][1] < 2**36


def hashed_for_ever(path: Path) -> None:
    """A dict whose key is a tuple of twice a tuple of twice ..., 64 deep: hashing it looks at 2**64 of them."""
    data = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 64 + b"K\x01s."
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, data if record.endswith("/data.pkl") else content)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the system's")
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="tuples remember their hash")
def test_a_pickle_that_takes_for_ever(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pickled("llama")
    hashed_for_ever(path / BIN)
    short = (
        "import main; from splitbundle_converter.checkpoint import unpickle as u; u.limit.__defaults__ = (0.5,); main("
    )
    monkeypatch.setattr(pickles, "CHILD_CODE", pickles.CHILD_CODE.replace("import main; main(", short))
    assert str(refused(path, output)) == (
        f"[source.state-dict] {BIN}: expected a state dict that can be read, got the process that read it ended by "
        f"SIGXCPU. {WHOLE}"
    )


def test_a_child_that_says_nothing_is_ended(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent child is ended with its own children, even if it takes no processor time."""
    path, held = pickled("llama"), output.parent.parent / "held"
    held.touch()
    monkeypatch.setattr(pickles, "TIMEOUT", 3.0)
    bypassed(
        monkeypatch,
        f"import fcntl\nfile = open({str(held)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nos.fork()\ntime.sleep(600)",
        torch=False,
    )
    assert str(refused(path, output)) == (
        f"[source.state-dict] {BIN}: expected a state dict that can be read, "
        f"got no message for 3 s from the process that reads it. {WHOLE}"
    )
    with held.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # hangs for as long as a grandchild lives


def test_a_name_of_any_length_is_refused_as_code(
    pickles_here: None, pickled: Callable[..., Path], output: Path
) -> None:
    """The message of the child is cut, as a name in a file may have any length."""
    path = pickled("llama")
    with zipfile.ZipFile(path / BIN) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    with zipfile.ZipFile(path / BIN, "w") as archive:
        for record, content in records.items():
            code = b"\x80\x02cos\n" + b"x" * 20_000 + b"\n."
            archive.writestr(record, code if record.endswith("/data.pkl") else content)
    text = str(refused(path, output))
    assert text.startswith(
        f"[source.pickle] {BIN}: expected names and tensors alone, got a pickle that asks for os.xxx"
    )
    assert len(text) < 1000


def test_what_the_system_refuses_here(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    path = pickled("llama")
    monkeypatch.setattr(Path, "write_text", full)
    text = str(refused(path, output))
    assert text.startswith(f"[output.failed] {output.parent}/.{output.name}.tmp-")
    assert text.endswith(
        "/request.json: expected a place that can be written, got OSError: [Errno 28] No space left on device: "
        f"'{text.partition(' ')[2].partition(':')[0]}'. Choose another output, or make room there"
    )


def test_what_the_child_starts_ends_with_it(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grandchild ends too, even if it holds the output open and the child is dead."""
    held = output.parent.parent / "held"
    path = pickled("llama")
    bypassed(
        monkeypatch,
        f"import fcntl\nfile = open({str(held)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "if os.fork() == 0:\n    os.close(3); os.close(1); time.sleep(600)\nos._exit(0)",
        torch=False,
    )
    assert "ended with status 0" in str(refused(path, output))
    with held.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # hangs for as long as a grandchild lives


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_child_and_leaves_nothing(
    pickled: Callable[..., Path], output: Path, number: signal.Signals
) -> None:
    path = pickled("llama")
    mark = output.parent.parent / "reading"
    boot = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys\nfrom splitbundle_converter.checkpoint import pickles\nfrom splitbundle.cli.main import main\n"
        f"pickles.CHILD_CODE = {boot!r}\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "convert", str(path), "--allow-pickle", "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not (mark.exists() and mark.read_text()) and time.monotonic() - began < 600:
        time.sleep(0.01)
    assert list(output.parent.glob(f".{output.name}.tmp-*"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(output.parent.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_what_a_killed_conversion_left_is_removed_by_the_next(
    pickles_here: None, pickled: Callable[..., Path], output: Path
) -> None:
    left = output.with_name(f".{output.name}.tmp-{'0' * 16}")
    left.mkdir(mode=0o700)
    (left / "00000.safetensors").write_bytes(b"x")
    left.with_name(left.name + ".lock").touch()
    convert(pickled("llama"), output, check=False)


def test_only_the_child_unpickles() -> None:
    """No other file of the project names the functions that unpickle."""
    for package in ("runtime", "converter", "schemas"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text("utf-8")
            reads = re.search(r"^\s*(import pickle|from pickle import)|torch\.load\(", text, re.MULTILINE)
            assert bool(reads) == (path.name == "unpickle.py"), path
