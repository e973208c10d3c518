"""A registry of container images, in memory, by the distribution specification of the OCI: pull, push, tags, referrers.

It is stricter than real ones where a client could be wrong and not notice: an upload goes on only at the last Location,
a manifest needs its blobs, and the storage that blobs are redirected to refuses a credential.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import urllib.parse
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from tests.support.http_server import OTHER, Exchange, LoopbackServer, Seen
from tests.support.lies import Lie
from tests.support.registry_login import Access, Kind, Logins

if TYPE_CHECKING:
    from typing_extensions import Self

INDEX = "application/vnd.oci.image.index.v1+json"
MAX_MANIFEST = 4 * 2**20
_NAME = r"(?P<name>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
_ROUTES = {
    "blob": re.compile(rf"/v2/{_NAME}/blobs/(?P<digest>sha256:[0-9a-f]{{64}})"),
    "uploads": re.compile(rf"/v2/{_NAME}/blobs/uploads/"),
    "upload": re.compile(rf"/v2/{_NAME}/blobs/uploads/(?P<id>[0-9]+)"),
    "manifest": re.compile(rf"/v2/{_NAME}/manifests/(?P<reference>[A-Za-z0-9_][A-Za-z0-9._:-]*)"),
    "tags": re.compile(rf"/v2/{_NAME}/tags/list"),
    "referrers": re.compile(rf"/v2/{_NAME}/referrers/(?P<digest>sha256:[0-9a-f]{{64}})"),
}
_CHUNK = re.compile(r"([0-9]+)-([0-9]+)")


class Stored(NamedTuple):
    """A manifest."""

    kind: str
    data: bytes


class Upload:
    """An upload under way."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.state = 0


