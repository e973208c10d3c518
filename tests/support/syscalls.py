"""Trace the system calls of a process one after another, and put a fault in place of any: ptrace, with ctypes.

It works only on Linux on x86-64, whose numbers and registers this file knows. It needs no installed library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

_GETREGS, _SETREGS, _DETACH, _SYSCALL = 12, 13, 17, 24
_SEIZE, _INTERRUPT, _SYSCALL_INFO = 0x4206, 0x4207, 0x420E
_SYSGOOD, _EXITKILL = 0x1, 0x100000
_ENTRY: Final = 1
_ALL: Final = 0x40000000  # __WALL
_REGISTERS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in _REGISTERS]


class _Info(ctypes.Structure):
    _fields_ = [
        *(("op", ctypes.c_uint8), ("pad", ctypes.c_uint8 * 3), ("arch", ctypes.c_uint32)),
        *(("ip", ctypes.c_uint64), ("sp", ctypes.c_uint64), ("number", ctypes.c_uint64)),
        *(("arguments", ctypes.c_uint64 * 6), ("more", ctypes.c_uint64 * 4)),
    ]


# For each call that takes a path or a handle of one: its number and the kinds of its arguments. "p" is a
# path, "a" a directory's handle and the path after it, "f" a handle, "-" something else.
_CALLS: Final[dict[int, tuple[str, str]]] = {
    0: ("read", "f"), 1: ("write", "f"), 2: ("open", "p"), 3: ("close", "f"), 4: ("stat", "p"), 5: ("fstat", "f"),
    6: ("lstat", "p"), 8: ("lseek", "f"), 9: ("mmap", "----f"), 16: ("ioctl", "f"), 17: ("pread64", "f"),
    18: ("pwrite64", "f"), 19: ("readv", "f"), 20: ("writev", "f"), 21: ("access", "p"), 32: ("dup", "f"),
    40: ("sendfile", "ff"), 72: ("fcntl", "f"), 73: ("flock", "f"), 74: ("fsync", "f"), 75: ("fdatasync", "f"),
    76: ("truncate", "p"), 77: ("ftruncate", "f"), 78: ("getdents", "f"), 80: ("chdir", "p"), 81: ("fchdir", "f"),
    82: ("rename", "pp"), 83: ("mkdir", "p"), 84: ("rmdir", "p"), 85: ("creat", "p"), 86: ("link", "pp"),
    87: ("unlink", "p"), 88: ("symlink", "-p"), 89: ("readlink", "p"), 90: ("chmod", "p"), 91: ("fchmod", "f"),
    92: ("chown", "p"), 93: ("fchown", "f"), 137: ("statfs", "p"), 138: ("fstatfs", "f"), 217: ("getdents64", "f"),
    257: ("openat", "a"), 258: ("mkdirat", "a"), 260: ("fchownat", "a"), 262: ("newfstatat", "a"),
    263: ("unlinkat", "a"), 264: ("renameat", "a-a"), 265: ("linkat", "a-a"), 266: ("symlinkat", "-a"),
    267: ("readlinkat", "a"), 268: ("fchmodat", "a"), 269: ("faccessat", "a"), 280: ("utimensat", "a"),
    285: ("fallocate", "f"), 316: ("renameat2", "a-a"), 326: ("copy_file_range", "f-f"), 332: ("statx", "a"),
    437: ("openat2", "a"), 439: ("faccessat2", "a"), 452: ("fchmodat2", "a"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A system call that touches the watched directory. Its process is about to make it."""

    number: int
    """The number of this call among those calls, counted from 0."""
    name: str
    arguments: tuple[int, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The fault of a call."""

    error: int = 0
    """An errno. The call isn't made, and fails; with ``late``, it is made and reported as failed."""
    late: bool = False
    short: bool = False
    """The call asks for half of its bytes."""
    signal: int = 0
    """A signal that is sent before the call is made. SIGKILL ends the process there."""
    last: bool = True
    """This is the last fault: the process goes on at its own speed."""


def unavailable() -> str | None:
    """Return why calls can't be traced here; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"system calls are traced on Linux and x86-64 alone, not {sys.platform} and {platform.machine()}"
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(receive, 1)
        os._exit(0)
    try:
        Tracee(child).detach()
    except OSError as error:
        return f"the system doesn't let a process be traced: {error}"
    finally:
        os.write(send, b".")
        os.close(send)
        os.close(receive)
        os.waitpid(child, _ALL)
    return None


def _ptrace(request: int, pid: int, address: Any = 0, data: Any = 0) -> int:
    libc = _libc()
    result: int = libc.ptrace(ctypes.c_long(request), ctypes.c_long(pid), ctypes.c_void_p(address), data)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace {request:#x}: {os.strerror(code)}")
    return result


def _libc() -> ctypes.CDLL:
    global _LIBC
    if _LIBC is None:
        _LIBC = ctypes.CDLL(None, use_errno=True)
        _LIBC.ptrace.restype = ctypes.c_long
    return _LIBC


_LIBC: ctypes.CDLL | None = None


class Tracee:
    """A child of this process, with one thread, that waits in a system call. Creating this object stops it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended: int | None = None
        """How it ended, in the form of ``waitpid``."""
        self._memory = -1
        self._inside: bool | None = None
        _ptrace(_SEIZE, pid, 0, ctypes.c_void_p(_SYSGOOD | _EXITKILL))
        _ptrace(_INTERRUPT, pid)
        os.waitpid(pid, _ALL)

    def run(self, root: str, until: int, decide: Callable[[Call], Fault | None]) -> None:
        """Go on until the process ends, writes to the handle ``until``, or meets its last fault. Then let it go.

        Args:
            root: the watched directory, without links in its path.
            until: a handle of the process.
            decide: returns the fault of each call that touches the directory.
        """
        count = 0
        for entry in self._entries():
            if entry.number == 1 and entry.arguments[0] == until:
                break
            name, kinds = _CALLS.get(entry.number, ("", ""))
            paths = self._paths(kinds, entry.arguments)
            if not any(path == root or path.startswith(root + "/") for path in paths):
                continue
            fault = decide(Call(number=count, name=name, arguments=tuple(entry.arguments), paths=tuple(paths)))
            count += 1
            if fault is not None:
                self._inject(fault)
                if fault.last or self.ended is not None:
                    break
        self.detach()

    def detach(self) -> None:
        """Let the process go."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        if self.ended is None:
            _ptrace(_DETACH, self.pid)

    def _entries(self) -> Iterator[_Info]:
        """Yield every call when it is about to be made."""
        info = _Info()
        while self._go():
            if self._inside is not False:  # begins and ends alternate, once the first one is known
                _ptrace(_SYSCALL_INFO, self.pid, ctypes.sizeof(info), ctypes.byref(info))
                self._inside = info.op == _ENTRY
                if self._inside:
                    yield info

    def _go(self) -> bool:
        """Go to the next begin or end of a call. Return False if the process ended before."""
        passed = 0
        while True:
            _ptrace(_SYSCALL, self.pid, 0, ctypes.c_void_p(passed))
            _, status = os.waitpid(self.pid, _ALL)
            if not os.WIFSTOPPED(status):
                self.ended = status
                return False
            if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
                self._inside = None if self._inside is None else not self._inside
                return True
            passed = 0 if status >> 16 else os.WSTOPSIG(status)

    def _inject(self, fault: Fault) -> None:
        if fault.signal:
            os.kill(self.pid, fault.signal)
            if fault.signal == signal.SIGKILL:
                _, self.ended = os.waitpid(self.pid, _ALL)
                return
        if fault.short:
            self._set(rdx=max(1, self._registers().rdx // 2))
        if fault.error:
            if not fault.late:
                self._set(orig_rax=2**64 - 1)  # a call that doesn't exist
            if self._go():
                self._set(rax=2**64 - fault.error)

    def _registers(self) -> _Registers:
        registers = _Registers()
        _ptrace(_GETREGS, self.pid, 0, ctypes.byref(registers))
        return registers

    def _set(self, **values: int) -> None:
        registers = self._registers()
        for name, value in values.items():
            setattr(registers, name, value)
        _ptrace(_SETREGS, self.pid, 0, ctypes.byref(registers))

    def _paths(self, kinds: str, arguments: Any) -> list[str]:
        paths, place = [], 0
        for kind in kinds:
            if kind == "f":
                paths.append(self._handle(arguments[place]))
            elif kind in "pa":
                start = "cwd" if kind == "p" else None
                if kind == "a":
                    start = "cwd" if ctypes.c_int(arguments[place]).value == -100 else f"fd/{arguments[place]}"
                    place += 1
                path = self._text(arguments[place])
                paths.append(path if path.startswith("/") else f"{self._link(start or '')}/{path}".rstrip("/"))
            place += 1
        return paths

    def _handle(self, number: int) -> str:
        return self._link(f"fd/{number}") if number < 2**31 else ""

    def _link(self, what: str) -> str:
        try:
            return os.readlink(f"/proc/{self.pid}/{what}").removesuffix(" (deleted)")
        except OSError:
            return ""

    def _text(self, address: int) -> str:
        if not address:
            return ""
        if self._memory < 0:
            self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        text = b""
        try:
            while b"\0" not in text and len(text) < 4096:  # a page may be the last one that is mapped
                text += os.pread(self._memory, 4096 - (address + len(text)) % 4096, address + len(text))
        except OSError:
            return ""  # no address: some libraries make such calls to see the system's answer
        return os.fsdecode(text.partition(b"\0")[0])
