"""Read the files of a checkpoint directory. Refuse links that lead out of it, and files that change meanwhile."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.format.fields import MAX_PROBLEMS
from splitbundle_converter.errors import problem, refusal

LINKABLE_SUFFIX: Final = ".safetensors"
"""The suffix of files that may link to any place. They are large, and the converter checks that they are weights."""

_CACHED: Final = "models--"
"""The start of the name of a repository's directory in the hub's cache."""
_Identity = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDirectory:
    """The directory of a checkpoint, its name, and its commit if it comes from the hub."""

    path: Path
    name: str
    revision: str | None = None
    seen: dict[str, _Identity] = field(default_factory=dict, repr=False, compare=False)
    """The name of each file that was read -> its identity at the first read."""

    def has(self, name: str) -> bool:
        """Return whether an entry of this name exists, even if it is not a file or is a broken link."""
        return os.path.lexists(self.path / name)

    def read(self, name: str, most: int = strict_json.MAX_BYTES) -> bytes:
        """Return the content of a small file of at most ``most`` bytes.

        The file may be a link, because the hub's cache stores every file as a link. The link must not lead out of the
        checkpoint, except into the blobs of the hub's cache, and for files with ``LINKABLE_SUFFIX``. Only regular
        files are opened: reading a pipe could block forever.

        Raises:
            BundleError: ``source.missing``, ``source.unreadable``, ``source.changed``.
        """
        data = self.start(name, most + 1, f"a file {name} in {self.name}")
        if len(data) > most:
            got = f"{self.seen[name][2]} bytes"
            raise refusal("source.unreadable", name, f"a file of at most {most} bytes", got)
        return data

    def start(self, name: str, most: int, expected: str) -> bytes:
        """Return the first ``most`` bytes of a file. If it is missing, the error names ``expected`` as the expectation.

        Raises:
            BundleError: ``source.missing``, ``source.unreadable``, ``source.changed``.
        """
        path = self._find(name, expected)
        try:
            with path.open("rb") as file:
                self._see(name, os.fstat(file.fileno()))
                return file.read(most)
        except OSError as error:
            raise unreadable(name, error) from error

    def weights(self, file: str, named_by: str) -> Path:
        """Return the path of a weight file that ``named_by`` names. Check that it exists and is not a Git LFS pointer.

        Raises:
            BundleError: ``source.missing``, ``source.unreadable``, ``source.lfs-pointer``, ``source.changed``.
        """
        beginning = self.start(file, 40, f"a file that {named_by} names")
        if beginning.startswith(b"version https://git-lfs"):
            hint = "Fetch the weights: git lfs pull"
            raise refusal("source.lfs-pointer", file, "weights", "a Git LFS pointer", hint)
        return self.path / file

    def watch(self, path: Path) -> None:
        """Let ``check_unchanged`` check a file in another directory, too.

        Raises:
            BundleError: ``source.unreadable``.
        """
        name = str(path.absolute())
        try:
            self._see(name, path.stat())
        except OSError as error:
            raise unreadable(name, error) from error

    def check_unchanged(self) -> None:
        """Check that no file changed after it was first read.

        Raises:
            BundleError: ``source.changed``, with one problem for each changed file.
        """
        problems = [found for name in self.seen if (found := self._changed(name, self._now(name))) is not None]
        if problems:
            raise BundleError(problems[:MAX_PROBLEMS])

    def _find(self, name: str, expected: str) -> Path:
        """Return the real path of a file, after following links."""
        try:
            path = Path(os.path.realpath(self.path / name, strict=True))
            mode = path.stat().st_mode
        except FileNotFoundError:
            got = "a link to nothing" if self.has(name) else "none"
            raise refusal("source.missing", name, expected, got) from None
        except OSError as error:
            raise unreadable(name, error) from error
        if not stat.S_ISREG(mode):
            got = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise refusal("source.unreadable", name, "a regular file", got)
        own = path.is_relative_to(os.path.realpath(self.path)) or _is_blob(path)
        if not name.endswith(LINKABLE_SUFFIX) and not own:
            expected, hint = "a file of the checkpoint", "To use this file, copy it into the checkpoint"
            raise refusal("source.unreadable", name, expected, "a link that leads out of it", hint)
        return path

    def _now(self, name: str) -> os.stat_result | None:
        try:
            return (self.path / name).stat()
        except OSError:
            return None

    def _see(self, name: str, status: os.stat_result) -> None:
        found = self._changed(name, status)
        if found is not None:
            raise BundleError(found)
        self.seen[name] = _identity(status)

    def _changed(self, name: str, status: os.stat_result | None) -> Problem | None:
        if name not in self.seen or (status is not None and _identity(status) == self.seen[name]):
            return None
        expected, got = "a file that does not change during the conversion", "a file that was changed or replaced"
        return problem("source.changed", name, expected, got, "Convert again when no program writes to it")


def local_name(path: Path) -> tuple[str, str | None]:
    """Return the name of a checkpoint directory, and its commit if it is a snapshot in the hub's cache.

    The cache names a snapshot by its commit. Its name is then that of the repository.
    """
    directory = Path(os.path.realpath(path))
    repository = directory.parent.parent.name.removeprefix(_CACHED)
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith(_CACHED) and repository:
        commit = directory.name if re.fullmatch(r"[0-9a-f]{40}", directory.name) else None
        return repository.replace("--", "/", 1), commit
    return directory.name, None


def _is_blob(path: Path) -> bool:
    """Return whether a path is a file of the hub's cache, which every snapshot and old ``local_dir`` links to."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith(_CACHED)


def unreadable(name: str, error: OSError) -> BundleError:
    """Return the error for a file that the operating system refuses to read."""
    hint = "Check the permissions of the file"
    return refusal("source.unreadable", name, "a file that can be read", f"{error.strerror}", hint)


def _identity(status: os.stat_result) -> _Identity:
    """Return values that change when a file is written or replaced. No program can set the last one, ctime, back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
