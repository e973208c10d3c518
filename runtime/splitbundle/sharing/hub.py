"""Bundles on the Hugging Face Hub. ``huggingface_hub`` finds and commits; the bytes come through our own client.

The library's own downloads believe a file's name and size. Here each digest is checked before a file is visible.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from splitbundle.errors import BundleError, MissingExtra, Problem, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.manifest.document import FILE, File, Manifest
from splitbundle.sharing.http_client import HttpClient
from splitbundle.sharing.http_files import HttpStream, open_from, read_small
from splitbundle.sharing.local import LocalStream
from splitbundle.sharing.network import NetworkError, Patience, network_error, persistently
from splitbundle.sharing.reference import Reference
from splitbundle.sharing.transport import LocalFile, Resolved, files_there

try:
    import huggingface_hub
    from huggingface_hub import errors
except ModuleNotFoundError as missing:
    if missing.name != "huggingface_hub":
        raise
    raise MissingExtra.of("huggingface_hub", "share", "share bundles through the Hugging Face Hub") from None

OWN_FILES = (".gitattributes", ".gitignore", "README.md", "LICENSE")
"""Files that a repository may have beside a bundle."""


class HubPlace:
    """A folder of a repository, at one commit."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self.reference = reference
        self.api = huggingface_hub.HfApi()
        self.client = HttpClient(patience)
        self.commit = ""
        self.paths: list[str] = []
        token = huggingface_hub.get_token()
        self.ask = partial(self.client.ask, authorization=f"Bearer {token}" if token else None)

    def look(self) -> str:
        """Return the commit that the revision means now, and its files.

        Raises:
            NetworkError: ``network.*``.
        """

        def once() -> tuple[str, list[str]]:
            with self.failures():
                found = self.api.model_info(
                    self.reference.path, revision=self.reference.revision, timeout=self.client.patience.timeout
                )
            paths = [each.rfilename for each in found.siblings or []]
            return str(found.sha), paths

        commit, self.paths = persistently(once, self.client.patience)
        return commit

    def path_of(self, path: str) -> str:
        """Return the path of a bundle's file in the repository."""
        return f"{self.reference.folder}/{path}" if self.reference.folder else path

    def url(self, path: str) -> str:
        """Return the URL of a bundle's file at the commit."""
        return huggingface_hub.hf_hub_url(
            self.reference.path, self.path_of(path), revision=self.commit, endpoint=self.api.endpoint
        )

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Turn the errors of the library into ``NetworkError``."""
        place = str(self.reference)
        page = f"{self.api.endpoint}/{self.reference.path}"
        try:
            yield
        except errors.GatedRepoError as error:
            hint = f"Accept the license on {page}, and set HF_TOKEN to a token of that account"
            raise network_error("network.auth", place, "access to a gated model", _said(error), hint) from error
        except errors.RevisionNotFoundError as error:
            revision = quoted(self.reference.revision)
            raise network_error("network.missing", place, f"the revision {revision}", "none of this name") from error
        except errors.RepositoryNotFoundError as error:
            hint = "Check the spelling. A private repository needs HF_TOKEN, or hf auth login"
            raise network_error("network.missing", place, "a repository that you can see", "none", hint) from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in (401, 403):
                hint = "Set HF_TOKEN to a token that may do this, or run hf auth login"
                raise network_error(
                    "network.auth", place, "access", f"status {status}: {_said(error)}", hint
                ) from error
            if status in (409, 412):
                hint = "Another push came in between. Run this again"
                got = f"status {status}: {_said(error)}"
                raise network_error("remote.changed", place, "the commit of the beginning", got, hint) from error
            busy = status in (429, 503)
            raise network_error(
                "network.busy" if busy else "network",
                place,
                "an answer from the Hub",
                f"status {status}: {_said(error)}",
                "Run this again later",
                transient=busy or status >= 500,
            ) from error
        except errors.HFValidationError as error:
            raise network_error("usage.reference", place, "a name of a repository", _said(error)) from error
        except (OSError, RuntimeError) as error:  # the library's HTTP errors are neither of one base nor of one package
            raise network_error("network", place, "an answer from the Hub", _said(error), transient=True) from error
        except Exception as error:  # the client that the library uses has errors of its own
            if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
                raise
            raise network_error("network", place, "an answer from the Hub", _said(error), transient=True) from error


class HubSource:
    """A bundle in a repository."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._place = HubPlace(reference, patience)

    def resolve(self) -> Resolved:
        """Find the commit that the revision means."""
        self._place.commit = self._place.look()
        return Resolved(revision=self._place.commit, bundle_id=self._place.reference.pin)

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file."""
        place = self._place
        try:
            return read_small(place.ask, place.url(path), limit, place.client.patience)
        except NetworkError as error:
            raise self._gated(error) from error

    def open(self, path: str, listed: File, start: int) -> HttpStream | LocalStream:
        """Open a file, from the library's own cache if it is there."""
        place = self._place
        cached = huggingface_hub.try_to_load_from_cache(
            place.reference.path, place.path_of(path), revision=place.commit
        )
        if isinstance(cached, str):
            with contextlib.suppress(OSError):
                file = open(cached, "rb", buffering=0)  # noqa: SIM115  # the stream closes it
                if os.fstat(file.fileno()).st_size == listed.size:
                    file.seek(start)
                    return LocalStream(file, path, start)
                file.close()
        try:
            return open_from(place.ask, place.url(path), listed, start)
        except NetworkError as error:
            raise self._gated(error) from error

    def signatures(self) -> list[str]:
        """Return the paths of the signatures."""
        folder = self._place.path_of("")
        inside = [name.removeprefix(folder) for name in self._place.paths if name.startswith(folder)]
        return sorted(name for name in inside if names.is_signature(name))

    def moved(self) -> str | None:
        """Return the commit that the revision means now, if it is another one."""
        now = self._place.look()
        return now if now != self._place.commit else None

    def _gated(self, error: NetworkError) -> NetworkError:
        if error.codes != ("network.auth",):
            return error
        page = f"{self._place.api.endpoint}/{self._place.reference.path}"
        hint = f"Accept the license on {page} if it has one, and set HF_TOKEN to a token of that account"
        problem = error.problems[0]
        return network_error("network.auth", str(self._place.reference), problem.expected, problem.got, hint)