class FakeRegistry(LoopbackServer):
    """A registry. Lies are bound to paths such as ``*/blobs/sha256:…``, ``PUT */manifests/v1``, ``/storage/*``.

    Attributes:
        blobs: a digest -> its bytes.
        holds: a repository -> the digests of its blobs.
        manifests: a repository -> a digest -> a manifest.
        tags: a repository -> a tag -> a digest.
        logins: the logins; ``logins.expire()`` ends all tokens.
        token_requests: the requests that came to the token server. They are in ``requests`` too.
    """

    def __init__(
        self,
        *,
        auth: Kind = "none",
        users: Mapping[str, str] | None = None,
        anonymous_pull: bool = False,
        token_field: str = "token",
        redirect: bool = False,
        referrers: bool = True,
        mount: bool = True,
        delete: bool = True,
        ranges: bool = True,
        absolute: bool = True,
        page: int = 100,
        lies: Mapping[str, Lie | str] | None = None,
    ) -> None:
        """Take the rules.

        Args:
            auth: how clients log in.
            users: names with their passwords; by default ``me`` with ``secret``.
            anonymous_pull: whether pulling needs no login.
            token_field: ``token`` or ``access_token``.
            redirect: whether blobs come from a storage on another host, as in the large registries.
            referrers: whether there is the list of referrers.
            mount: whether a blob can be mounted from another repository.
            delete: whether manifests can be deleted.
            ranges: whether blobs have ranges.
            absolute: whether locations have the host.
            page: the most tags of one answer.
            lies: a pattern -> a lie, or its name.
        """
        super().__init__(lies)
        self.logins = Logins(auth, users or {"me": "secret"}, anonymous_pull=anonymous_pull, field=token_field)
        self.redirect, self.referrers, self.mount, self.delete = redirect, referrers, mount, delete
        self.ranges, self.absolute, self.page = ranges, absolute, page
        self.blobs: dict[str, bytes] = {}
        self.holds: dict[str, set[str]] = defaultdict(set)
        self.manifests: dict[str, dict[str, Stored]] = defaultdict(dict)
        self.tags: dict[str, dict[str, str]] = defaultdict(dict)
        self.uploads: dict[str, Upload] = {}
        self._numbers = itertools.count(1)
        self._storage = self._token_host = ""

    def __enter__(self) -> Self:
        super().__enter__()
        self._storage = self.listen(OTHER, self._store)
        if self.logins.kind == "bearer":
            realm = self.listen("127.0.0.1", self.logins.give_token)
            self._token_host = realm.removeprefix("http://")
            self.logins.realm = f"{realm}/token"
        return self

    @property
    def token_requests(self) -> list[Seen]:
        return [each for each in self.requests if each.host == self._token_host]

    @property
    def storage_host(self) -> str:
        """Return the host and port of the storage that blobs are redirected to."""
        return self._storage.removeprefix("http://")

    def respond(self, exchange: Exchange) -> None:
        """Answer a request."""
        if exchange.path in ("/v2", "/v2/"):
            if self.logins.allows(exchange, frozenset()):
                exchange.answer(200, b"{}", {"Docker-Distribution-Api-Version": "registry/2.0"})
            return
        for kind, pattern in _ROUTES.items():
            found = pattern.fullmatch(exchange.path)
            if found is not None:
                if self.logins.allows(exchange, self._wanted(exchange, found["name"])):
                    _ = exchange.body  # it may take time
                    with self.lock:
                        work = getattr(self, f"_{kind}")
                        done = work(exchange, *found.groups())
                    if done is not None:  # content is sent without the lock, as it may take time
                        done()
                return
        _error(exchange, 404, "NAME_UNKNOWN", "no such place")

    def _wanted(self, exchange: Exchange, name: str) -> frozenset[Access]:
        if exchange.method in ("GET", "HEAD") and "/uploads/" not in exchange.path:
            return frozenset({(name, "pull")})
        if exchange.method == "DELETE" and "/uploads/" not in exchange.path:
            return frozenset({(name, "delete")})
        return frozenset({(name, "pull"), (name, "push")})

    # Blobs.

    def _blob(self, exchange: Exchange, name: str, digest: str) -> object:
        if digest not in self.holds[name] or digest not in self.blobs:
            return _error(exchange, 404, "BLOB_UNKNOWN", digest)
        if exchange.method == "DELETE":
            self.holds[name].discard(digest)
            return exchange.answer(202)
        data = self.blobs[digest]
        if self.redirect and exchange.method == "GET" and exchange.lie is None:
            place = f"{self._storage}/storage/{digest}?signature=secret"
            return exchange.answer(307, b"", {"Location": place})
        headers = {"Docker-Content-Digest": digest, "Content-Type": "application/octet-stream"}
        return lambda: exchange.content(data, headers, ranges=self.ranges, tag=f'"{digest}"')

    def _store(self, exchange: Exchange) -> None:
        digest = exchange.path.removeprefix("/storage/")
        if exchange.seen.authorization is not None:
            exchange.answer(400, b"<Error><Message>Only one auth mechanism allowed</Message></Error>")
        elif exchange.query.get("signature") != "secret":
            exchange.answer(403)
        elif digest not in self.blobs:
            exchange.answer(404)
        else:
            exchange.content(self.blobs[digest], ranges=self.ranges, tag=f'"{digest}"')

    def _uploads(self, exchange: Exchange, name: str) -> None:
        if exchange.method != "POST":
            return _error(exchange, 405, "UNSUPPORTED", exchange.method)
        mounted, other = exchange.query.get("mount"), exchange.query.get("from")
        if mounted is not None and self.mount and other is not None and mounted in self.holds[other]:
            allowed = self.logins.kind != "bearer" or (other, "pull") in self.logins.tokens.get(
                (exchange.seen.authorization or "").removeprefix("Bearer "), frozenset()
            )
            if allowed:
                self.holds[name].add(mounted)
                return self._created(exchange, name, "blobs", mounted)
        digest = exchange.query.get("digest")
        if digest is not None:
            return self._finish(exchange, name, exchange.body, digest)
        number = str(next(self._numbers))
        self.uploads[number] = Upload()
        return self._go_on(exchange, 202, name, number)

    def _upload(self, exchange: Exchange, name: str, number: str) -> None:
        upload = self.uploads.get(number)
        if upload is None or exchange.query.get("_state") != str(upload.state):
            return _error(exchange, 404, "BLOB_UPLOAD_UNKNOWN", "not the last Location of an upload")
        if exchange.method == "GET":
            return self._go_on(exchange, 204, name, number)
        if exchange.method == "DELETE":
            del self.uploads[number]
            return exchange.answer(204)
        body = exchange.body
        at = exchange.headers.get("content-range")
        if at is not None:
            found = _CHUNK.fullmatch(at)
            if found is None or int(found[1]) != len(upload.data) or int(found[2]) + 1 - int(found[1]) != len(body):
                return self._go_on(exchange, 416, name, number)
        upload.data += body
        upload.state += 1
        if exchange.method == "PATCH":
            return self._go_on(exchange, 202, name, number)
        if exchange.method == "PUT":
            del self.uploads[number]
            return self._finish(exchange, name, bytes(upload.data), exchange.query.get("digest", ""))
        return _error(exchange, 405, "UNSUPPORTED", exchange.method)

    def _go_on(self, exchange: Exchange, status: int, name: str, number: str) -> None:
        upload = self.uploads[number]
        exchange.answer(
            status,
            b"",
            {
                "Location": self._place(f"/v2/{name}/blobs/uploads/{number}?_state={upload.state}"),
                "Range": f"0-{max(0, len(upload.data) - 1)}",
                "Docker-Upload-UUID": number,
            },
        )

    def _finish(self, exchange: Exchange, name: str, data: bytes, digest: str) -> None:
        if _digest(data) != digest:
            return _error(exchange, 400, "DIGEST_INVALID", f"{_digest(data)} is not {digest}")
        self.blobs[digest] = data
        self.holds[name].add(digest)
        return self._created(exchange, name, "blobs", digest)

    def _created(
        self, exchange: Exchange, name: str, kind: str, digest: str, more: dict[str, str] | None = None
    ) -> None:
        place = self._place(f"/v2/{name}/{kind}/{digest}")
        exchange.answer(201, b"", {"Location": place, "Docker-Content-Digest": digest, **(more or {})})

    def _place(self, path: str) -> str:
        return f"{self.url}{path}" if self.absolute else path

    # Manifests and tags.

    def _manifest(self, exchange: Exchange, name: str, reference: str) -> object:
        if exchange.method == "PUT":
            return self._put_manifest(exchange, name, reference)
        digest = reference if reference.startswith("sha256:") else self.tags[name].get(reference, "")
        stored = self.manifests[name].get(digest)
        if stored is None:
            return _error(exchange, 404, "MANIFEST_UNKNOWN", reference)
        if exchange.method == "DELETE":
            return self._delete_manifest(exchange, name, reference)
        accepted = exchange.headers.get("accept", "*/*")
        if "*/*" not in accepted and stored.kind not in accepted:
            return _error(exchange, 404, "MANIFEST_UNKNOWN", f"Accept has no {stored.kind}")
        headers = {"Docker-Content-Digest": digest, "Content-Type": stored.kind}
        return lambda: exchange.content(stored.data, headers, ranges=False, tag=f'"{digest}"')

    def _put_manifest(self, exchange: Exchange, name: str, reference: str) -> None:
        data, kind = exchange.body, exchange.headers.get("content-type", "")
        digest = _digest(data)
        if reference.startswith("sha256:") and reference != digest:
            return _error(exchange, 400, "DIGEST_INVALID", reference)
        try:
            document = json.loads(data)
            parts = [document["config"], *document["layers"]] if "layers" in document else []
            missing = [each["digest"] for each in parts if each["digest"] not in self.holds[name]]
            wrong = [each["digest"] for each in parts if len(self.blobs.get(each["digest"], b"")) != each["size"]]
        except (ValueError, KeyError, TypeError) as error:
            return _error(exchange, 400, "MANIFEST_INVALID", repr(error))
        if missing:
            return _error(exchange, 400, "MANIFEST_BLOB_UNKNOWN", missing[0])
        if wrong or len(data) > MAX_MANIFEST or document.get("mediaType", kind) != kind:
            return _error(exchange, 400, "MANIFEST_INVALID", "sizes, or its type")
        self.manifests[name][digest] = Stored(kind, data)
        if not reference.startswith("sha256:"):
            self.tags[name][reference] = digest
        subject = document.get("subject")
        more = {"OCI-Subject": subject["digest"]} if subject and self.referrers else {}
        return self._created(exchange, name, "manifests", digest, more)

    def _delete_manifest(self, exchange: Exchange, name: str, reference: str) -> None:
        if not self.delete:
            return _error(exchange, 405, "UNSUPPORTED", "delete")
        if reference.startswith("sha256:"):
            del self.manifests[name][reference]
            self.tags[name] = {tag: digest for tag, digest in self.tags[name].items() if digest != reference}
        else:
            del self.tags[name][reference]
        return exchange.answer(202)

    def _tags(self, exchange: Exchange, name: str) -> None:
        if name not in self.manifests:
            return _error(exchange, 404, "NAME_UNKNOWN", name)
        after, number = exchange.query.get("last", ""), min(self.page, int(exchange.query.get("n", self.page)))
        left = sorted(tag for tag in self.tags[name] if tag > after)
        now = left[:number]
        headers = {"Content-Type": "application/json"}
        if len(left) > len(now) and now:
            query = urllib.parse.urlencode({"n": number, "last": now[-1]})
            headers["Link"] = f'<{self._place(f"/v2/{name}/tags/list")}?{query}>; rel="next"'
        return exchange.answer(200, json.dumps({"name": name, "tags": now}).encode(), headers)

    def _referrers(self, exchange: Exchange, name: str, digest: str) -> None:
        if not self.referrers:
            return exchange.answer(404)
        wanted = exchange.query.get("artifactType")
        found = []
        for own, stored in self.manifests[name].items():
            document = json.loads(stored.data)
            if (document.get("subject") or {}).get("digest") == digest:
                kind = document.get("artifactType") or (document.get("config") or {}).get("mediaType")
                entry = {"mediaType": stored.kind, "digest": own, "size": len(stored.data), "artifactType": kind}
                found.append({**entry, "annotations": document.get("annotations", {})})
        if wanted is not None:
            found = [each for each in found if each["artifactType"] == wanted]
        body = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": found}).encode()
        filters = {"OCI-Filters-Applied": "artifactType"} if wanted is not None else {}
        return exchange.answer(200, body, {"Content-Type": INDEX, **filters})


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _error(exchange: Exchange, status: int, code: str, detail: str) -> None:
    body = json.dumps({"errors": [{"code": code, "message": code.lower(), "detail": detail}]}).encode()
    exchange.answer(status, body, {"Content-Type": "application/json"})
