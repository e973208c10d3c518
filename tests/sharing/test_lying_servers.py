"""Every transport over HTTP beside every lie: the right code, and nothing wrong in the cache."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from splitbundle.errors import BundleError
from splitbundle.sharing import cache_care
from splitbundle.sharing.cache import Cache
from splitbundle.sharing.network import Patience
from splitbundle.sharing.pulling import Pulled, PullHow, Wanted, pull
from splitbundle.sharing.pushing import PushHow, push
from splitbundle.sharing.reference import parse_reference
from splitbundle.storage.documents import read_documents
from splitbundle.storage.reader import BundleReader
from tests.support.fake_hub import FakeHub
from tests.support.fake_registry import FakeRegistry
from tests.support.http_server import LoopbackServer
from tests.support.lies import LIES, Lie, after_first
from tests.support.paths import TESTS
from tests.support.static_server import static_server

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
FILE = "layer-000.safetensors"
SECRET = "s3cret-t0ken"
TRANSPORTS = ("static", "registry", "hub")
CODES = {
    "file.digest": {
        *("wrong bytes", "wrong last byte", "changes half-way", "changes at resume", "login page as a file"),
    },
    "file.size": {"shorter length", "longer length", "another document"},
    "network.auth": {"401", "403"},
    "network.missing": {"404"},
    "network.busy": {"429", "429 for ever", "503"},
    "network.redirect": {
        *("redirect to a file", "redirect to FTP", "redirect to data", "redirect to nowhere"),
        *("redirect loop", "redirect to ever new places"),
    },
    "network": {
        *("short body", "drip", "stall", "416", "reset half-way", "length that is none", "500", "reset", "silence"),
        "drip of headers",
    },
}
"""The code for a lie about a file of weights. Every other one breaks the rules of HTTP: ``network.answer``."""


FEW = {
    *("wrong bytes", "short body once", "200 in place of 206", "416 once", "changes at resume", "login page"),
    *("redirect to another host", "redirect to a file", "401", "403", "404", "429 once", "503", "gzip bomb"),
    *("endless body in chunks", "no length", "reset once"),
}
"""The lies of a registry and of a Hub in ``make test``."""


def code(lie: Lie) -> str:
    return next((code for code, names in CODES.items() if lie.name in names), "network.answer")


def is_short(transport: str, lie: Lie) -> bool:
    """Return whether a case runs in ``make test``. All transports over HTTP have one client."""
    if transport == "static":
        return True
    return lie.name in FEW


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "cache"


@contextlib.contextmanager
def serving(
    transport: str, monkeypatch: pytest.MonkeyPatch, lie: Lie | None = None, path: str = FILE
) -> Iterator[tuple[LoopbackServer, str]]:
    """Serve the bundle, with a lie about one file, and yield the server and the reference."""
    digest = hashlib.sha256((GOLDEN / path).read_bytes()).hexdigest()
    if transport == "static":
        monkeypatch.setenv("SPLITBUNDLE_TOKEN", SECRET)
        with static_server(GOLDEN.parent, lies={f"*/{path}": lie} if lie else {}, token=SECRET) as static:
            if lie is not None and lie.name == "redirect to another host":
                static.token = None  # the other host gets no token
            yield static, f"{static.url}/gpt2.splitbundle"
    elif transport == "registry":
        with FakeRegistry() as registry:
            reference = f"oci://{registry.host}/a/b:v1"
            for what, content in pushed().items():
                getattr(registry, what).update(copy.deepcopy(content))
            registry.lies = {f"*/blobs/sha256:{digest}": lie} if lie else {}
            monkeypatch.setenv("SPLITBUNDLE_TOKEN", SECRET)
            yield registry, reference
    else:
        constants = pytest.importorskip("huggingface_hub.constants")
        with FakeHub() as hub:
            hub.users[SECRET] = "me"
            hub.create("me/model", {file.relative_to(GOLDEN).as_posix(): file.read_bytes() for file in listed()})
            hub.lies = {f"*/resolve/*/{path}": lie} if lie else {}
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(GOLDEN.parent / "nowhere"))
            monkeypatch.setenv("HF_TOKEN", SECRET)
            yield hub, "hf://me/model"


@functools.cache
def pushed() -> dict[str, Any]:
    """Return what a registry has of the bundle as a/b:v1."""
    with FakeRegistry() as registry:
        push(opened(), parse_reference(f"oci://{registry.host}/a/b:v1"), PushHow())
    return {what: getattr(registry, what) for what in ("blobs", "holds", "manifests", "tags")}


def listed() -> list[Path]:
    return [path for path in sorted(GOLDEN.rglob("*")) if path.is_file()]


def golden(name: str) -> BundleReader:
    path = GOLDEN.with_name(f"{name}.splitbundle")
    return BundleReader(path, *read_documents(path))


def opened() -> BundleReader:
    return golden("gpt2")


def pulled(reference: str, lie: Lie | None, *, retries: int = 2) -> Pulled:
    patience = Patience(timeout=0.4 if lie is not None and lie.waits else 5.0, retries=retries, backoff=0.01)
    return pull(parse_reference(reference), Wanted(), PullHow(patience=patience))


def check_cache(cache: Path) -> None:
    """Check that the cache has nothing but files of their digests, also in the directories of bundles."""
    cache_care.verify(Cache(), None)
    for bundle in cache.glob("bundles/*"):
        reader = BundleReader(bundle, *read_documents(bundle))
        absent = set(reader.absent())
        for path, file in reader.manifest.files.items():
            assert path in absent or hashlib.sha256((bundle / path).read_bytes()).hexdigest() == file.sha256


def check_secrets(server: LoopbackServer, error: BaseException | None, output: str) -> None:
    """Check that the credential came to the server's own host alone, and that nothing shows it."""
    for seen in server.requests:
        assert seen.host == server.host or seen.authorization is None, seen
    assert SECRET not in f"{error!s}{error!r}{output}"


