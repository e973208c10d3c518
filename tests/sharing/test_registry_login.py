"""Logins for registries: Docker's configuration, its helpers, and to which token server a login may go."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from splitbundle.errors import BundleError
from splitbundle.sharing.registry_login import Login, _is_for, find_login


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def configure(docker: Path, value: Any) -> None:
    (docker / "config.json").write_text(json.dumps(value), "utf-8")


def helper(docker: Path, name: str, script: str) -> None:
    place = docker / f"docker-credential-{name}"
    place.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    place.chmod(0o755)


def basic(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "key", ["reg.example.org:5000", "https://reg.example.org:5000", "https://reg.example.org:5000/v1/"]
)
def test_a_login_of_the_file(docker: Path, key: str) -> None:
    configure(docker, {"auths": {"other.example.org": basic("a", "b"), key: basic("me", "p:ss")}})
    found = find_login("reg.example.org:5000")
    assert found is not None
    assert (found.user, found.password) == ("me", "p:ss")
    assert find_login("reg.example.org") is None
    assert "p:ss" not in repr(found) + str(found)


def test_a_helper_is_asked_for_its_registry_alone(docker: Path) -> None:
    script = 'read host; echo "$host" >> "$0.asked"; echo "{\\"Username\\": \\"me\\", \\"Secret\\": \\"s\\"}"'
    helper(docker, "mine", script)
    configure(docker, {"credHelpers": {"reg.example.org": "mine"}})
    assert find_login("reg.example.org") == Login(user="me", password="s")
    assert find_login("evil.example.org") is None
    assert (docker / "docker-credential-mine.asked").read_text() == "reg.example.org\n"


def test_a_store_of_tokens(docker: Path) -> None:
    helper(docker, "store", 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"t\\"}"')
    configure(docker, {"credsStore": "store"})
    assert find_login("reg.example.org") == Login(identity_token="t")


@pytest.mark.parametrize("name", ["../evil", "a/b", "x; rm -rf", ""])
def test_no_other_program_is_run(docker: Path, name: str) -> None:
    configure(docker, {"credsStore": name, "credHelpers": {"reg.example.org": name}})
    assert find_login("reg.example.org") is None


def test_a_helper_that_is_not_there(docker: Path) -> None:
    configure(docker, {"credsStore": "nowhere-to-be-found"})
    assert find_login("reg.example.org") is None
    configure(docker, {"credHelpers": {"reg.example.org": "nowhere-to-be-found"}})
    with pytest.raises(BundleError) as caught:
        find_login("reg.example.org")
    assert caught.value.codes == ("network.auth",)
    assert "docker-credential-nowhere-to-be-found" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"auths": 3}', '{"auths": {"r": []}}', '{"auths": {"r": {"auth": "%"}}}', "{"]
)
def test_configurations_that_say_nothing(docker: Path, text: str) -> None:
    (docker / "config.json").write_text(text, "utf-8")
    assert find_login("r") is None


@pytest.mark.rule("SB-S-005")
@pytest.mark.parametrize(
    ("registry", "realm", "good"),
    [
        ("https://ghcr.io/v2/", "https://ghcr.io/token", True),
        ("https://registry.gitlab.com/v2/", "https://gitlab.com/jwt/auth", True),
        ("https://registry-1.docker.io/v2/", "https://auth.docker.io/token", True),
        ("https://reg.example.org:5000/v2/", "https://reg.example.org/token", True),
        ("https://ghcr.io/v2/", "http://ghcr.io/token", False),
        ("https://ghcr.io/v2/", "https://evil.org/token", False),
        ("https://ghcr.io/v2/", "https://ghcr.io.evil.org/token", False),
        ("https://a.example.org/v2/", "https://b.example.org/token", False),
        ("https://reg.io/v2/", "https://io/token", False),
        ("http://127.0.0.1:5000/v2/", "http://127.0.0.1:5001/token", True),
        ("http://127.0.0.1:5000/v2/", "http://127.0.0.2:5001/token", False),
        ("http://127.0.0.1:5000/v2/", "https://evil.org/token", False),
    ],
)
def test_where_a_login_may_go(registry: str, realm: str, good: bool) -> None:
    assert _is_for(registry, realm) is good
