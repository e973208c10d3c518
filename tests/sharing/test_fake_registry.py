"""The test registry keeps to the specification, logins included; the clients' own tests rely on it."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

import pytest

import splitbundle
from splitbundle.errors import BundleError
from tests.support import lies
from tests.support.fake_registry import FakeRegistry
from tests.support.paths import TESTS
from tests.support.real_registry import real_registry

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
BASIC = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
DATA = os.urandom(10_000)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def ask(
    url: str, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one request, and follow nothing."""
    place = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=60)
    connection.request(method, f"{place.path}?{place.query}" if place.query else place.path, body, dict(headers or {}))
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read()
    connection.close()
    return found


def push_blob(registry: FakeRegistry, data: bytes, name: str = "a/b") -> None:
    status, headers, _ = ask(f"{registry.url}/v2/{name}/blobs/uploads/", "POST", b"")
    assert status == 202
    assert ask(f"{headers['Location']}&digest={digest(data)}", "PUT", data)[0] == 201


def manifest(*layers: bytes, **more: object) -> bytes:
    parts = [{"mediaType": "text/plain", "digest": digest(data), "size": len(data)} for data in layers]
    return json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "config": parts[0], "layers": parts, **more}).encode()


def put(registry: FakeRegistry, data: bytes, reference: str, name: str = "a/b") -> tuple[int, dict[str, str], bytes]:
    return ask(f"{registry.url}/v2/{name}/manifests/{reference}", "PUT", data, {"Content-Type": MANIFEST})


def test_a_blob_in_one_piece_and_in_chunks() -> None:
    with FakeRegistry() as registry:
        base = f"{registry.url}/v2/a/b/blobs"
        assert ask(f"{base}/{digest(DATA)}", "HEAD")[0] == 404
        push_blob(registry, DATA)
        status, headers, body = ask(f"{base}/{digest(DATA)}", "HEAD")
        assert (status, headers["Content-Length"], body) == (200, "10000", b"")
        assert headers["Docker-Content-Digest"] == digest(DATA)
        status, headers, body = ask(f"{base}/{digest(DATA)}", headers={"Range": "bytes=9000-"})
        assert (status, body, headers["Content-Range"]) == (206, DATA[9000:], "bytes 9000-9999/10000")
        assert (registry.received, registry.sent) == (10_000, 1_000)

        data = DATA + b"2"
        first = place = ask(f"{base}/uploads/", "POST", b"")[1]["Location"]
        for start, stop in ((0, 4000), (4000, 9000)):
            status, headers, _ = ask(place, "PATCH", data[start:stop], {"Content-Range": f"{start}-{stop - 1}"})
            assert (status, headers["Range"]) == (202, f"0-{stop - 1}")
            place = headers["Location"]
        assert ask(first, "PATCH", b"x")[0] == 404  # an old Location
        status, headers, _ = ask(place, "PATCH", b"x", {"Content-Range": "0-0"})
        assert (status, headers["Range"]) == (416, "0-8999")
        status, headers, _ = ask(place)
        assert (status, headers["Range"]) == (204, "0-8999")
        assert ask(f"{place}&digest={digest(DATA)}", "PUT", data[9000:])[0] == 400
        assert digest(data) not in registry.blobs
        place = ask(f"{base}/uploads/", "POST", b"")[1]["Location"]
        assert ask(place, "DELETE")[0] == 204
        assert ask(place)[0] == 404
        assert ask(f"{base}/uploads/?digest={digest(data)}", "POST", data)[0] == 201
        assert ask(f"{base}/{digest(data)}")[2] == data


def test_mounting() -> None:
    with FakeRegistry(absolute=False) as registry:
        push_blob_relative = ask(f"{registry.url}/v2/a/b/blobs/uploads/?digest={digest(DATA)}", "POST", DATA)
        assert push_blob_relative[1]["Location"] == f"/v2/a/b/blobs/{digest(DATA)}"
        assert ask(f"{registry.url}/v2/c/blobs/{digest(DATA)}")[0] == 404
        assert ask(f"{registry.url}/v2/c/blobs/uploads/?mount={digest(DATA)}&from=x", "POST", b"")[0] == 202
        assert ask(f"{registry.url}/v2/c/blobs/uploads/?mount={digest(DATA)}&from=a/b", "POST", b"")[0] == 201
        assert ask(f"{registry.url}/v2/c/blobs/{digest(DATA)}")[2] == DATA
        assert registry.received == len(DATA)


