"""Find weights in pickles, and start a child process that rewrites them as safetensors.

This process unpickles nothing. The child process gets no secrets from the environment, and its resources are limited.
The parent does not trust the child: it checks the files and the messages of the child like any untrusted input. The
child is not a sandbox: code that gets past ``weights_only`` runs with the rights of this user. Convert only pickles
that you trust.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Final, NoReturn

from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.storage.files import Progress
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.source import Checkpoint
from splitbundle_converter.checkpoint.weight_files import (
    SAFETENSORS,
    Naming,
    SourceTensor,
    gather,
    read_headers,
    weight_files,
)
from splitbundle_converter.errors import line, refusal

BIN: Final = Naming(single="pytorch_model.bin", index="pytorch_model.bin.index.json", suffix=".bin")
SUFFIXES: Final = (".pt", ".pth")
CHILD_CODE: Final = (
    "import json, sys; request = json.load(open(sys.argv[1], encoding='utf-8')); sys.path[:] = request['path']; "
    "from splitbundle_converter.checkpoint.unpickle import main; main(request['files'])"
)
"""The code of the child. An isolated interpreter (-I) ignores PYTHONPATH, so the child gets the parent's path."""
KEPT_VARIABLES: Final = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "LANG", "LC_ALL"),
    "KMP_DUPLICATE_LIB_OK",
)
"""The environment variables that torch may need to load. The child gets no other variable, so it gets no HF_TOKEN."""
MAX_MESSAGE: Final = 16384
TIMEOUT = 120.0
"""Seconds without a message after which the child is ended, because it may wait forever. The bytes add to them."""
BYTES_A_SECOND: Final = 10e6
STATE_DICT: Final = (
    "Where you trust the file, load it with the code that it names, and save its tensors alone: "
    "torch.save(model.state_dict(), ...)"
)
WHOLE: Final = "The file may be damaged, or no checkpoint of torch.save: fetch or save it again"


