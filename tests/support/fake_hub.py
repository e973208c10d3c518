"""A Hugging Face Hub for models, in memory, for ``huggingface_hub`` through ``HF_ENDPOINT``.

Large files come by a redirect from a storage on another host, which refuses a credential, as the Hub's own does with
signed URLs. The library needs ``HF_HUB_DISABLE_XET=1``. ``environment`` sets what it reads at its import, so use the
library in a process of its own, or give it ``endpoint=`` and ``token=``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.http_server import OTHER, Exchange, LoopbackServer
from tests.support.hub_repositories import File, Repository, is_large
from tests.support.lies import Lie

if TYPE_CHECKING:
    from typing_extensions import Self

WRITE, READ = "hf_write", "hf_read"
_REPO = r"(?P<repo>[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = {
    "resolve": re.compile(rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)"),
    "batch": re.compile(rf"/{_REPO}\.git/info/lfs/objects/batch"),
    "info": re.compile(rf"/api/models/{_REPO}(?:/revision/{_REVISION})?"),
    "tree": re.compile(rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<path>.*))?"),
    "refs": re.compile(rf"/api/models/{_REPO}/refs"),
    "history": re.compile(rf"/api/models/{_REPO}/commits/{_REVISION}"),
    "tag": re.compile(rf"/api/models/{_REPO}/tag/{_REVISION}"),
    "branch": re.compile(rf"/api/models/{_REPO}/branch/{_REVISION}"),
    "preupload": re.compile(rf"/api/models/{_REPO}/preupload/{_REVISION}"),
    "commit": re.compile(rf"/api/models/{_REPO}/commit/{_REVISION}"),
}
_WRITES = ("batch", "tag", "branch", "preupload", "commit")


class FakeHub(LoopbackServer):
    """A Hub. Lies are bound to paths such as ``*/resolve/*/layer-000.safetensors`` or ``/storage/*``.

    A lie about a large file at ``*/resolve/*`` is told by the Hub itself, in place of the redirect.

    Attributes:
        repositories: a name -> a repository.
        users: a token -> the name of a user. ``hf_write`` and ``hf_read`` are there; the latter can only read.
        objects: the large files, by their digests.
    """

    def __init__(self, *, lies: Mapping[str, Lie | str] | None = None) -> None:
        super().__init__(lies)
        self.repositories: dict[str, Repository] = {}
        self.users = {WRITE: "me", READ: "reader"}
        self.objects: dict[str, bytes] = {}
        self._storage = ""

    def __enter__(self) -> Self:
        super().__enter__()
        self._storage = self.listen(OTHER, self._store)
        return self

    @property
    def storage_host(self) -> str:
        """Return the host and port of the storage for large files."""
        return self._storage.removeprefix("http://")

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the variables that ``huggingface_hub`` reads at its import."""
        found = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return found | ({"HF_TOKEN": token} if token is not None else {})

    def create(
        self, name: str, files: Mapping[str, bytes] | None = None, *, private: bool = False, gated: bool = False
    ) -> Repository:
        """Make a repository, with one commit more if there are files."""
        made = self.repositories[name] = Repository(name, private=private, gated=gated)
        if files:
            self.commit(name, files)
        return made

    def commit(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit, and return its id."""
        repository = self.repositories[name]
        made = repository.commit(files, branch=branch)
        self.objects |= {file.sha256: file.data for file in repository.commits[made].values() if file.lfs}
        return made

    def respond(self, exchange: Exchange) -> None:
        """Answer a request."""
        sent = exchange.seen.authorization
        user = self.users.get((sent or "").removeprefix("Bearer "))
        if sent is not None and user is None:
            return _refuse(exchange, 401, "", "Invalid credentials in Authorization header")
        _ = exchange.body  # it may take time
        if exchange.path == "/api/whoami-v2":
            return self._whoami(exchange, user)
        if exchange.path == "/api/validate-yaml":
            return _json(exchange, {"errors": [], "warnings": []})
        if exchange.path in ("/api/repos/create", "/api/repos/delete"):
            return self._create_or_delete(exchange, user)
        for kind, pattern in _ROUTES.items():
            found = pattern.fullmatch(exchange.path)
            if found is None:
                continue
            repository = self.repositories.get(found["repo"])
            if repository is None or (repository.private and user not in repository.readers):
                return _refuse(exchange, 401 if user is None else 404, "RepoNotFound", "Repository not found")
            if kind in _WRITES and not self._may_write(exchange, user):
                return None
            rest = {key: urllib.parse.unquote(text or "") for key, text in found.groupdict().items() if key != "repo"}
            with self.lock:
                done = getattr(self, f"_{kind}")(exchange, repository, user, **rest)
            if done is not None:  # content is sent without the lock, as it may take time
                done()
            return None
        return exchange.answer(404, b'{"error": "no such place"}')

    def _may_write(self, exchange: Exchange, user: str | None) -> bool:
        if user is None:
            _refuse(exchange, 401, "", "Invalid username or password.")
        elif self.users.get(READ) == user:
            _refuse(exchange, 403, "", "This token can only read")
        else:
            return True
        return False

    def _whoami(self, exchange: Exchange, user: str | None) -> None:
        if user is None:
            return _refuse(exchange, 401, "", "Invalid username or password.")
        role = "read" if self.users.get(READ) == user else "write"
        token = {"displayName": "test", "role": role}
        return _json(exchange, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": token}})

    def _create_or_delete(self, exchange: Exchange, user: str | None) -> None:
        if not self._may_write(exchange, user):
            return None
        asked = json.loads(exchange.body)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if exchange.method == "DELETE":
            self.repositories.pop(name, None)
            return _json(exchange, {})
        if name in self.repositories:
            return _refuse(exchange, 409, "", "You already created this model repo", {"url": f"{self.url}/{name}"})
        made = self.create(name, private=bool(asked.get("private") or asked.get("visibility") == "private"))
        made.readers.add(str(user))
        return _json(exchange, {"url": f"{self.url}/{name}", "name": name, "id": name})

    # Reading.

    def _resolve(
        self, exchange: Exchange, repository: Repository, user: str | None, revision: str, path: str
    ) -> Callable[[], None] | None:
        commit = repository.resolve(revision)
        if commit is None:
            return _no_revision(exchange, revision)
        if repository.gated and user not in repository.accepted:
            text = f"Access to model {repository.name} is restricted. You must have access to it and be authenticated"
            return _refuse(exchange, 401 if user is None else 403, "GatedRepo", text)
        file = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file is None:
            return _refuse(exchange, 404, "EntryNotFound", "Entry not found", None, headers)
        if not file.lfs or exchange.lie is not None:
            tag = f'"{file.git_id}"'
            return lambda: exchange.content(file.data, {**headers, "Content-Type": "text/plain"}, tag=tag)
        headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.sha256}"'}
        headers["Location"] = f"{self._storage}/storage/{file.sha256}?Signature=secret"
        return exchange.answer(302, b"", headers)

    def _store(self, exchange: Exchange) -> None:
        digest = exchange.path.removeprefix("/storage/")
        if exchange.seen.authorization is not None:
            exchange.answer(400, b"<Error><Message>Only one auth mechanism allowed</Message></Error>")
        elif exchange.query.get("Signature") != "secret":
            exchange.answer(403)
        elif exchange.method == "PUT":
            if hashlib.sha256(exchange.body).hexdigest() == digest:
                self.objects[digest] = exchange.body
                exchange.answer(200, b"", {"ETag": f'"{hashlib.md5(exchange.body).hexdigest()}"'})
            else:
                exchange.answer(400, b"<Error><Message>XAmzContentSHA256Mismatch</Message></Error>")
        elif digest not in self.objects:
            exchange.answer(404)
        else:
            exchange.content(self.objects[digest], tag=f'"{digest}"')

    def _info(self, exchange: Exchange, repository: Repository, user: str | None, revision: str) -> None:
        commit = repository.resolve(revision or "main")
        if commit is None:
            return _no_revision(exchange, revision)
        siblings = []
        for path, file in sorted(repository.commits[commit].items()):
            entry: dict[str, Any] = {"rfilename": path}
            if exchange.query.get("blobs", "").lower() in ("true", "1"):
                entry |= {"size": len(file.data), "blobId": file.git_id}
                lfs = {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
                entry |= {"lfs": lfs} if file.lfs else {}
            siblings.append(entry)
        about = {"_id": "0" * 24, "id": repository.name, "modelId": repository.name, "sha": commit}
        about |= {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        return _json(exchange, {**about, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, exchange: Exchange, repository: Repository, user: str | None, revision: str, path: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return _no_revision(exchange, revision)
        folder = f"{path}/" if path else ""
        recursive = exchange.query.get("recursive", "").lower() in ("true", "1")
        entries: dict[str, dict[str, object]] = {}
        for name, file in sorted(repository.commits[commit].items()):
            if not name.startswith(folder):
                continue
            parts = name.removeprefix(folder).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                place = folder + "/".join(parts[:depth])
                oid = hashlib.sha1(place.encode()).hexdigest()
                entries[place] = {"type": "directory", "oid": oid, "size": 0, "path": place}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, **file.entry()}
        if folder and not entries:
            return _refuse(exchange, 404, "EntryNotFound", f"{path} does not exist")
        return _json(exchange, list(entries.values()))

    def _refs(self, exchange: Exchange, repository: Repository, user: str | None) -> None:
        def listed(kind: str, named: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": at} for name, at in named.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        _json(exchange, {"branches": branches, "converts": [], "tags": tags})

    def _history(self, exchange: Exchange, repository: Repository, user: str | None, revision: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return _no_revision(exchange, revision)
        date = "2024-01-01T00:00:00.000Z"
        found = [
            {"id": each, "title": "-", "message": "", "authors": [], "date": date}
            for each in repository.history(commit)
        ]
        return _json(exchange, found)

    # Writing.

    def _tag(self, exchange: Exchange, repository: Repository, user: str | None, revision: str) -> None:
        if exchange.method == "DELETE":
            if repository.tags.pop(revision, None) is None:
                return _no_revision(exchange, revision)
            return _json(exchange, {})
        name, commit = json.loads(exchange.body)["tag"], repository.resolve(revision)
        if commit is None:
            return _no_revision(exchange, revision)
        if name in repository.tags:
            return _refuse(exchange, 409, "", f"Tag reference exists already: refs/tags/{name}")
        repository.tags[name] = commit
        return _json(exchange, {})

    def _branch(self, exchange: Exchange, repository: Repository, user: str | None, revision: str) -> None:
        if revision in repository.branches:
            return _refuse(exchange, 409, "", "Reference already exists")
        asked = json.loads(exchange.body or b"{}").get("startingPoint") or "main"
        repository.branches[revision] = repository.resolve(asked) or repository.branches["main"]
        return _json(exchange, {})

    def _preupload(self, exchange: Exchange, repository: Repository, user: str | None, revision: str) -> None:
        commit = repository.resolve(revision)
        if commit is None:
            return _no_revision(exchange, revision)
        here = repository.commits[commit]
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                **({"oid": (here[file["path"]]).git_id} if file["path"] in here else {}),
            }
            for file in json.loads(exchange.body)["files"]
        ]
        return _json(exchange, {"files": answers})

    def _batch(self, exchange: Exchange, repository: Repository, user: str | None) -> None:
        answers = []
        for each in json.loads(exchange.body)["objects"]:
            place = {"href": f"{self._storage}/storage/{each['oid']}?Signature=secret"}
            answers.append(each if each["oid"] in self.objects else {**each, "actions": {"upload": place}})
        _json(exchange, {"transfer": "basic", "objects": answers})

    def _commit(self, exchange: Exchange, repository: Repository, user: str | None, revision: str) -> None:
        now = repository.branches.get(revision)
        if now is None:
            return _no_revision(exchange, revision)
        added: dict[str, bytes | File] = {}
        removed: set[str] = set()
        for line in filter(None, exchange.body.split(b"\n")):
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                if value.get("parentCommit") not in (None, now):
                    return _refuse(exchange, 412, "", "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                added[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    return _refuse(
                        exchange, 400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}"
                    )
                added[value["path"]] = File(self.objects[value["oid"]], True)
            elif kind == "deletedFile":
                removed.add(value["path"])
            elif kind == "deletedFolder":
                removed |= {
                    path for path in repository.commits[now] if path.startswith(value["path"].rstrip("/") + "/")
                }
        made = repository.commit(added, removed, revision)
        place = f"{self.url}/{repository.name}/commit/{made}"
        return _json(exchange, {"success": True, "commitOid": made, "commitUrl": place, "hookOutput": ""})


def _json(exchange: Exchange, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    exchange.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def _refuse(
    exchange: Exchange,
    status: int,
    code: str,
    text: str,
    more: Mapping[str, object] | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    named = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {}), **(headers or {})}
    _json(exchange, {"error": text, **(more or {})}, status, named)


def _no_revision(exchange: Exchange, revision: str) -> None:
    _refuse(exchange, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
