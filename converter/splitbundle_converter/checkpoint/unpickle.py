"""The child process that reads pickles: it rewrites state dicts as safetensors. Its parent does not trust it.

``pickles`` starts it in a separate interpreter. It writes JSON lines to stdout: ``reading`` with the number of a file,
``bytes`` with the count of bytes written, and at the end one of three. ``done`` means success, ``refused`` has the
expected and the actual content, and ``failed`` means that the system refused to write.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pickle import UnpicklingError  # only the error class
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.format.dtypes import TABLE

CHUNK: Final = 2**23
MAX_NAME: Final = 1024
MAX_WORDS: Final = 400
"""The maximum number of characters in each text of a message. In JSON, one character may take twelve bytes."""
MAX_GROWTH: Final = 4
"""The maximum growth of a file. A tied weight is stored once and written twice; larger growth may be an attack on the
disk."""
HEADROOM: Final = 2**30
"""Bytes of address space beside the file itself, for the objects of the pickle and the copy of one tensor."""
SECONDS: Final = 60.0
"""Seconds of computing time; the bytes add to them. A small pickle can nest tuples so that hashing never ends."""
BYTES_A_SECOND: Final = 50e6
WRAPPERS: Final = ("state_dict", "model_state_dict", "model")
"""The keys under which training loops save the state dict, beside optimizers and counters."""
CODES: Final[dict[torch.dtype, str]] = {getattr(torch, dtype.name): dtype.safetensors for dtype in TABLE.values()}
"""The dtypes that a safetensors header can name. The converter decides later which of them a bundle can store."""


class Refused(Exception):
    """A file, or a tensor in it, differs from the expected content."""

    def __init__(self, expected: str, got: str, name: str | None = None) -> None:
        super().__init__(expected)
        self.expected, self.got, self.name = expected, got, name


class AsksForCode(Refused):
    """A pickle names a function or a class. Reading it without protection would run this code."""


def main(files: Sequence[Sequence[str]]) -> None:
    """Rewrite each pickle of ``files`` as safetensors, and report this on stdout. An item is (pickle, safetensors)."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as channel:
        os.dup2(2, 1)  # a library that prints must not write into the channel

        def say(**message: object) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        sizes = [os.path.getsize(source) for source, _ in files]
        limit(max(sizes, default=0), sum(sizes))
        rewrite_all(files, say)


def rewrite_all(files: Sequence[Sequence[str]], say: Callable[..., None]) -> None:
    """Rewrite each pickle of ``files``, and say so in messages. The last one is ``done``, ``refused`` or ``failed``."""
    for number, (source, target) in enumerate(files):
        say(reading=number)
        try:
            rewrite(source, target, lambda done: say(bytes=done))
        except Refused as refused:
            code = isinstance(refused, AsksForCode)
            # The file determines these words. The parent cannot read a message that is too long.
            words = {"expected": refused.expected, "got": refused.got, "name": refused.name}
            say(refused=True, code=code, **{key: word and word[:MAX_WORDS] for key, word in words.items()})
            return
        except OSError as error:  # an error of writing: errors of reading are Refused
            say(failed=_line(error))
            return
    say(done=len(files))


def limit(size: int, total: int, seconds: float = SECONDS) -> None:
    """Limit the resources of this process, if the system can.

    Args:
        size: The size of the largest file in bytes.
        total: The size of all files in bytes.
        seconds: The computing time in seconds, without the time for the bytes.
    """
    torch.set_num_threads(1)
    if sys.platform == "win32":
        return
    import resource

    def at_most(kind: int, most: int, grace: int = 0) -> None:
        with contextlib.suppress(ValueError, OSError):  # some systems define the name of a limit but do not support it
            resource.setrlimit(kind, (most, most + grace))

    at_most(resource.RLIMIT_CORE, 0)
    # The soft limit sends SIGXCPU before the hard limit kills, so the parent knows the reason.
    at_most(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds + total / BYTES_A_SECOND), grace=5)
    at_most(resource.RLIMIT_FSIZE, MAX_GROWTH * size + HEADROOM)
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as status:
        taken = int(status.read().split()[0]) * resource.getpagesize()
        at_most(resource.RLIMIT_AS, taken + 2 * size + HEADROOM)


