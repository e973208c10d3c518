"""Log in to registries: with Docker's configuration and its helpers, with a token, or anonymously."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import subprocess
import threading
import urllib.parse
from pathlib import Path
from typing import Any, Final

from splitbundle.errors import quoted
from splitbundle.records import record
from splitbundle.sharing.credentials import bearer
from splitbundle.sharing.http_client import HttpClient, origin
from splitbundle.sharing.network import network_error
from splitbundle.sharing.reference import host_name, is_loopback

HELPER_TIMEOUT: Final = 10.0
MAX_ANSWER: Final = 2**20
DOCKER_HUB: Final = "registry-1.docker.io"
DOCKER_HUB_LOGIN: Final = "auth.docker.io"
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PARAMETER: Final = re.compile(r'([a-z_]+)="([^"]*)"|([a-z_]+)=([^",\s]+)', re.IGNORECASE)


@record(frozen=True, slots=True, kw_only=True)
class Login:
    """What a configuration has for a registry. Its text never has the secrets."""

    user: str = ""
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return "Login(…)"

    @property
    def basic(self) -> str:
        """Return the value of the header Authorization (RFC 7617)."""
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode('ascii')}"


def find_login(host: str) -> Login | None:
    """Return the login for a registry from Docker's configuration, or None for an anonymous one.

    The places are ``$REGISTRY_AUTH_FILE``, ``$DOCKER_CONFIG/config.json``, ``~/.docker/config.json`` and Podman's file.
    A helper is a program that the user's own configuration names.

    Raises:
        BundleError: ``network.auth`` if a helper fails.
    """
    for place in _configurations():
        try:
            found = json.loads(place.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(found, dict):
            continue
        login = _from_helper(found, host) or _from_file(found, host)
        if login is not None:
            return login
    return None


def _configurations() -> list[Path]:
    docker = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    named, run = os.environ.get("REGISTRY_AUTH_FILE"), os.environ.get("XDG_RUNTIME_DIR")
    places = [named, os.path.join(docker, "config.json")]
    places += [os.path.join(run, "containers", "auth.json")] if run else []
    return [Path(place) for place in places if place]


def _keys(host: str) -> list[str]:
    """Return the names under which a configuration may have a registry."""
    own = ["https://index.docker.io/v1/", "docker.io", "index.docker.io"] if host == DOCKER_HUB else []
    return [host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/", f"http://{host}", *own]


def _from_file(found: dict[str, Any], host: str) -> Login | None:
    logins = found.get("auths")
    for key in _keys(host):
        entry = logins.get(key) if isinstance(logins, dict) else None
        if not isinstance(entry, dict):
            continue
        user, password = entry.get("username"), entry.get("password")
        with contextlib.suppress(ValueError, binascii.Error, TypeError):
            if entry.get("auth"):
                user, _, password = base64.b64decode(entry["auth"]).decode("utf-8").partition(":")
        token = entry.get("identitytoken")
        if isinstance(token, str) and token:
            return Login(identity_token=token)
        if isinstance(user, str) and isinstance(password, str) and user:
            return Login(user=user, password=password)
    return None


def _from_helper(found: dict[str, Any], host: str) -> Login | None:
    helpers = found.get("credHelpers")
    named = next((helpers[key] for key in _keys(host) if key in helpers), None) if isinstance(helpers, dict) else None
    helper = named or found.get("credsStore")
    if not isinstance(helper, str) or not _HELPER.fullmatch(helper):
        return None
    for key in _keys(host) if named is None else [host]:
        login = _ask_helper(helper, key, required=named is not None)
        if login is not None:
            return login
    return None


def _ask_helper(helper: str, key: str, *, required: bool) -> Login | None:
    program = f"docker-credential-{helper}"
    try:
        ran = subprocess.run(  # noqa: S603  # the program that the user's own configuration names, without a shell
            [program, "get"], input=key.encode(), capture_output=True, timeout=HELPER_TIMEOUT, check=False
        )
        answer = json.loads(ran.stdout) if ran.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        if not required and not isinstance(error, subprocess.TimeoutExpired):
            return None
        hint = f"Install {program}, or take it out of Docker's configuration"
        raise network_error("network.auth", key, "a login from the helper", type(error).__name__, hint) from None
    if not isinstance(answer, dict):
        return None
    user, secret = answer.get("Username"), answer.get("Secret")
    if not isinstance(user, str) or not isinstance(secret, str) or not secret:
        return None
    return Login(identity_token=secret) if user == "<token>" else Login(user=user, password=secret)


class Authorizer:
    """Knows the header Authorization for one registry, by what the registry asks for."""

    def __init__(self, client: HttpClient, host: str, url: str) -> None:
        self._client = client
        self._host = host
        self._url = url
        self._fixed = bearer()
        self._login: Login | None = None
        self._looked = False
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()

    def header(self, scope: str) -> str | None:
        """Return the header for a scope, as far as it is known now."""
        return self._fixed or self._tokens.get(scope) or self._tokens.get("")

    def answer(self, challenge: str, scope: str, sent: str | None) -> bool:
        """Follow the header WWW-Authenticate of a registry. Return whether another try has a chance.

        Args:
            challenge: the header.
            scope: what the request needs.
            sent: the header that the registry refused. A token may have run out.

        Raises:
            NetworkError: ``network.auth`` for a token server that the login isn't for.
        """
        with self._lock:  # several threads come here at once, and one of them has to log in
            if self._fixed is not None:
                return False
            if self.header(scope) not in (None, sent):
                return True  # another thread has logged in meanwhile
            self._tokens.pop(scope, None)
            if not self._looked:
                self._login, self._looked = find_login(self._host), True
            kind, _, rest = challenge.strip().partition(" ")
            if kind.lower() == "basic":
                if self._login is None or not self._login.user or self._tokens.get("") == self._login.basic:
                    return False
                self._tokens[""] = self._login.basic
                return True
            if kind.lower() != "bearer":
                return False
            parameters = {(a or c).lower(): b or d for a, b, c, d in _PARAMETER.findall(rest)}
            self._tokens[scope] = f"Bearer {self._token(parameters, scope)}"
            return True

    def _token(self, parameters: dict[str, str], scope: str) -> str:
        """Ask the token server (https://distribution.github.io/distribution/spec/auth/token/)."""
        realm = parameters.get("realm", "")
        query = {"service": parameters.get("service", ""), "scope": scope}
        login = self._login if _is_for(self._url, realm) else find_login(urllib.parse.urlsplit(realm).netloc)
        if self._login is not None and login is None:
            hint = f"Log in to that host: docker login {urllib.parse.urlsplit(realm).netloc}"
            expected = f"a token server of {self._host}, which the login is for"
            raise network_error("network.auth", self._host, expected, quoted(realm), hint)
        if login is not None and login.identity_token:
            form = {**query, "grant_type": "refresh_token", "client_id": "splitbundle"}
            form["refresh_token"] = login.identity_token
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            body = urllib.parse.urlencode(form).encode()
            answer = self._client.ask(realm, method="POST", body=body, headers=kind)
        else:
            mark = "&" if "?" in realm else "?"
            answer = self._client.ask(
                f"{realm}{mark}{urllib.parse.urlencode(query)}", authorization=None if login is None else login.basic
            )
        try:
            found = json.loads(answer.read(MAX_ANSWER))
            token = found.get("token") or found.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise network_error("network.auth", answer.url, "a token", "none")
        return token


def _is_for(url: str, realm: str) -> bool:
    """Return whether a login for the registry at ``url`` may be sent to a token server.

    A registry names its token server itself. A hostile one could name any. So the token server has to be on the same
    host, or on a domain that the registry's host lies in. Docker's own registry has another one.
    """
    if origin(url) == origin(realm):
        return True
    own, other = host_name(urllib.parse.urlsplit(url).netloc), host_name(urllib.parse.urlsplit(realm).netloc)
    if is_loopback(own) or is_loopback(other):
        return own == other
    if not realm.startswith("https://"):
        return False
    return (
        own == other
        or (other.count(".") > 0 and own.endswith(f".{other}"))
        or (own, other)
        == (
            DOCKER_HUB,
            DOCKER_HUB_LOGIN,
        )
    )