@pytest.mark.rule("SB-S-003", "SB-S-005", "SB-S-006", "SB-S-007", "SB-S-008")
@pytest.mark.parametrize(
    ("transport", "name"),
    [
        pytest.param(transport, name, marks=() if is_short(transport, lie) else pytest.mark.long)
        for transport in TRANSPORTS
        for name, lie in LIES.items()
    ],
)
def test_a_lie_about_a_file(
    transport: str, name: str, monkeypatch: pytest.MonkeyPatch, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lie = LIES[name]
    error: BundleError | None = None
    with serving(transport, monkeypatch, lie) as (server, reference):
        try:
            done = pulled(reference, lie, retries=1 if lie.waits else 2)
        except BundleError as caught:
            error = caught
        check_secrets(server, error, capfd.readouterr().out)
        check_cache(cache)
        if lie.outcome == "A":
            assert error is None
            assert done.documents.id == opened().id
            return
        assert error is not None
        assert error.codes == (code(lie),)
        assert error.problems[0].file
        assert "\x1b" not in str(error)
        # The truth is enough to go on.
        server.lies = {}
        assert pulled(reference, None).documents.id == opened().id
        check_cache(cache)


@pytest.mark.rule("SB-S-002")
@pytest.mark.parametrize(
    ("name", "transport"),
    [
        pytest.param(name, transport, marks=() if transport == "static" or name in FEW else pytest.mark.long)
        for name in (
            *("wrong bytes", "shorter length", "login page", "login page as a file", "another document", "404", "401"),
            *("endless body in chunks", "gzip bomb", "short body", "drip of headers"),
        )
        for transport in TRANSPORTS
    ],
)
def test_a_lie_about_the_manifest(
    transport: str, name: str, monkeypatch: pytest.MonkeyPatch, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a pin, nothing else is even parsed."""
    lie = LIES[name]
    with serving(transport, monkeypatch, lie, "manifest.json") as (server, reference):
        with pytest.raises(BundleError) as caught:
            pulled(f"{reference}@{opened().id}", lie, retries=1)
        check_secrets(server, caught.value, capfd.readouterr().out)
    assert not list(cache.glob("bundles/*"))
    assert set(caught.value.codes) <= {code(lie), "file.digest", "file.size"}


@pytest.mark.rule("SB-S-004", "SB-S-026")
def test_a_tag_that_moves(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    llama = golden("llama")
    with serving("registry", monkeypatch) as (server, reference):
        assert isinstance(server, FakeRegistry)

        other = push(llama, parse_reference(reference.replace(":v1", ":v2")), PushHow()).revision
        first = server.tags["a/b"]["v1"]

        def move(tag: str | None) -> Callable[[], None]:
            return lambda: server.tags["a/b"].update(v1=str(tag))

        after_first(server, lambda seen: "/blobs/" in seen.path and seen.method == "GET", move(other))
        done = pulled(reference, None)
        assert done.documents.id == opened().id
        assert done.note is not None
        assert "means sha256:" in done.note
        assert pulled(reference, None).documents.id == llama.id
        check_cache(cache)

        # The other way round: a push doesn't move a tag that somebody else has moved meanwhile.
        after_first(server, lambda seen: seen.method == "HEAD", move(first))
        with pytest.raises(BundleError) as caught:
            push(golden("mistral-bfloat16"), parse_reference(reference), PushHow())
        assert caught.value.codes == ("remote.changed",)


@pytest.mark.rule("SB-S-004")
def test_a_bundle_that_is_replaced_on_a_static_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    import shutil

    shutil.copytree(GOLDEN, tmp_path / "b.splitbundle")

    def replace() -> None:
        shutil.rmtree(tmp_path / "b.splitbundle")
        shutil.copytree(GOLDEN.parent / "llama.splitbundle", tmp_path / "b.splitbundle")

    with static_server(tmp_path) as server:
        after_first(server, lambda seen: seen.path.endswith(("manifest.json", "architecture.json")), replace)
        with pytest.raises(BundleError) as caught:
            pulled(f"{server.url}/b.splitbundle", None)
    assert caught.value.codes in {("file.digest",), ("file.changed",), ("network.missing",)}
    check_cache(cache)
