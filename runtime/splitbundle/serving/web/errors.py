"""The errors of the HTTP interface, in the form that clients of OpenAI's interface read."""

from __future__ import annotations

from typing import Any, Final

from splitbundle.errors import BundleError
from splitbundle.records import replace

_STATUS: Final = {
    "server.full": 429,
    "server.draining": 503,
    "server.memory": 503,
    "peer": 503,
    "cluster": 503,
    "input": 400,
    "text": 400,
    "json": 400,
    "field": 400,
}
"""A code, or its first word -> the status of the answer. Any other error is 500."""
_KINDS: Final = {
    **dict.fromkeys((400, 405, 408, 413, 415), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_PARAMETERS: Final = {"stop_ids": "stop_token_ids", "max_new_tokens": "max_tokens"}
"""Arguments of the runtime that have another name in the interface."""
RETRY_SECONDS: Final = 1
"""How long a client should wait before it asks a full server again."""


class RequestError(Exception):
    """A request that isn't answered: the status, and what the client is told."""

    def __init__(
        self, status: int, message: str, *, reason: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.reason, self.param, self.headers = status, message, reason, param, headers or {}

    @property
    def document(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "code": self.reason, "param": self.param}}


def invalid(param: str, expected: str, got: str, *, reason: str = "invalid_value") -> RequestError:
    """Return the error for a parameter with a wrong value."""
    return RequestError(400, f"{param}: expected {expected}, got {got}", reason=reason, param=param)


def unsupported(param: str, instead: str) -> RequestError:
    """Return the error for a parameter of OpenAI's interface that this server doesn't have."""
    return RequestError(400, f"{param} isn't supported here: {instead}", reason="unsupported_parameter", param=param)


def of_bundle_error(error: BundleError) -> RequestError:
    """Return an error of the runtime as one of the interface."""
    problem = error.problems[0]
    problem = replace(problem, argument=_PARAMETERS.get(problem.argument or "", problem.argument))
    status = _STATUS.get(problem.code) or _STATUS.get(problem.code.partition(".")[0], 500)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
    param = problem.argument if status == 400 else None
    return RequestError(status, str(problem), reason=problem.code, param=param, headers=headers)
