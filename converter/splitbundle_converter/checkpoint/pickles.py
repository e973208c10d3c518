"""Weights in pickles: which files they are, and a child process that rewrites them as safetensors.

Nothing is unpickled in this process. The child gets no secret of the environment, and limits of what it may take; what
it leaves is read as any stranger's safetensors, and what it says as any stranger's words. It is no sandbox: code that
got past ``weights_only`` would run with this user's rights, so a pickle is still a matter of trust.
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
"""Isolated (-I), an interpreter ignores PYTHONPATH; yet it must find the libraries that this one has found."""
KEPT_VARIABLES: Final = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "LANG", "LC_ALL"),
    "KMP_DUPLICATE_LIB_OK",
)
"""The variables that loading torch may need. HF_TOKEN, and whatever else stands in the environment, stays here."""
MAX_MESSAGE: Final = 16384
TIMEOUT = 120.0
"""Seconds without a message, beside what the bytes take, after which the child is ended: it may wait for ever."""
BYTES_A_SECOND: Final = 10e6
STATE_DICT: Final = (
    "Where you trust the file, load it with the code that it names, and save its tensors alone: "
    "torch.save(model.state_dict(), ...)"
)
WHOLE: Final = "The file may be damaged, or no checkpoint of torch.save: fetch or save it again"


class PickledCheckpoint(Checkpoint):
    """A checkpoint whose tensors were rewritten: its directory has the pickles and everything else."""

    rewritten = True

    def __init__(self, directory: CheckpointDirectory, tensors: dict[str, SourceTensor]) -> None:
        self.directory = directory
        self.name, self.revision = directory.name, directory.revision
        self.tensors = tensors


def read_model(directory: CheckpointDirectory, private: Path, progress: Progress | None) -> PickledCheckpoint:
    """A model in pickles, rewritten into the directory ``private``.

    Raises:
        BundleError: ``source.*``; ``output.failed`` where there is no room.
    """
    weight_map, files = _find(directory)
    named_by = directory.name if weight_map is None else BIN.index
    rewritten = rewrite({file: directory.weights(file, named_by) for file in files}, private, progress)
    tensors = gather(weight_map, files, BIN, lambda file: read_headers(file, rewritten[file]))
    return PickledCheckpoint(directory, tensors)


def _find(directory: CheckpointDirectory) -> tuple[dict[str, str] | None, list[str]]:
    """The index's map, if there is an index, and the files of a model in pickles."""
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
    """Has a child process rewrite state dicts; gives the safetensors file of each, which nobody has looked at yet.

    Raises:
        BundleError: ``source.pickle`` for what asks for code, ``source.state-dict`` for what isn't one or ends the
            child or takes it too long, ``output.failed`` where there is no room.
    """
    with _writing(private):
        total = sum(path.stat().st_size for path in pickles.values())
        free = shutil.disk_usage(private).free
    if free < total:
        hint = "Choose another place with --output, or make room there"
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
            raise refusal("source.state-dict", file, "a state dict", "nothing that the process made of it", WHOLE)
    return targets


@contextlib.contextmanager
def _writing(private: Path) -> Iterator[None]:
    """What the system refuses while this process prepares the child's work, or looks for it."""
    try:
        yield
    except OSError as error:
        expected, hint = "a place that can be written", "Choose another place with --output, or make room there"
        raise refusal("output.failed", str(error.filename or private), expected, line(error), hint) from error


@contextlib.contextmanager
def _child(request: Path, errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The running child. However the block ends, it ends too, and what it started."""
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environment |= {name: str(request.parent) for name in ("HOME", "TMPDIR", "TEMP", "TMP")}
    # Threads would need address space, and a library that looks for GPUs may hang.
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(  # noqa: S603  # this interpreter, and arguments of ours
        [sys.executable, "-I", "-B", "-c", CHILD_CODE, str(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=request.parent,
        env=environment,
        start_new_session=True,  # a group of its own: an interruption comes to this process, which ends the group
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
    """Ends what wasn't waited for: until then, nobody else gets its number."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


@dataclass(slots=True)
class _Silence:
    """Whether the child says anything, as the two threads that ask and answer it know."""

    seconds: float
    heard: threading.Event = field(default_factory=threading.Event)
    over: bool = False
    """Whether nobody listens any more."""
    ended: bool = False
    """Whether the child was ended for its silence."""


@contextlib.contextmanager
def _ended_if_silent(process: subprocess.Popen[bytes], seconds: float) -> Iterator[_Silence]:
    """Ends the child when it has said nothing for so long; a pipe can't be asked with a time limit on every system."""
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
    """Hears the child out: returns when it says that it is done, and raises whatever else comes."""
    done, file = 0, files[0]
    while True:
        said = process.stdout.readline(MAX_MESSAGE) if process.stdout is not None else b""
        silence.heard.set()
        if silence.ended:
            got = f"no word for {silence.seconds:.0f} s from the process that reads it"
            raise refusal("source.state-dict", file, "a state dict that can be read", got, WHOLE)
        if not said:
            _raise_dead(process, file, errors)
        message = _parse(said)
        if message.get("done") == len(files):
            return
        if "refused" in message:
            _raise_refused(message, file)
        if "failed" in message:
            hint = "Choose another place with --output, or make room there"
            raise refusal("output.failed", file, "room for its tensors", _words(message["failed"]), hint)
        number, written = message.get("reading", 0), message.get("bytes", 0)
        if not message or not _within(number, len(files) - 1) or not _within(written, total * 8):
            raise refusal("source.state-dict", file, "a state dict", "a process that says what it shouldn't", WHOLE)
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
    """It ended without a word, or with its last ones on stderr."""
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
    """The status of a child that has said its last; None if it goes on."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not hasattr(os, "waitid"):
            if process.poll() is not None:
                return process.returncode
        # Looked at without taking its number from it, so that its group can still be ended by that number.
        elif found := os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        time.sleep(0.01)
    return None


def _words(text: object) -> str:
    """What the child says, as harmless as it is short."""
    return ascii(text)[1:-1][:400] if isinstance(text, str) else "something"
