"""A client of OCI registries (https://github.com/opencontainers/distribution-spec, version 1.1)."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, VerificationError, quoted
from splitbundle.format import strict_json
from splitbundle.format.manifest.document import File
from splitbundle.sharing import model_pack
from splitbundle.sharing.http_client import Answer, HttpClient, origin
from splitbundle.sharing.http_files import HttpStream, open_from
from splitbundle.sharing.network import NetworkError, Patience, network_error, persistently
from splitbundle.sharing.reference import Reference, is_loopback, may_be_plain
from splitbundle.sharing.registry_login import DOCKER_HUB, Authorizer

MAX_TAGS: Final = 10_000
ACCEPTED: Final = ", ".join(
    (
        model_pack.MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_NEXT: Final = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


class Registry:
    """One repository of a registry."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        host, repository = reference.host, reference.path
        if host in ("docker.io", "index.docker.io"):
            host, repository = DOCKER_HUB, repository if "/" in repository else f"library/{repository}"
        self.patience = patience
        self._host, self._repository = host, repository
        self._client = HttpClient(patience)
        self._base = ""
        self._authorizer: Authorizer | None = None

    def manifest(self, name: str) -> tuple[bytes, str] | None:
        """Return a manifest by its tag or digest, with its digest. None if there is none.

        Raises:
            NetworkError: ``network.*``; ``network.answer`` for another manifest than the one asked for.
        """

        def once() -> tuple[bytes, str] | None:
            answer = self.ask(f"manifests/{name}", headers={"Accept": ACCEPTED}, accept=(200, 404))
            with answer:
                if answer.status == 404:
                    return None
                data = answer.read(model_pack.MAX_BYTES)
            return data, self._checked(answer, data, name)

        return persistently(once, self.patience)

    def _checked(self, answer: Answer, data: bytes, name: str) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        wanted = {name, digest} if name.startswith("sha256:") else {digest}
        stated = answer.headers.get("Docker-Content-Digest")
        if stated is not None and stated.startswith("sha256:"):
            wanted.add(stated)
        if len(wanted) > 1:
            others = ", ".join(sorted(wanted - {digest}))
            raise VerificationError(
                Problem(code="file.digest", file=answer.url, expected=f"the manifest {others}", got=digest)
            )
        return digest

    def digest_of(self, tag: str) -> str | None:
        """Return the digest that a tag has now, or None."""
        found = self.manifest(tag)
        return None if found is None else found[1]

    def put_manifest(self, name: str, data: bytes) -> str:
        """Store a manifest under a tag or a digest, and return its digest.

        Raises:
            NetworkError: ``network.answer`` if the registry has stored something else.
        """
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

        def once() -> None:
            answer = self.ask(
                f"manifests/{name}",
                method="PUT",
                headers={"Content-Type": model_pack.MANIFEST_TYPE},
                body=data,
                accept=(200, 201, 202),
                push=True,
            )
            answer.close()
            stated = answer.headers.get("Docker-Content-Digest", digest)
            if stated != digest:
                raise network_error("network.answer", answer.url, f"the manifest {digest} there", quoted(stated))

        persistently(once, self.patience)
        return digest

    def remove_tag(self, tag: str) -> bool:
        """Remove a tag, and leave the manifest and its other tags. Return False if there is no such tag."""
        if self.manifest(tag) is None:
            return False
        answer = self.ask(f"manifests/{tag}", method="DELETE", accept=(202, 200, 400, 405), push=True)
        answer.close()
        if answer.status in (200, 202) and self.manifest(tag) is None:
            return True
        # Older registries remove a manifest only by its digest, with all its tags. So the tag first gets a manifest of
        # its own, which nothing else has.
        config = json.dumps({"removed": secrets.token_hex(16)}).encode()
        empty = File(size=len(config), sha256=hashlib.sha256(config).hexdigest())
        self.upload(empty, lambda: [config])
        described = {"mediaType": "application/json", "digest": f"sha256:{empty.sha256}", "size": empty.size}
        document = {"schemaVersion": 2, "mediaType": model_pack.MANIFEST_TYPE, "config": described, "layers": []}
        digest = self.put_manifest(tag, strict_json.dump(document))
        self.ask(f"manifests/{digest}", method="DELETE", accept=(202, 200), push=True).close()
        return True

    def tags(self) -> list[str]:
        """Return all tags, sorted."""
        found: list[str] = []
        place: str | None = "tags/list?n=1000"
        while place is not None and len(found) < MAX_TAGS:
            asked = place
            answer = persistently(lambda asked=asked: self.ask(asked), self.patience)  # type: ignore[misc]
            try:
                listed = json.loads(answer.read(model_pack.MAX_BYTES)).get("tags") or []
            except (ValueError, AttributeError):
                listed = [None]
            if not isinstance(listed, list) or not all(isinstance(tag, str) for tag in listed):
                raise network_error("network.answer", answer.url, "a list of tags", "something else")
            found += listed
            more = _NEXT.search(answer.headers.get("Link", "")) if listed else None
            place = None if more is None else urllib.parse.urljoin(f"{self._base}tags/list", more[1])
        return sorted(set(found))

    def has_blob(self, listed: File) -> bool:
        """Return whether a file is there already."""

        def once() -> bool:
            answer = self.ask(f"blobs/sha256:{listed.sha256}", method="HEAD", accept=(200, 404), push=True)
            answer.close()
            return answer.status == 200 and answer.length in (None, listed.size)

        return persistently(once, self.patience)

    def open_blob(self, listed: File, start: int) -> HttpStream:
        """Open a file by its digest, from a byte on. One try."""
        return open_from(self._ask_for, f"blobs/sha256:{listed.sha256}", listed, start)

    def upload(self, listed: File, pieces: Callable[[], Iterable[bytes]]) -> None:
        """Store a file, in one piece.

        Raises:
            NetworkError: ``network.*``.
        """

        def once() -> None:
            begun = self.ask("blobs/uploads/", method="POST", body=b"", accept=(202,), push=True)
            begun.close()
            location = urllib.parse.urljoin(f"{self._base}blobs/uploads/", begun.headers.get("Location", ""))
            mark = "&" if "?" in location else "?"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(listed.size)}
            self.ask(
                f"{location}{mark}digest=sha256:{listed.sha256}",
                method="PUT",
                headers=headers,
                body=pieces(),
                accept=(201,),
                push=True,
            ).close()

        persistently(once, self.patience)

    def _ask_for(
        self, url: str, *, headers: Mapping[str, str] | None = None, accept: tuple[int, ...] = (200,)
    ) -> Answer:
        return self.ask(url, headers=headers, accept=accept)

    def ask(
        self,
        place: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        accept: tuple[int, ...] = (200,),
        push: bool = False,
    ) -> Answer:
        """Ask for a path under the repository, or for a whole URL, and log in if the registry wants it."""
        if self._authorizer is None:
            self._base = f"{self._scheme()}://{self._host}/v2/{self._repository}/"
            self._authorizer = Authorizer(self._client, self._host, self._base)
        url = urllib.parse.urljoin(self._base, place)
        own = origin(url) == origin(self._base)
        scope = f"repository:{self._repository}:{'pull,push' if push else 'pull'}"
        for again in (True, False):
            sent = self._authorizer.header(scope) if own else None
            answer = self._client.ask(
                url, method=method, headers=headers, authorization=sent, body=body, accept=(*accept, 401)
            )
            if answer.status != 401 or 401 in accept:
                return answer
            with answer:
                challenge = answer.headers.get("WWW-Authenticate", "")
                if not own or not again or not self._authorizer.answer(challenge, scope, sent):
                    raise self._refused(answer, sent)
            if body is not None and not isinstance(body, bytes):
                raise network_error("network", url, "a login that lasts", "one that ran out", transient=True)
        raise AssertionError  # the second round returns or raises

    def _refused(self, answer: Answer, sent: str | None) -> NetworkError:
        got = "status 401: no login was found" if sent is None else "status 401: the login that was sent is refused"
        hint = f"Log in: docker login {self._host}. Or SPLITBUNDLE_TOKEN has a token. Or check the spelling"
        return network_error("network.auth", answer.url, "access to the repository", got, hint)

    def _scheme(self) -> str:
        """Return ``https``; on this machine and where it is allowed, what the registry speaks."""
        if not may_be_plain(self._host):
            return "https"
        try:
            self._client.ask(f"http://{self._host}/v2/", accept=(200, 401, 403, 404, 429, 500, 502, 503)).close()
        except NetworkError as error:
            # A server that speaks TLS answers a plain request with an error, or with nothing.
            if error.codes == ("network.answer",) and is_loopback(self._host):
                return "https"
        return "http"


def check_layer(files: Mapping[str, File], path: str, listed: File, place: str) -> None:
    """Check that a registry's manifest has a file as the bundle's own manifest lists it.

    Raises:
        BundleError: ``file.missing``; ``file.digest``.
    """
    there = files.get(path)
    if there is None:
        hint = "The bundle has to be pushed again, as a whole"
        expected, got = "a file that the registry has", "none"
        raise BundleError(Problem(code="file.missing", file=path, expected=expected, got=got, hint=hint))
    if (there.size, there.sha256) != (listed.size, listed.sha256):
        got = f"sha256 {there.sha256} in {place}"
        raise VerificationError(Problem(code="file.digest", file=path, expected=f"sha256 {listed.sha256}", got=got))
