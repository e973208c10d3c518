"""The cache of pulled bundles: files by digest, and a directory for each bundle that has hard links to them.

``spec/decisions/0020`` says why. The layout:

    blobs/ab/cdef…            a whole file, read-only, under its SHA-256 digest
    parts/abcdef…             an unfinished file
    bundles/HEX/…             a bundle under its id: manifest.json, and links to the blobs that it has
    references/HEX.json       what a reference meant when it was last asked, for offline use
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format import names, strict_json
from splitbundle.format.manifest.document import FILE, File, Manifest, checksums
from splitbundle.records import record
from splitbundle.sharing.network import network_error
from splitbundle.sharing.store import READ_ONLY, Store, is_file_of
from splitbundle.storage import files

if sys.platform != "win32":
    import fcntl

VARIABLE: Final = "SPLITBUNDLE_CACHE"
OFFLINE: Final = ("SPLITBUNDLE_OFFLINE", "HF_HUB_OFFLINE")
TAG: Final = "Signature: 8a477f597d28d172789f06886806bc55\n# splitbundle's cache: backups may leave it out\n"
"""The content of CACHEDIR.TAG (https://bford.info/cachedir/)."""
UNFINISHED: Final = re.compile(r"\.[0-9a-f]{16}\Z")
"""The end of the name of a small file that is being written, or of which the writer was killed."""
_NO_LINKS: Final = (
    *(errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV),
    errno.EINVAL,  # Windows, on FAT and on shares
)


@record(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What a reference meant when it was last asked."""

    reference: str
    bundle_id: str
    revision: str | None


def cache_root() -> Path:
    """Return the directory of the cache."""
    own = os.environ.get(VARIABLE)
    if own:
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG specification says of other values
        base = os.environ.get("LOCALAPPDATA", "") if sys.platform == "win32" else ""
    return Path(base or Path.home() / ".cache") / "splitbundle"


def is_offline() -> bool:
    """Return whether the environment forbids the network. Every value but those that say no forbids it."""
    return any(os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off") for name in OFFLINE)


def refuse_offline(place: str) -> None:
    """Refuse to ask another machine while the environment forbids it.

    Raises:
        NetworkError: ``network``.
    """
    if is_offline():
        hint = f"Take away {' and '.join(name for name in OFFLINE if os.environ.get(name))}"
        raise network_error("network", place, "a network that may be used", "offline", hint)


class Cache:
    """The cache of this user."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_root() if root is None else root
        self.store = Store(self.root)
        self.bundles = self.root / "bundles"
        self.references = self.root / "references"

    def path_of(self, bundle_id: str) -> Path:
        """Return the directory of a bundle."""
        return self.bundles / bundle_id.removeprefix("sha256:")

    def prepare(self) -> None:
        """Make the directories of the cache.

        Raises:
            BundleError: ``output.failed``.
        """
        with self.writing():
            self.store.prepare()
            self.bundles.mkdir(exist_ok=True)
            self.references.mkdir(exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"
            if not tag.exists():
                write_whole(tag, TAG.encode())

    @contextlib.contextmanager
    def lock(self, *, alone: bool) -> Iterator[None]:
        """Hold the cache for a pull, beside others, or alone to remove files. A process that dies holds nothing."""
        if sys.platform == "win32":
            yield
            return
        with self.writing():
            self.root.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
        with contextlib.closing(file):
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    def begin(self, bundle_id: str, manifest: Manifest, data: bytes, paths: Sequence[str]) -> Path:
        """Make the directory of a bundle, and return it. It appears with its manifest, checksums and these files."""
        target = self.path_of(bundle_id)
        digest = bundle_id.removeprefix("sha256:")
        documents = {FILE: data, names.SUMS: checksums(manifest.files, digest)}
        with self.writing():
            if target.is_dir():
                for name, content in documents.items():
                    if not _has(target / name, content):  # it was damaged
                        write_whole(target / name, content)
                return target
            staging = self.bundles / f".{digest[:16]}.{secrets.token_hex(8)}"
            staging.mkdir()
            for name, content in documents.items():
                (staging / name).write_bytes(content)
                if sys.platform != "win32":  # Windows replaces and removes no read-only file
                    (staging / name).chmod(READ_ONLY)
            for path in paths:
                self.link(staging, path, manifest.files[path])
            try:
                os.rename(staging, target)
            except OSError:
                shutil.rmtree(staging, ignore_errors=True)
                if not is_file_of(target / FILE, len(data)):  # another process was first
                    raise
        return target

    def link(self, root: Path, path: str, listed: File) -> None:
        """Put a whole blob into the directory of a bundle. It takes no second copy."""
        place = root / path
        if is_file_of(place, listed.size):
            return
        with self.writing():
            place.parent.mkdir(parents=True, exist_ok=True)
            blob = self.store.blob(listed.sha256)
            for _ in range(2):
                try:
                    os.link(blob, place)
                    return
                except FileExistsError:  # it was shortened, or another process was faster
                    if is_file_of(place, listed.size):
                        return
                    place.unlink()
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    os.replace(blob, place)  # a file system without hard links: this bundle keeps the only copy
                    return

    def add(self, root: Path, path: str, data: bytes) -> None:
        """Write a small file that the manifest doesn't list, such as a signature, into the directory of a bundle."""
        if not is_file_of(root / path, len(data)):
            with self.writing():
                (root / path).parent.mkdir(exist_ok=True)
                write_whole(root / path, data)

    def remember(self, reference: str, bundle_id: str, revision: str | None) -> None:
        """Keep what a reference means now."""
        document = {
            "format": "splitbundle-reference",
            "version": 1,
            "reference": reference,
            "bundle_id": bundle_id,
            "revision": revision,
        }
        with self.writing():
            write_whole(self._reference(reference), strict_json.dump(document))

    def forget(self, reference: str) -> None:
        """Forget what a reference meant."""
        with contextlib.suppress(FileNotFoundError):
            self._reference(reference).unlink()

    def recall(self, reference: str) -> Remembered | None:
        """Return what a reference meant when it was last asked, or None."""
        return self._remembered(self._reference(reference))

    def remembered(self) -> list[Remembered]:
        """Return everything that is remembered, the newest first."""
        try:
            found = [(each.stat().st_mtime, each) for each in self.references.glob("*.json")]
        except OSError:
            return []
        records = (self._remembered(path) for _, path in sorted(found, reverse=True))
        return [each for each in records if each is not None]

    def _reference(self, reference: str) -> Path:
        return self.references / f"{hashlib.sha256(reference.encode()).hexdigest()}.json"

    def _remembered(self, place: Path) -> Remembered | None:
        try:
            found = strict_json.parse(files.read_file(place.parent, place.name, 2**16), place.name)
        except BundleError:
            return None
        if not isinstance(found, dict) or found.get("version") != 1:
            return None
        reference, bundle_id, revision = (found.get(key) for key in ("reference", "bundle_id", "revision"))
        good = isinstance(reference, str) and isinstance(bundle_id, str) and names.IDENTITY.fullmatch(bundle_id)
        if not good or not (revision is None or isinstance(revision, str)):
            return None
        return Remembered(reference=str(reference), bundle_id=str(bundle_id), revision=revision)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn errors of the system into ``output.failed`` for the cache."""
        try:
            yield
        except OSError as error:
            got = f"{type(error).__name__}: {error}"
            hint = f"{VARIABLE} names another directory for the cache; output= pulls without it"
            expected = "a cache that can be written"
            problem = Problem(code="output.failed", file=str(self.root), expected=expected, got=got, hint=hint)
            raise BundleError(problem) from error


def _has(place: Path, content: bytes) -> bool:
    try:
        return is_file_of(place, len(content)) and place.read_bytes() == content
    except OSError:
        return False


def write_whole(place: Path, data: bytes) -> None:
    """Write a small file so that it appears with all its bytes."""
    staging = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    try:
        staging.write_bytes(data)
        os.replace(staging, place)
    except BaseException:
        with contextlib.suppress(OSError):
            staging.unlink()
        raise
