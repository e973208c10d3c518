"""The repositories of a test Hub: commits, branches, tags, and who may read them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import NamedTuple

LFS_ENDS = (".safetensors", ".onnx", ".bin", ".tar")
LFS_BYTES = 10 * 2**20


class File(NamedTuple):
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """Return the text that Git has in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git_id(self) -> str:
        """Return the id of Git's blob."""
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0%b" % (len(blob), blob)).hexdigest()

    def entry(self) -> dict[str, object]:
        """Return what the lists of the Hub say about it, but its name."""
        lfs = {"size": len(self.data), "pointerSize": len(self.pointer)}
        return {"size": len(self.data), "oid": self.git_id} | ({"lfs": {**lfs, "oid": self.sha256}} if self.lfs else {})


def is_large(path: str, size: int) -> bool:
    """Return whether the Hub wants a file through LFS."""
    return path.endswith(LFS_ENDS) or size >= LFS_BYTES


class Repository:
    """A repository of a model."""

    def __init__(self, name: str, *, private: bool, gated: bool) -> None:
        self.name, self.private, self.gated = name, private, gated
        self.readers: set[str] = set()
        """The users that may see a private repository."""
        self.accepted: set[str] = set()
        """The users that have accepted the license of a gated one."""
        self.commits: dict[str, dict[str, File]] = {}
        self.parents: dict[str, str | None] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(
        self,
        files: Mapping[str, bytes | File],
        removed: set[str] | None = None,
        branch: str = "main",
    ) -> str:
        """Add a commit, and return its id."""
        parent = self.branches.get(branch)
        now = dict(self.commits[parent]) if parent is not None else {}
        for path in removed or ():
            now.pop(path, None)
        for path, file in files.items():
            now[path] = file if isinstance(file, File) else File(file, is_large(path, len(file)))
        made = secrets.token_hex(20)
        self.commits[made], self.parents[made], self.branches[branch] = now, parent, made
        return made

    def resolve(self, revision: str) -> str | None:
        """Return the id of the commit that a branch, a tag or an id means."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(name) or self.tags.get(name)
        return found or (revision if revision in self.commits else None)

    def history(self, commit: str) -> list[str]:
        """Return a commit and those before it."""
        found: list[str] = []
        now: str | None = commit
        while now is not None:
            found.append(now)
            now = self.parents[now]
        return found
