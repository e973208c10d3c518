"""Download files by their digests: several at once, each completed where an earlier try stopped, and checked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem, VerificationError
from splitbundle.format.manifest.document import File
from splitbundle.sharing.jobs import JOBS, Stopped, run_jobs
from splitbundle.sharing.network import Patience, lost, network_error, persistently
from splitbundle.sharing.store import Store, start_writing, write_all
from splitbundle.sharing.transport import Source

CHUNK: Final = 2**18
"""The bytes that are read, written and hashed at once. The chunks of all threads fit into a processor's cache."""
WRITTEN_AT_ONCE: Final = 2**22
"""The bytes after which the system is asked to write them to the disk. The end then waits for the last ones alone."""
NEW_BYTES: Final = 2**20
"""A try that brings at least so many bytes more than every try before it has made progress."""

Advance = Callable[[int], None]
"""A function that is called with a number of bytes that moved: negative if they have to be moved again."""


class Downloads:
    """The download of some files of one source into a store."""

    def __init__(self, source: Source, store: Store, patience: Patience, advance: Advance) -> None:
        self._source = source
        self._store = store
        self._patience = patience
        self._advance = advance
        self._stop = threading.Event()
        self._waits: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self.received = 0
        """The bytes that came from the source, also those that came in vain."""

    def run(self, wanted: Mapping[str, File], jobs: int = JOBS) -> None:
        """Download the files of these paths, or wait for the process that downloads them already.

        Raises:
            NetworkError: the source doesn't deliver.
            VerificationError: ``file.digest``, ``file.size`` for bytes that aren't the listed ones.
            BundleError: ``output.failed`` if the system doesn't let them be written.
        """
        # A file that several paths have is one file. The largest ones begin, so that no large one is left for the end.
        unique = {file.sha256: (path, file) for path, file in reversed(list(wanted.items()))}
        run_jobs(
            [partial(self._fetch, *item) for item in sorted(unique.values(), key=lambda item: -item[1].size)],
            jobs,
            self._stop,
        )

    def _fetch(self, path: str, listed: File) -> bool:
        """Download one file. Return False to be called again later, because another process is at work on it."""
        store = self._store
        try:
            if store.has(listed):
                self._advance(listed.size)
                return True
            part = store.claim(listed)
            if part is None and not self._is_stuck(listed):
                return False
            part = part or store.claim_own(listed)
            with contextlib.closing(part):
                if store.has(listed):  # the process that had it has finished it
                    store.forget(part, listed)
                    self._advance(listed.size)
                    return True
                self._complete(part, path, listed)
                store.keep(part, listed)
        except OSError as error:
            got = f"{type(error).__name__}: {error}"
            hint = "Check the space and the permissions there"
            problem = Problem(
                code="output.failed", file=str(store.root), expected="a place that can be written", got=got, hint=hint
            )
            raise BundleError(problem) from error
        return True

    def _is_stuck(self, listed: File) -> bool:
        """Return whether the process that has a file makes no progress any more, though it still runs."""
        now, size = time.monotonic(), self._store.present_part(listed)
        before, since = self._waits.get(listed.sha256, (-1, now))
        self._waits[listed.sha256] = (size, since if size == before else now)
        return size == before and now - since > 2 * self._patience.timeout

    def _complete(self, part: BinaryIO, path: str, listed: File) -> None:
        done = os.fstat(part.fileno()).st_size
        state = _State(part, self._advance)
        resumed = 0 < done <= listed.size
        if resumed:
            state.resume(done, self._stop)
        else:
            state.restart()
        highest = state.done

        def progressed() -> bool:
            nonlocal highest
            if state.done < highest + NEW_BYTES:
                return False
            highest = state.done
            return True

        while True:
            tries = 0

            def once() -> None:
                nonlocal tries
                tries += 1
                self._receive(state, path, listed)

            if state.done < listed.size:
                persistently(once, self._patience, progressed)
            if state.digest.hexdigest() == listed.sha256:
                return
            got = state.digest.hexdigest()
            state.restart()
            # The pieces of several tries may belong to several files: the file may have changed between them.
            if not resumed and tries < 2:
                self._store.forget(part, listed)
                hint = "The other side has other bytes than its manifest lists. Nothing of them was kept"
                raise VerificationError(
                    Problem(code="file.digest", file=path, expected=f"sha256 {listed.sha256}", got=got, hint=hint)
                )
            resumed, highest = False, 0

    def _receive(self, state: _State, path: str, listed: File) -> None:
        stream = self._source.open(path, listed, state.done)
        with contextlib.closing(stream):
            if stream.start != state.done:
                state.restart()
            view = memoryview(bytearray(min(CHUNK, max(listed.size - state.done, 1))))
            while count := stream.readinto(view):
                with self._lock:
                    self.received += count
                if self._stop.is_set():
                    raise Stopped
                if state.done + count > listed.size:
                    state.restart()
                    raise network_error("network.answer", path, f"{listed.size} bytes", "more")
                state.add(view[:count])
        if state.done < listed.size:
            raise lost(path, f"the end after {state.done} of {listed.size} bytes")


class _State:
    """An unfinished file, and the digest of its bytes so far."""

    def __init__(self, part: BinaryIO, advance: Advance) -> None:
        self._part = part
        self._advance = advance
        self.digest = hashlib.sha256()
        self.done = 0
        self._on_the_way = 0

    def resume(self, done: int, stop: threading.Event) -> None:
        """Hash the bytes that an earlier try left."""
        view = memoryview(bytearray(CHUNK))
        self._part.seek(0)
        while self.done < done and (count := self._part.readinto(view)):  # type: ignore[attr-defined]
            if stop.is_set():
                raise Stopped
            self.digest.update(view[:count])
            self.done += count
            self._advance(count)
        self._part.seek(self.done)
        self._on_the_way = self.done

    def restart(self) -> None:
        """Throw away what is there."""
        self._advance(-self.done)
        self.done = self._on_the_way = 0
        self.digest = hashlib.sha256()
        self._part.seek(0)
        self._part.truncate()

    def add(self, data: memoryview) -> None:
        """Write and hash the next bytes."""
        write_all(self._part, data)
        self.digest.update(data)
        self.done += len(data)
        if self.done - self._on_the_way >= WRITTEN_AT_ONCE:
            start_writing(self._part, self._on_the_way, self.done)
            self._on_the_way = self.done
        self._advance(len(data))