def test_manifests_and_tags() -> None:
    with FakeRegistry(page=2) as registry:
        base = f"{registry.url}/v2/a/b/manifests"
        made = manifest(DATA)
        status, _, body = put(registry, made, "v1")
        assert (status, json.loads(body)["errors"][0]["code"]) == (400, "MANIFEST_BLOB_UNKNOWN")
        push_blob(registry, DATA)
        status, headers, _ = put(registry, made, "v1")
        assert (status, headers["Docker-Content-Digest"]) == (201, digest(made))
        assert put(registry, made, digest(b"else"))[0] == 400
        assert put(registry, b"{", "v1")[0] == 400
        for reference in ("v1", digest(made)):
            status, headers, body = ask(f"{base}/{reference}", headers={"Accept": MANIFEST})
            assert (status, body, headers["Content-Type"]) == (200, made, MANIFEST)
            assert ask(f"{base}/{reference}", "HEAD")[1]["Docker-Content-Digest"] == digest(made)
        assert ask(f"{base}/v1", headers={"Accept": "application/json"})[0] == 404
        for tag in ("v2", "v3", "v4"):
            put(registry, made, tag)
        found, place = [], f"{registry.url}/v2/a/b/tags/list"
        while place:
            _, headers, body = ask(place)
            found.append(json.loads(body)["tags"])
            place = headers.get("Link", "").partition(">")[0].lstrip("<")
        assert found == [["v1", "v2"], ["v3", "v4"]]
        assert ask(f"{base}/v4", "DELETE")[0] == 202
        assert ask(f"{base}/{digest(made)}", "DELETE")[0] == 202
        assert registry.tags["a/b"] == {}
        assert ask(f"{base}/v1")[0] == 404
        assert ask(f"{registry.url}/v2/none/tags/list")[0] == 404


def test_referrers() -> None:
    with FakeRegistry() as registry:
        push_blob(registry, DATA)
        made = manifest(DATA)
        put(registry, made, "v1")
        subject = {"mediaType": MANIFEST, "digest": digest(made), "size": len(made)}
        signature = manifest(DATA, subject=subject, artifactType="application/x-signature")
        assert put(registry, signature, digest(signature))[1]["OCI-Subject"] == digest(made)
        place = f"{registry.url}/v2/a/b/referrers/{digest(made)}"
        assert [each["digest"] for each in json.loads(ask(place)[2])["manifests"]] == [digest(signature)]
        assert json.loads(ask(f"{place}?artifactType=x")[2])["manifests"] == []
    with FakeRegistry(referrers=False) as registry:
        assert ask(f"{registry.url}/v2/a/b/referrers/{digest(made)}")[0] == 404


def test_basic_login() -> None:
    with FakeRegistry(auth="basic") as registry:
        status, headers, _ = ask(f"{registry.url}/v2/")
        assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="fake"')
        assert ask(f"{registry.url}/v2/", headers=BASIC)[0] == 200
        wrong = {"Authorization": "Basic " + base64.b64encode(b"me:wrong").decode()}
        assert ask(f"{registry.url}/v2/", headers=wrong)[0] == 401


def token(registry: FakeRegistry, *scopes: str, headers: Mapping[str, str] = BASIC) -> str:
    query = urllib.parse.urlencode([("service", "fake-registry"), *(("scope", scope) for scope in scopes)])
    status, _, body = ask(f"{registry.logins.realm}?{query}", headers=headers)
    assert status == 200
    return str(json.loads(body)["token"])


def test_bearer_login() -> None:
    with FakeRegistry(auth="bearer") as registry:
        blob = f"{registry.url}/v2/a/b/blobs/{digest(DATA)}"
        status, headers, _ = ask(blob)
        assert status == 401
        assert headers["WWW-Authenticate"] == (
            f'Bearer realm="{registry.logins.realm}",service="fake-registry",scope="repository:a/b:pull"'
        )
        assert registry.host not in registry.logins.realm
        pull = {"Authorization": f"Bearer {token(registry, 'repository:a/b:pull')}"}
        assert ask(blob, headers=pull)[0] == 404  # there is none, and this token may know
        assert ask(f"{registry.url}/v2/c/blobs/{digest(DATA)}", headers=pull)[0] == 401
        status, headers, _ = ask(f"{registry.url}/v2/a/b/blobs/uploads/", "POST", b"", pull)
        assert status == 401
        assert 'scope="repository:a/b:pull,push",error="insufficient_scope"' in headers["WWW-Authenticate"]
        push = {"Authorization": f"Bearer {token(registry, 'repository:a/b:pull,push', 'repository:c:pull')}"}
        assert ask(f"{registry.url}/v2/a/b/blobs/uploads/?digest={digest(DATA)}", "POST", DATA, push)[0] == 201
        assert ask(blob, headers=pull)[2] == DATA
        registry.logins.expire()
        assert ask(blob, headers=pull)[0] == 401
        assert ask(f"{registry.logins.realm}?service=fake-registry", headers={"Authorization": "Basic eDp5"})[0] == 401
        nobody = {"Authorization": f"Bearer {token(registry, 'repository:a/b:pull', headers={})}"}
        assert ask(blob, headers=nobody)[0] == 401
        form = urllib.parse.urlencode(
            {"grant_type": "password", "service": "fake-registry", "username": "me", "password": "secret"}
            | {"scope": "repository:a/b:pull"}
        )
        status, _, body = ask(registry.logins.realm, "POST", form.encode())
        assert ask(blob, headers={"Authorization": f"Bearer {json.loads(body)['token']}"})[2] == DATA
        assert {seen.path for seen in registry.token_requests} == {"/token"}
        assert registry.token_requests[0].authorization == BASIC["Authorization"]


