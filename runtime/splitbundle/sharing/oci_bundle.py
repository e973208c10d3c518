"""Bundles in an OCI registry: a layer for each file, so that a shard is pulled alone and nothing is stored twice."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Mapping
from functools import partial

from splitbundle.errors import BundleError, Problem, VerificationError
from splitbundle.format import names
from splitbundle.format.manifest.document import FILE, File, Manifest, identity
from splitbundle.sharing import model_pack
from splitbundle.sharing.http_files import HttpStream
from splitbundle.sharing.jobs import JOBS, run_jobs
from splitbundle.sharing.network import Patience, network_error, persistently
from splitbundle.sharing.reference import DEFAULT_TAG, Reference
from splitbundle.sharing.registry import Registry, check_layer
from splitbundle.sharing.transport import LocalFile, Resolved


class OciSource:
    """A bundle in a registry."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._reference = reference
        self._registry = Registry(reference, patience)
        self._tag: str | None = reference.revision or DEFAULT_TAG
        self._digest = ""
        self._files: dict[str, File] = {}

    def resolve(self) -> Resolved:
        """Find the manifest that a tag or a digest names."""
        pin, found = self._reference.pin, None
        if pin is not None and self._reference.revision is None:
            found = self._registry.manifest(pin)
            self._tag = None if found is not None else self._tag
        if found is None:
            found = self._registry.manifest(self._tag or DEFAULT_TAG)
        if found is None:
            place = f"{self._reference.scheme}://{self._reference.host}/{self._reference.path}"
            hint = f"splitbundle list {place} shows the tags"
            expected, got = f"the tag {self._tag}", "none of this name"
            raise network_error("network.missing", self._reference.unpinned, expected, got, hint)
        data, self._digest = found
        self._files, _ = model_pack.parse_image_manifest(data, self._reference.unpinned)
        return Resolved(revision=self._digest, bundle_id=None if pin == self._digest else pin)

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file, as the registry's manifest lists it."""
        listed = self._files.get(path)
        if listed is None or listed.size > limit:
            got = "none" if listed is None else f"one of {listed.size} bytes"
            expected = f"a layer with this file, of at most {limit} bytes"
            raise BundleError(Problem(code="remote.manifest", file=path, expected=expected, got=got))

        def once() -> bytes:
            stream, data, view = self._registry.open_blob(listed, 0), bytearray(), memoryview(bytearray(2**16))
            with contextlib.closing(stream):
                while len(data) <= listed.size and (count := stream.readinto(view)):
                    data += view[:count]
            return bytes(data)

        data = persistently(once, self._registry.patience)
        if identity(data) != f"sha256:{listed.sha256}":
            raise VerificationError(
                Problem(code="file.digest", file=path, expected=f"sha256 {listed.sha256}", got=identity(data))
            )
        return data

    def open(self, path: str, listed: File, start: int) -> HttpStream:
        """Open a file by its digest."""
        check_layer(self._files, path, listed, self._reference.unpinned)
        return self._registry.open_blob(listed, start)

    def signatures(self) -> list[str]:
        """Return the paths of the signatures."""
        return sorted(path for path in self._files if names.is_signature(path))

    def moved(self) -> str | None:
        """Return the digest that the tag has now, if it is another one."""
        now = None if self._tag is None else self._registry.digest_of(self._tag)
        return now if now != self._digest else None


class OciDestination:
    """A tag of a registry."""

    by_digest = True

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._reference = reference
        self._registry = Registry(reference, patience)
        self._tag = reference.revision or DEFAULT_TAG
        self._before: str | None = None
        self._config, self._manifest = b"", b""

    def begin(self, manifest: Manifest, listed: Mapping[str, File], *, force: bool, dry_run: bool) -> set[str]:
        """Ask which files are there already."""
        self._before = self._registry.digest_of(self._tag)
        self._config = model_pack.configuration(manifest, listed)
        self._manifest = model_pack.image_manifest(f"sha256:{listed[FILE].sha256}", self._config, listed)
        return present(listed, self._registry.has_blob)

    def send(self, path: str, listed: File, file: LocalFile) -> None:
        """Upload one file."""
        self._registry.upload(listed, file.pieces)

    def finish(self) -> str | None:
        """Upload the configuration and then, as the last step, the manifest, which moves the tag."""
        config = File(size=len(self._config), sha256=hashlib.sha256(self._config).hexdigest())
        if not self._registry.has_blob(config):
            self._registry.upload(config, lambda: [self._config])
        now = self._registry.digest_of(self._tag)
        if now not in (self._before, identity(self._manifest)):
            expected, got = f"the tag {self._tag} at {self._before or 'nothing'}, as at the beginning", str(now)
            hint = "Another push came in between. Run this again to replace it"
            raise network_error("remote.changed", self._reference.unpinned, expected, got, hint)
        return self._registry.put_manifest(self._tag, self._manifest)


def present(listed: Mapping[str, File], has: Callable[[File], bool]) -> set[str]:
    """Return the paths of the files that are there, asked for several at once."""
    there: dict[str, bool] = {}

    def ask(file: File) -> bool:
        there[file.sha256] = has(file)
        return True

    unique = {file.sha256: file for file in listed.values()}
    run_jobs([partial(ask, file) for file in unique.values()], JOBS, threading.Event())
    return {path for path, file in listed.items() if there[file.sha256]}