class PickledCheckpoint(Checkpoint):
    """A checkpoint whose tensors were rewritten. Its directory has the pickles and all other files."""

    rewritten = True
    naming = BIN

    def __init__(
        self,
        directory: CheckpointDirectory,
        tensors: dict[str, SourceTensor],
        promised: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.directory = directory
        self.name, self.revision = directory.name, directory.revision
        self.tensors, self.promised = tensors, promised


def read_model(directory: CheckpointDirectory, private: Path, progress: Progress | None) -> PickledCheckpoint:
    """Rewrite a model in pickles as safetensors in the directory ``private``, and return it.

    Raises:
        BundleError: ``source.*``; ``output.failed`` if there is not enough disk space.
    """
    weight_map, files = _find(directory)
    named_by = directory.name if weight_map is None else BIN.index
    rewritten = rewrite({file: directory.weights(file, named_by) for file in files}, private, progress)
    tensors, promised = gather(weight_map, files, BIN, lambda file: read_headers(file, rewritten[file]))
    return PickledCheckpoint(directory, tensors, promised)


def _find(directory: CheckpointDirectory) -> tuple[dict[str, str] | None, list[str]]:
    """Return the map of the index, or None without an index, and the names of the model's pickles."""
    weight_map, files = weight_files(directory, BIN)
    files = files or sorted(
        path.name for path in directory.path.iterdir() if path.suffix in SUFFIXES and path.is_file()
    )
    if weight_map is None and len(files) != 1:
        expected = f"{SAFETENSORS.single}, {BIN.single}, an index of either, or one file {' or '.join(SUFFIXES)}"
        hint = "Parts of a model need a file like bottom_metadata.json beside each bottom.pt" if files else None
        raise refusal("source.missing", directory.name, expected, ", ".join(files[:8]) or "none", hint)
    return weight_map, files


def rewrite(pickles: Mapping[str, Path], private: Path, progress: Progress | None) -> dict[str, Path]:
    """Rewrite state dicts in a child process.

    Args:
        pickles: The name of each pickle -> its path.
        private: A directory for the new files, which only this user can read.
        progress: A function that is called with the current step, the amount done, and the total amount.

    Returns:
        The name of each pickle -> the path of its safetensors file. The files are not checked yet.

    Raises:
        BundleError: ``source.pickle`` for a pickle that asks for code; ``source.state-dict`` for a file that is not a
            state dict, that makes the child end, or that takes too long; ``output.failed`` if there is not enough disk
            space.
    """
    with _writing(private):
        total = sum(path.stat().st_size for path in pickles.values())
        free = shutil.disk_usage(private).free
    if free < total:
        hint = "Choose another output, or make room there"
        expected = f"{total / 2**30:.1f} GiB of room for the tensors of the pickles, until the bundle is written"
        raise refusal("output.failed", str(private.parent), expected, f"{free / 2**30:.1f} GiB", hint)
    targets = {file: private / f"{number:05d}.safetensors" for number, file in enumerate(pickles)}
    request = private / "request.json"
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    files = [[str(source.absolute()), str(targets[file])] for file, source in pickles.items()]
    with contextlib.ExitStack() as stack:
        with _writing(private):
            request.write_text(json.dumps({"path": path, "files": files}), "utf-8")
            errors = stack.enter_context((private / "errors.txt").open("w+b"))
            process = stack.enter_context(_child(request, errors))
        patience = TIMEOUT + total / BYTES_A_SECOND
        silent = stack.enter_context(_ended_if_silent(process, patience))
        _listen(process, list(pickles), total, errors, silent, progress)
    with _writing(private):
        made = {file for file, target in targets.items() if target.exists() and stat.S_ISREG(target.lstat().st_mode)}
    for file in targets:
        if file not in made:
            raise refusal("source.state-dict", file, "a state dict", "no output of the process that reads it", WHOLE)
    return targets


@contextlib.contextmanager
def _writing(private: Path) -> Iterator[None]:
    """Raise ``output.failed`` for an error of the system while this process prepares files or looks for results."""
    try:
        yield
    except OSError as error:
        expected, hint = "a place that can be written", "Choose another output, or make room there"
        raise refusal("output.failed", str(error.filename or private), expected, line(error), hint) from error


@contextlib.contextmanager
def _child(request: Path, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child process. When the block ends, end the child and all processes that it started."""
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environment |= {name: str(request.parent) for name in ("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP")}
    # Threads need address space, which is limited. A library that searches for GPUs may hang.
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(  # noqa: S603  # this interpreter, with arguments that this module builds
        [sys.executable, "-I", "-B", "-c", CHILD_CODE, str(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=request.parent,
        env=environment,
        start_new_session=True,  # a separate group: Ctrl-C reaches only this process, which then ends the group
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        _kill(process)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process group before waiting for it. Until the wait, the system gives its number to no other process."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


@dataclass(slots=True)
class _Silence:
    """The state that the reading thread and the watching thread share about the messages of the child."""

    seconds: float
    heard: threading.Event = field(default_factory=threading.Event)
    over: bool = False
    """Whether the reading thread has finished."""
    ended: bool = False
    """Whether the watching thread ended the child because it sent no message."""


@contextlib.contextmanager
def _ended_if_silent(process: subprocess.Popen[bytes], seconds: float) -> Iterator[_Silence]:
    """End the child if it sends no message for ``seconds``. A thread watches: not every system can time out a pipe."""
    silence = _Silence(seconds)

    def watch() -> None:
        while silence.heard.wait(seconds):
            silence.heard.clear()
            if silence.over:
                return
        silence.ended = True
        _kill(process)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield silence
    finally:
        silence.over = True
        silence.heard.set()
        thread.join()


def _listen(
    process: subprocess.Popen[bytes],
    files: list[str],
    total: int,
    errors: IO[bytes],
    silence: _Silence,
    progress: Progress | None,
) -> None:
    """Read the messages of the child. Return when the child reports that it is done; raise an error otherwise."""
    done, file = 0, files[0]
    while True:
        said = process.stdout.readline(MAX_MESSAGE) if process.stdout is not None else b""
        silence.heard.set()
        if silence.ended:
            got = f"no message for {silence.seconds:.0f} s from the process that reads it"
            raise refusal("source.state-dict", file, "a state dict that can be read", got, WHOLE)
        if not said:
            _raise_dead(process, file, errors)
        message = _parse(said)
        if message.get("done") == len(files):
            return
        if "refused" in message:
            _raise_refused(message, file)
        if "failed" in message:
            hint = "Choose another output, or make room there"
            raise refusal("output.failed", file, "room for its tensors", _words(message["failed"]), hint)
        number, written = message.get("reading", 0), message.get("bytes", 0)
        if not message or not _within(number, len(files) - 1) or not _within(written, total * 8):
            raise refusal(
                "source.state-dict", file, "a state dict", "an invalid message of the process that reads it", WHOLE
            )
        if "reading" in message:
            file = files[number]
        done += written
        if progress is not None:
            progress("reading pickles", min(done, total), total)


def _within(number: object, most: int) -> bool:
    return type(number) is int and 0 <= number <= most


def _parse(said: bytes) -> dict[str, Any]:
    try:
        message = strict_json.parse(said, "message")
    except BundleError:
        return {}
    return message if isinstance(message, dict) else {}


def _raise_refused(message: dict[str, Any], file: str) -> NoReturn:
    name = message.get("name")
    code = message.get("code") is True
    raise BundleError(
        Problem(
            code="source.pickle" if code else "source.state-dict",
            file=file,
            pointer=None if name is None else f"/{_words(name)}",
            expected=_words(message.get("expected")),
            got=_words(message.get("got")),
            hint=STATE_DICT if code else WHOLE,
        )
    )


def _raise_dead(process: subprocess.Popen[bytes], file: str, errors: IO[bytes]) -> NoReturn:
    """Raise ``source.state-dict`` for a child that ended without a result. Quote its last line on stderr."""
    status = _status(process)
    if status is None:
        got = "a process that closed its output and went on"
    else:
        names = {number.value: number.name for number in signal.Signals}
        how = f"by {names.get(-status, -status)}" if status < 0 else f"with status {status}"
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4096))
        said = [text.strip() for text in errors.read().decode("utf-8", "replace").splitlines() if text.strip()]
        got = f"the process that read it ended {how}" + (f" ({_words(said[-1])})" if said else "")
    raise refusal("source.state-dict", file, "a state dict that can be read", got, WHOLE)


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of a child that closed its output, or None if it still runs after 10 seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not hasattr(os, "waitid"):
            if process.poll() is not None:
                return process.returncode
        # WNOWAIT keeps the process number valid, so that the process group can still be ended by this number.
        elif found := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        time.sleep(0.01)
    return None


def _words(text: object) -> str:
    """Return a text of the child as short ASCII, which is safe to print."""
    return ascii(text)[1:-1][:400] if isinstance(text, str) else "something"
