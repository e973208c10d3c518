"""Logins of a test registry: none, Basic, or Bearer with a token server on a port of its own."""

from __future__ import annotations

import base64
import json
import secrets
import urllib.parse
from collections.abc import Mapping
from typing import Final, Literal

from tests.support.http_server import Exchange

Kind = Literal["none", "basic", "bearer"]
Access = tuple[str, str]
"""A repository, and ``pull``, ``push`` or ``delete``."""
SERVICE: Final = "fake-registry"
REFRESH: Final = "a-refresh-token"


class Logins:
    """Who may do what."""

    def __init__(self, kind: Kind, users: Mapping[str, str], *, anonymous_pull: bool, field: str) -> None:
        """Take the rules.

        Args:
            kind: how clients log in.
            users: names with their passwords. Each may do everything.
            anonymous_pull: whether pulling needs no login. With ``bearer`` it needs an anonymous token.
            field: the name of the token in the token server's answer: ``token`` or ``access_token``.
        """
        self.kind, self.users, self.anonymous_pull, self.field = kind, dict(users), anonymous_pull, field
        self.realm = ""
        self.tokens: dict[str, frozenset[Access]] = {}
        """Each token that was given out, and what it is for."""

    def expire(self) -> None:
        """Let no token be good any more."""
        self.tokens.clear()

    def allows(self, exchange: Exchange, wanted: frozenset[Access]) -> bool:
        """Return whether a request may do what it wants. If not, answer it."""
        if self.kind == "none":
            return True
        sent = exchange.seen.authorization
        scopes = " ".join(f"repository:{name}:{actions}" for name, actions in _by_repository(wanted).items())
        if self.kind == "basic":
            only_pull = self.anonymous_pull and all(action == "pull" for _, action in wanted) and bool(wanted)
            if only_pull or self._user(sent):
                return True
            challenge = 'Basic realm="fake"'
        else:
            granted = self.tokens.get((sent or "").removeprefix("Bearer "))
            if granted is not None and wanted <= granted:
                return True
            challenge = f'Bearer realm="{self.realm}",service="{SERVICE}"' + (f',scope="{scopes}"' if scopes else "")
            challenge += ',error="insufficient_scope"' if granted is not None else ""
        body = json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": "authentication required"}]}).encode()
        exchange.answer(401, body, {"Content-Type": "application/json", "WWW-Authenticate": challenge})
        return False

    def give_token(self, exchange: Exchange) -> None:
        """Answer a request at the token server: GET with Basic, or POST with a form (OAuth 2)."""
        if exchange.method == "POST":
            pairs = urllib.parse.parse_qsl(exchange.body.decode())
            form = dict(pairs)
            good = form.get("refresh_token") == REFRESH or self.users.get(form.get("username", "")) == form.get(
                "password", ""
            )
            anonymous = False
        else:
            pairs = exchange.seen.queries
            form = dict(pairs)
            sent = exchange.seen.authorization
            good, anonymous = self._user(sent), sent is None
        if form.get("service") != SERVICE or not (good or anonymous):
            exchange.answer(401, b'{"details": "incorrect username or password"}')
            return
        asked = {
            (name, action)
            for key, value in pairs
            if key == "scope"
            for scope in value.split()
            for name, actions in [scope.removeprefix("repository:").rsplit(":", 1)]
            for action in actions.split(",")
        }
        if "*" in {action for _, action in asked}:
            asked |= {(name, action) for name, _ in asked for action in ("pull", "push", "delete")}
        if anonymous:
            asked = {each for each in asked if self.anonymous_pull and each[1] == "pull"}
        token = secrets.token_hex(16)
        self.tokens[token] = frozenset(asked)
        answer = json.dumps({self.field: token, "expires_in": 300}).encode()
        exchange.answer(200, answer, {"Content-Type": "application/json"})

    def _user(self, header: str | None) -> bool:
        kind, _, text = (header or "").partition(" ")
        if kind.lower() != "basic":
            return False
        name, _, password = base64.b64decode(text).decode().partition(":")
        return name in self.users and self.users[name] == password


def _by_repository(wanted: frozenset[Access]) -> dict[str, str]:
    names = dict.fromkeys(sorted(name for name, _ in wanted))
    return {name: ",".join(sorted(action for each, action in wanted if each == name)) for name in names}
