"""The child that reads pickles: state dicts in, safetensors out. Whoever started it believes nothing that it says.

It runs in an interpreter of its own, which ``pickles`` starts. Its stdout is a channel of JSON lines: ``reading`` which
file, ``bytes`` that were written, then ``done``, ``refused`` with what was expected and what came, or ``failed`` where
the system refused to write.
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
from pickle import UnpicklingError  # the error alone
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.format.dtypes import TABLE

CHUNK: Final = 2**23
MAX_NAME: Final = 1024
MAX_WORDS: Final = 400
"""Characters of each thing that is said of a file. In a message, one may take twelve bytes."""
MAX_GROWTH: Final = 4
"""A tied table is stored once and written twice. What grows by more is made to fill the disk."""
HEADROOM: Final = 2**30
"""Bytes of address space beside the file itself: the objects that a pickle makes, and one tensor's copy."""
SECONDS: Final = 60.0
"""Of computing, beside what the bytes take: a small pickle may nest tuples so that hashing them never ends."""
BYTES_A_SECOND: Final = 50e6
WRAPPERS: Final = ("state_dict", "model_state_dict", "model")
"""Where training loops keep the state dict, beside optimizers and counters."""
CODES: Final[dict[torch.dtype, str]] = {getattr(torch, dtype.name): dtype.safetensors for dtype in TABLE.values()}
"""What a safetensors header can name. What a bundle can store is for the converter to say, tensor by tensor."""


class Refused(Exception):
    """What a file isn't."""

    def __init__(self, expected: str, got: str, name: str | None = None) -> None:
        super().__init__(expected)
        self.expected, self.got, self.name = expected, got, name


class AsksForCode(Refused):
    """A pickle that names a function or a class: reading it would run it."""


def main(files: Sequence[Sequence[str]]) -> None:
    """Rewrites each (pickle, safetensors) of ``files``, and says so."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as channel:
        os.dup2(2, 1)  # what a library prints is no message

        def say(**message: object) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        sizes = [os.path.getsize(source) for source, _ in files]
        limit(max(sizes, default=0), sum(sizes))
        for number, (source, target) in enumerate(files):
            say(reading=number)
            try:
                rewrite(source, target, lambda done: say(bytes=done))
            except Refused as refused:
                code = isinstance(refused, AsksForCode)
                # A file chooses these words, and a message that is too long would be none.
                words = {"expected": refused.expected, "got": refused.got, "name": refused.name}
                say(refused=True, code=code, **{key: word and word[:MAX_WORDS] for key, word in words.items()})
                return
            except OSError as error:  # of writing: reading has words of its own
                say(failed=_line(error))
                return
        say(done=len(files))


def limit(size: int, total: int, seconds: float = SECONDS) -> None:
    """What reading files of at most ``size`` bytes may take of the system, where the system has limits."""
    torch.set_num_threads(1)
    if sys.platform == "win32":
        return
    import resource

    def at_most(kind: int, most: int, grace: int = 0) -> None:
        with contextlib.suppress(ValueError, OSError):  # some systems have the name of a limit, and no limit
            resource.setrlimit(kind, (most, most + grace))

    at_most(resource.RLIMIT_CORE, 0)
    # A signal of its own comes first, by which the parent knows why it ended.
    at_most(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds + total / BYTES_A_SECOND), grace=5)
    at_most(resource.RLIMIT_FSIZE, MAX_GROWTH * size + HEADROOM)
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as status:
        taken = int(status.read().split()[0]) * resource.getpagesize()
        at_most(resource.RLIMIT_AS, taken + 2 * size + HEADROOM)


def rewrite(source: str, target: str, wrote: Callable[[int], None]) -> None:
    """Writes the tensors of one state dict, one at a time: shared ones once for each of their names."""
    tensors = state_dict(load(source))
    for name, tensor in tensors.items():
        check(name, tensor)
    size = sum(tensor.nbytes for tensor in tensors.values())
    most = MAX_GROWTH * os.path.getsize(source)
    if size > most:
        raise Refused(f"tensors of at most {MAX_GROWTH} times the file's bytes ({most})", f"{size} bytes of them")
    # Wide items first: then each tensor's data is aligned to its items, as mapping it wants.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    with open(target, "xb") as file:
        file.write(header({name: tensors[name] for name in order}))
        for name in order:
            for piece in pieces(tensors[name]):
                file.write(piece)
                wrote(len(piece))


def load(path: str) -> Any:
    """What the file holds, if that is made of nothing but plain values and tensors. Nothing that it names is called."""
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
        # The rest of torch's message says how to read the file without this protection.
        what = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
        raise Refused(expected, f"UnpicklingError: {what[1].strip()}" if what else "UnpicklingError") from None
    except MemoryError:
        raise Refused(expected, "one that takes much more memory than its own size") from None
    except (
        RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
        EOFError, OSError, struct.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip  # a reader of pickles fails in as many ways as there are bytes to read
        raise Refused(expected, _line(error)) from None


def check_records(path: str) -> None:
    """Refuses programs, and compressed records: these can't be mapped, and a small one may be huge."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise AsksForCode("names and tensors alone", "a TorchScript archive, which is a program")
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise Refused("records without compression, as torch.save writes them", f"{record.filename!a}")


def state_dict(loaded: Any) -> dict[str, Tensor]:
    """The names and tensors: the file's own object, or the one that a training loop wrapped."""
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
    """Refuses what safetensors can't hold, and what isn't all there."""
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
    """The safetensors header: the length, and the JSON, padded so that the data is aligned."""
    entries, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text = text.ljust(math.ceil((8 + len(text)) / 64) * 64 - 8)
    return len(text).to_bytes(8, "little") + text


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes; a view with gaps or turned axes is copied, one tensor at a time."""
    flat = tensor.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK].numpy().data


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _names(loaded: Mapping[Any, Any]) -> str:
    return ", ".join(ascii(name)[:40] for name in list(loaded)[:8]) or "nothing"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
