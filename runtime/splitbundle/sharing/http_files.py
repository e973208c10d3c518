"""Files over HTTP: small ones whole, large ones from any byte on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Protocol

from splitbundle.errors import Problem, VerificationError, quoted
from splitbundle.format.manifest.document import File
from splitbundle.sharing.http_client import Answer
from splitbundle.sharing.network import Patience, network_error, persistently

_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class HttpStream:
    """The body of an answer, from a byte of the file on."""

    def __init__(self, answer: Answer, start: int) -> None:
        self.start = start
        self._answer = answer

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes; 0 at the end."""
        return self._answer.readinto(view)

    def close(self) -> None:
        """Close the connection."""
        self._answer.close()


class Ask(Protocol):
    """A function that asks for a URL, as ``HttpClient.ask`` does, and knows the credentials for it."""

    def __call__(
        self, url: str, *, headers: Mapping[str, str] | None = None, accept: tuple[int, ...] = (200,)
    ) -> Answer: ...


def read_small(ask: Ask, url: str, limit: int, patience: Patience) -> bytes:
    """Return a whole small file, with as many tries as the patience allows.

    Raises:
        NetworkError: ``network.*``; ``network.answer`` for a web page in place of the file.
    """

    def once() -> bytes:
        answer = ask(url)
        _refuse_page(answer)
        return answer.read(limit)

    return persistently(once, patience)


def open_from(ask: Ask, url: str, listed: File, start: int) -> HttpStream:
    """Open a file from its byte ``start`` on, or from its beginning if the server has no ranges. One try.

    Raises:
        NetworkError: ``network.*``.
        VerificationError: ``file.size`` if the server has another number of bytes.
    """
    answer = ask(url, headers={"Range": f"bytes={start}-"}, accept=(200, 206, 416)) if start else ask(url)
    try:
        if answer.status == 416:  # the file there is shorter than what is here: one of them isn't the listed one
            answer.close()
            answer, start = ask(url), 0
        if answer.status == 206:
            _check_range(answer, start, listed.size)
        else:
            start = 0
        _refuse_page(answer)
        _check_length(answer, listed.size - start, listed.size)
    except BaseException:
        answer.close()
        raise
    return HttpStream(answer, start)


def _refuse_page(answer: Answer) -> None:
    if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
        answer.close()
        hint = "Open the URL in a browser: it may want a login, or it isn't the place of the bundle"
        raise network_error("network.answer", answer.url, "a file of the bundle", "a web page", hint)


def _check_range(answer: Answer, start: int, size: int) -> None:
    text = answer.headers.get("Content-Range", "")
    found = _RANGE.fullmatch(text.strip())
    expected = f"bytes {start}-{size - 1}/{size}"
    if found is None or (int(found[1]), int(found[2])) != (start, size - 1) or found[3] not in ("*", str(size)):
        raise network_error("network.answer", answer.url, f"the range {expected}", quoted(text))


def _check_length(answer: Answer, expected: int, size: int) -> None:
    if answer.length is not None and answer.length != expected:
        got = f"{answer.length} bytes, of the {expected} that are missing"
        hint = "The server has another file than the one that the manifest lists"
        raise VerificationError(
            Problem(code="file.size", file=answer.url, expected=f"{size} bytes in all", got=got, hint=hint)
        )