def rewrite(source: str, target: str, wrote: Callable[[int], None]) -> None:
    """Write the tensors of one state dict, one at a time. A shared tensor is written once for each of its names.

    Raises:
        Refused: The file is not a state dict that safetensors can store.
        OSError: The system refuses to write.
    """
    tensors = state_dict(load(source))
    for name, tensor in tensors.items():
        check(name, tensor)
    size = sum(tensor.nbytes for tensor in tensors.values())
    most = MAX_GROWTH * os.path.getsize(source)
    if size > most:
        raise Refused(f"tensors of at most {MAX_GROWTH} times the file's bytes ({most})", f"{size} bytes of them")
    # Tensors with wide items come first. Then the data of each tensor is aligned to its items, as a memory map needs.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    with open(target, "xb") as file:
        file.write(header({name: tensors[name] for name in order}))
        for name in order:
            for piece in pieces(tensors[name]):
                file.write(piece)
                wrote(len(piece))


def load(path: str) -> Any:
    """Return the content of a file that has only plain values and tensors. No function that it names is called.

    Raises:
        AsksForCode: The file names a function or a class.
        Refused: torch cannot read the file.
    """
    expected = "a state dict, as torch.save writes it"
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            check_records(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise AsksForCode("names and tensors alone", f"a pickle that asks for {named[1]}") from None
        # The rest of torch's message explains how to read the file without this protection, so it is left out.
        what = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
        raise Refused(expected, f"UnpicklingError: {what[1].strip()}" if what else "UnpicklingError") from None
    except MemoryError:
        raise Refused(expected, "a file that needs much more memory than its size") from None
    except (
        RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
        EOFError, OSError, struct.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip  # damaged bytes make the reader of pickles raise any of these
        raise Refused(expected, _line(error)) from None


def check_records(path: str) -> None:
    """Check that a file is no program and has no compressed records.

    A compressed record can't be mapped, and a small one may expand to a huge size.

    Raises:
        AsksForCode: The file is a TorchScript archive.
        Refused: A record is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise AsksForCode("names and tensors alone", "a TorchScript archive, which is a program")
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise Refused("records without compression, as torch.save writes them", f"{record.filename!a}")


def state_dict(loaded: Any) -> dict[str, Tensor]:
    """Return the tensors by name. The loaded object has them itself, or under a key of ``WRAPPERS``.

    Raises:
        Refused: The loaded object is not a state dict.
    """
    expected = "a state dict: an object of names and tensors"
    if not isinstance(loaded, Mapping):
        raise Refused(expected, _kind(loaded))
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        found = [name for name in WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if len(found) != 1:
            raise Refused(f"{expected}, perhaps as one of {', '.join(WRAPPERS)}", f"an object of {_names(loaded)}")
        loaded = loaded[found[0]]
    return dict(loaded)


def check(name: Any, tensor: Any) -> None:
    """Check that safetensors can store a tensor and its name, and that all elements are in the file.

    Raises:
        Refused: safetensors cannot store it, or elements are missing.
    """
    if type(name) is not str:
        raise Refused("names that are strings", _kind(name))
    if not 0 < len(name) <= MAX_NAME or name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
        raise Refused(f"names of 1 to {MAX_NAME} characters", ascii(name)[:80])
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise Refused("a tensor", _kind(tensor), name)
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise Refused("a dense tensor", f"one that is {tensor.layout}, {tensor.device.type}, {tensor.dtype}", name)
    if tensor.dtype not in CODES:
        raise Refused(f"a dtype of {', '.join(CODES.values())}", str(tensor.dtype), name)
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise Refused("a tensor whose elements are all stored", f"shape {list(tensor.shape)} of fewer", name)


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a safetensors header: its length in 8 bytes, and the JSON, padded so that the data is aligned to 64."""
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text = text.ljust(math.ceil((8 + len(text)) / 64) * 64 - 8)
    return len(text).to_bytes(8, "little") + text


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """Return the bytes of a tensor in pieces. A view that is not contiguous is copied first, one tensor at a time."""
    flat = tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].numpy().data


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _names(loaded: Mapping[Any, Any]) -> str:
    return ", ".join(ascii(name)[:40] for name in list(loaded)[:8]) or "nothing"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
