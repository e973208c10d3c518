"""What a user does with bundles, under the rules of Windows.

``python -m tests.support.windows_scenarios NAME DIRECTORY`` runs one scenario: a function of an empty directory.
"""

from __future__ import annotations

import sys

from tests.support import windows_rules

if __name__ == "__main__":
    windows_rules.apply()  # before anything takes Linux's ways

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import splitbundle
from splitbundle import BundleError, processors
from splitbundle.cli.main import main as command
from splitbundle.sharing import cache as caching
from splitbundle.sharing.cache import Cache
from splitbundle.sharing.cache_care import prune, verify
from splitbundle.sharing.file_server import FileServer
from splitbundle.sharing.served_files import ServedFiles
from splitbundle.writing import copying
from tests.support.paths import TESTS

GOLDEN: Final = TESTS / "golden" / "v1.0"
GPT2: Final = GOLDEN / "gpt2.splitbundle"


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    """Serve the bundles of a directory, and yield the URL."""
    server = FileServer(ServedFiles(directory), port=0)
    assert not server.allow_reuse_address
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.stop()
        thread.join()


def pull(place: Path) -> None:
    """Files go into the cache, and leave it again, with all names that they have."""
    cache = Cache()
    with serving(GOLDEN) as url:
        reference = f"{url}gpt2.splitbundle"
        pulled = splitbundle.pull(reference)
        assert pulled.path.is_relative_to(cache.root)
        assert not list(cache.store.parts.iterdir())
        pulled.verify(exact=True)
        for name in ("manifest.json", "SHA256SUMS"):
            (pulled.path / name).write_bytes(b"{}")
        splitbundle.pull(reference).verify(exact=True)
        verify(cache, None)
        blob = next(each for each in sorted((cache.root / "blobs").glob("??/*")) if each.stat().st_nlink > 1)
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        with pytest.raises(BundleError, match=r"\[file.digest\]"):
            verify(cache, None)
        splitbundle.pull(reference).verify(exact=True)
    prune(cache, [], older_than=None, everything=True)
    assert {path.name for path in cache.root.rglob("*") if path.is_file()} == {"CACHEDIR.TAG"}


def pull_into_a_directory(place: Path) -> None:
    """A part, the rest of it, and another bundle in its place."""
    splitbundle.pull(str(GPT2), place / "part.splitbundle", shards=["bottom"])
    splitbundle.pull(str(GPT2), place / "part.splitbundle").verify(exact=True)
    splitbundle.pull(str(GOLDEN / "llama.splitbundle"), place / "part.splitbundle", force=True).verify(exact=True)
    assert [path.name for path in place.iterdir()] == ["part.splitbundle"]


def pull_without_hard_links(place: Path) -> None:
    """Windows gives another error than POSIX on a file system without them."""

    def refuse(source: object, target: object) -> None:
        raise OSError(caching.errno.EINVAL, "ERROR_INVALID_FUNCTION")

    os.link = refuse  # type: ignore[assignment]
    with serving(GOLDEN) as url:
        splitbundle.pull(f"{url}gpt2.splitbundle").verify(exact=True)
    splitbundle.pull(str(GPT2), place / "out.splitbundle").verify(exact=True)


def archive(place: Path) -> None:
    """An archive is written, replaced, and unpacked over a bundle."""
    bundle = splitbundle.open(GPT2)
    for _ in range(2):
        bundle.pack(place / "a.tar", force=True)
    for _ in range(2):
        splitbundle.unpack(place / "a.tar", place / "b.splitbundle", force=True).verify(exact=True)
    assert sorted(path.name for path in place.iterdir()) == ["a.tar", "b.splitbundle"]


def parts(place: Path) -> None:
    """Parts are copied by several threads, which flush what they wrote."""
    copying.THREAD_BYTES = 1  # type: ignore[misc]
    processors.usable = lambda: 2
    whole = splitbundle.open(GPT2)
    bottom = whole.extract(place / "bottom.splitbundle", "bottom")
    rest = whole.extract(place / "rest.splitbundle", "trunk", "top")
    splitbundle.merge([bottom, rest], place / "whole.splitbundle").verify()
    splitbundle.merge([bottom, rest], bottom.path, force=True).verify()


def sign(place: Path) -> None:
    """A signature is written, replaced and found."""
    copy = Path(shutil.copytree(GPT2, place / "copy.splitbundle"))
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (place / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    for _ in range(2):
        assert command(["sign", str(copy), "--key", str(place / "key.pem"), "--force", "--quiet"]) == 0
    assert len(list((copy / "signatures").iterdir())) == 1


def keys(place: Path) -> None:
    """An authority makes, renews and revokes certificates. No mode of a private key is asked for."""
    root = str(place / "authority")
    for words in (
        ["init", root],
        ["server", root, "stage-1", "127.0.0.1"],
        ["client", root, "alice"],
        ["rotate", root, "alice"],
        ["revoke", root, "alice"],
    ):
        assert command(["keys", *words, "--quiet"]) == 0, words


SCENARIOS: Final[dict[str, Callable[[Path], None]]] = {
    each.__name__: each for each in (pull, pull_into_a_directory, pull_without_hard_links, archive, parts, sign, keys)
}


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