def test_blobs_on_another_host() -> None:
    with FakeRegistry(redirect=True) as registry:
        push_blob(registry, DATA)
        status, headers, _ = ask(f"{registry.url}/v2/a/b/blobs/{digest(DATA)}")
        assert status == 307
        assert headers["Location"].startswith("http://127.0.0.2:")
        status, _, body = ask(headers["Location"], headers={"Range": "bytes=5-"})
        assert (status, body) == (206, DATA[5:])
        assert ask(headers["Location"], headers=BASIC)[0] == 400
        assert ask(headers["Location"].partition("?")[0])[0] == 403
        assert registry.storage_host in headers["Location"]


def test_lies_of_blobs_manifests_and_uploads() -> None:
    bound = {
        f"*/blobs/{digest(DATA)}": "wrong bytes",
        "*/manifests/v1": "another document",
        "PUT */blobs/uploads/*": "503 twice",
        "POST *": "500",
    }
    with FakeRegistry() as registry:
        push_blob(registry, DATA)
        put(registry, manifest(DATA), "v1")
        place = ask(f"{registry.url}/v2/a/b/blobs/uploads/", "POST", b"")[1]["Location"]
        registry.lies = {pattern: lies.LIES[name] for pattern, name in bound.items()}
        body = ask(f"{registry.url}/v2/a/b/blobs/{digest(DATA)}")[2]
        assert (len(body), body == DATA) == (len(DATA), False)
        assert ask(f"{registry.url}/v2/a/b/manifests/v1")[2] != manifest(DATA)
        assert ask(f"{registry.url}/v2/a/b/manifests/{digest(manifest(DATA))}")[2] == manifest(DATA)
        other = DATA + b"3"
        assert [ask(f"{place}&digest={digest(other)}", "PUT", other)[0] for _ in range(3)] == [503, 503, 201]
        assert ask(f"{registry.url}/v2/a/b/blobs/uploads/", "POST", b"")[0] == 500


def test_a_tag_that_moves() -> None:
    with FakeRegistry() as registry:
        push_blob(registry, DATA)
        one, two = manifest(DATA), manifest(DATA, annotations={"a": "b"})
        put(registry, two, "v2")
        put(registry, one, "v1")
        lies.after_first(
            registry,
            lambda seen: seen.path.endswith("/manifests/v1") and seen.method == "GET",
            lambda: registry.tags["a/b"].update(v1=digest(two)),
        )
        assert [ask(f"{registry.url}/v2/a/b/manifests/v1")[2] for _ in range(3)] == [one, two, two]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a cache and a login."""
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.delenv("SPLITBUNDLE_TOKEN", raising=False)
    return tmp_path


def test_a_real_registry_with_a_login(home: Path) -> None:
    with real_registry(home / "storage", login=True) as address:
        status, headers, _ = ask(f"http://{address}/v2/")
        assert (status, headers["Www-Authenticate"]) == (401, 'Basic realm="test"')
        assert ask(f"http://{address}/v2/", headers=BASIC)[0] == 200
        (home / "config.json").write_text(json.dumps({"auths": {address: {"auth": BASIC["Authorization"].split()[1]}}}))
        bundle = splitbundle.open(GOLDEN)
        splitbundle.push(bundle, f"oci://{address}/a/b:v1")
        assert splitbundle.pull(f"oci://{address}/a/b:v1", output=home / "pulled.splitbundle").id == bundle.id


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"auth": "basic"},
        {"auth": "bearer"},
        {"auth": "bearer", "redirect": True, "token_field": "access_token", "absolute": False},
    ],
    ids=["open", "basic", "bearer", "bearer-and-storage"],
)
def test_a_bundle_goes_there_and_back(options: dict[str, object], home: Path) -> None:
    with FakeRegistry(**options) as registry:  # type: ignore[arg-type]
        logins = {registry.host: {"auth": BASIC["Authorization"].split()[1]}} if options else {}
        (home / "config.json").write_text(json.dumps({"auths": logins}))
        bundle = splitbundle.open(GOLDEN)
        splitbundle.push(bundle, f"oci://{registry.host}/a/b:v1")
        pulled = splitbundle.pull(f"oci://{registry.host}/a/b:v1", output=home / "pulled.splitbundle")
        assert pulled.id == bundle.id
        stored = sum(len(data) for data in registry.blobs.values())
        assert 0 <= registry.received - stored < 20_000  # manifests and forms
        credentials = {seen.host: seen.authorization for seen in registry.requests if seen.authorization}
        assert registry.storage_host not in credentials
        assert len(registry.token_requests) <= 3  # one to look, one to push, one to pull, however many threads
        if options:
            (home / "config.json").write_text("{}")
            with pytest.raises(BundleError, match=r"network\.auth"):
                splitbundle.pull(f"oci://{registry.host}/a/b:v1", output=home / "again.splitbundle")