class HubDestination:
    """A folder of a repository. A push is one commit."""

    by_digest = False

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._place = HubPlace(reference, patience)
        self._adds: dict[str, Path] = {}
        self._removes: list[str] = []

    def begin(self, manifest: Manifest, listed: Mapping[str, File], *, force: bool, dry_run: bool) -> set[str]:
        """Find out which files are there already. Make the repository if there is none."""
        place = self._place
        try:
            place.commit = place.look()
        except NetworkError as error:
            if error.codes != ("network.missing",):
                raise
            if place.reference.revision is not None:
                hint = "Make the repository and the branch on the Hub first, or push to its main branch, without @"
                expected, got = f"a branch {quoted(place.reference.revision)}", "none: a push goes to one that is there"
                raise network_error("network.missing", str(place.reference), expected, got, hint) from error
            if dry_run:
                return set()
            with place.failures():
                place.api.create_repo(place.reference.path, private=None, exist_ok=True)
            place.commit = place.look()
        folder = place.path_of("")
        here = {name.removeprefix(folder) for name in place.paths if name.startswith(folder)}
        old = self._old() if FILE in here else {}
        if FILE not in here and here.difference(OWN_FILES) and not force:
            hint = f"Push into a folder: hf://{place.reference.path}/FOLDER. force=True writes beside these files"
            expected, got = "an empty place, or a bundle", f"other files, such as {quoted(min(here))}"
            problem = Problem(code="output.exists", file=str(place.reference), expected=expected, got=got, hint=hint)
            raise BundleError(problem)
        self._removes = sorted(
            path for path in (old.keys() | set(filter(names.is_signature, here))) & here - listed.keys()
        )
        return {path for path, file in listed.items() if path in here and old.get(path) == (file.size, file.sha256)}

    def _old(self) -> dict[str, tuple[int, str]]:
        """Return the files of the bundle that is there, by its manifest."""
        try:
            data = read_small(
                self._place.ask, self._place.url(FILE), strict_json.MAX_BYTES, self._place.client.patience
            )
            return files_there(data)
        except BundleError:
            return {}

    def send(self, path: str, listed: File, file: LocalFile) -> None:
        """Take a file into the commit. ``finish`` uploads it."""
        self._adds[path] = file.place

    def finish(self) -> str | None:
        """Upload all files, and commit them, unless another commit came in between."""
        place = self._place
        operations: list[Any] = [
            huggingface_hub.CommitOperationAdd(place.path_of(path), str(file)) for path, file in self._adds.items()
        ]
        operations += [huggingface_hub.CommitOperationDelete(place.path_of(path)) for path in self._removes]
        if not operations:
            return place.commit
        with place.failures():
            made: Any = place.api.create_commit(
                place.reference.path,
                operations,
                commit_message="Push a bundle with splitbundle",
                revision=place.reference.revision,
                parent_commit=place.commit,
            )
        return str(made.oid)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
