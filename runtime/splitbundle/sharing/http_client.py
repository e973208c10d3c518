"""An HTTP client over the standard library that treats every server as hostile.

It has limits of time and size, follows redirects only between HTTP servers, and sends a credential only to the origin
that it was given for. Proxies and certificates come from the usual variables.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, Final

from splitbundle.errors import quoted
from splitbundle.sharing.http_errors import status_error
from splitbundle.sharing.network import NetworkError, Pace, Patience, lost, network_error
from splitbundle.sharing.reference import is_loopback, may_be_plain
from splitbundle.version import __version__

MAX_REDIRECTS: Final = 5
_CERTIFICATES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Variables of other programs, for a machine where ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` aren't set."""


class Answer:
    """A response whose body comes in pieces."""

    def __init__(self, response: Any, url: str, timeout: float) -> None:
        self._response = response
        self._pace = Pace(url, timeout)
        self.url = url
        """The URL that was asked first, without its query."""
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes of the body; 0 at its end.

        Raises:
            NetworkError: ``network``, also for a body that ends early or drips.
        """
        with _failures(self.url):
            if getattr(self._response, "chunked", False):
                piece = self._response.read1(len(view))
                count = len(piece)
                view[:count] = piece
            else:
                count = self._response.readinto(view)
        left = getattr(self._response, "length", None)
        if not count and left:
            raise lost(self.url, f"the end of the answer, {left} bytes too early")
        self._pace.moved(count)
        return count

    def read(self, limit: int) -> bytes:
        """Read the whole body, of at most ``limit`` bytes, and close it.

        Raises:
            NetworkError: ``network.answer`` for a longer body.
        """
        pieces, done, view = [], 0, memoryview(bytearray(2**16))
        with self:
            while count := self.readinto(view):
                done += count
                if done > limit:
                    raise network_error("network.answer", self.url, f"at most {limit} bytes", "more")
                pieces.append(bytes(view[:count]))
        return b"".join(pieces)

    @property
    def length(self) -> int | None:
        """Return the stated number of bytes of the body, or None."""
        text = self.headers.get("Content-Length")
        return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else None

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self._response.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HttpClient:
    """Asks servers. Threads may share it."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._opener = _opener()

    def ask(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        authorization: str | None = None,
        body: bytes | Iterable[bytes] | None = None,
        accept: tuple[int, ...] = (200,),
    ) -> Answer:
        """Send one request, and return the answer if its status is one of ``accept``.

        Args:
            url: the URL.
            method: the method.
            headers: further headers.
            authorization: the header of that name. No other origin gets it, also after a redirect.
            body: the body. Pieces need the header Content-Length.
            accept: the statuses that are no error.

        Raises:
            NetworkError: ``network.auth`` (401, 403), ``network.missing`` (404), ``network.busy`` (429, 503),
                ``network.redirect``, ``network.answer``, ``network``.
        """
        check_url(url)
        place = without_query(url)
        sent = {"User-Agent": f"splitbundle/{__version__}", "Accept-Encoding": "identity", **(headers or {})}
        request = urllib.request.Request(url, data=body, headers=sent, method=method)  # noqa: S310  # checked above
        if authorization is not None:
            if not authorization.isprintable():  # the error of http.client would show it
                raise network_error("network.auth", place, "a login of printable characters", "another")
            request.add_unredirected_header("Authorization", authorization)
        with _failures(place):
            try:
                response = self._opener.open(request, timeout=self.patience.timeout)
            except urllib.error.HTTPError as error:
                response = error
        if response.status not in accept:
            with contextlib.closing(response):
                raise status_error(response, place)
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if coding != "identity":
            response.close()
            raise network_error("network.answer", place, "the bytes as they are", f"a body coded as {quoted(coding)}")
        return Answer(response, place, self.patience.timeout)


def check_url(url: str) -> None:
    """Refuse a URL that isn't HTTP, and one without TLS for a host that may not be asked so.

    Raises:
        NetworkError: ``network.redirect``.
    """
    parts = urllib.parse.urlsplit(url)
    try:
        host = parts.netloc.rpartition("@")[2]
        plain = parts.scheme == "http" and may_be_plain(host)
        good = (parts.scheme == "https" or plain) and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or "@" in parts.netloc:
        hint = None
        if parts.scheme == "http":
            hint = f"If you trust the network up to there: --plain-http, or SPLITBUNDLE_PLAIN_HTTP={host}"
        raise network_error("network.redirect", without_query(url), "a URL with https://", quoted(url), hint)


def without_query(url: str) -> str:
    """Return a URL without its query, which may have a signature in it, as messages show it."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def origin(url: str) -> tuple[str, str, int | None]:
    """Return the scheme, the host and the port of a URL. Credentials belong to these."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@contextlib.contextmanager
def _failures(place: str) -> Iterator[None]:
    """Turn the errors of sockets and of the protocol into ``NetworkError``."""
    try:
        yield
    except urllib.error.URLError as error:
        if isinstance(error.reason, NetworkError):
            raise error.reason from error
        raise _failure(place, error.reason) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failure(place, error) from error


def _failure(place: str, error: object) -> NetworkError:
    proxy = proxy_of(place)
    through = None if proxy is None else f"It was asked through the proxy {quoted(proxy)}: check that one first"
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "SSL_CERT_FILE names a file with further certificates, for instance those of a company's proxy"
        return network_error("network.auth", place, "a valid certificate", error.verify_message or str(error), hint)
    if isinstance(error, socket.gaierror):
        hint = through or "Check the host's name and the network"
        return network_error("network", place, "a host of this name", error.strerror or "none", hint, transient=True)
    if isinstance(error, TimeoutError):
        plain = "Run this again. If the server has no TLS: a reference with http://, and --plain-http"
        return lost(place, "none in time", through or (plain if place.startswith("https:") else None))
    if isinstance(error, http.client.HTTPException | ValueError):  # not HTTP, or headers without an end
        text = f"{type(error).__name__} {error}".strip()
        return network_error("network.answer", place, "an answer by the rules of HTTP", quoted(text), transient=True)
    return lost(place, getattr(error, "strerror", None) or error, through)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener for HTTP alone: urllib's own default would also read files and ask FTP servers."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        _Proxies(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Http(),
        _Https(context=_certificates()),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener


def _certificates() -> ssl.SSLContext:
    named = os.environ.get("SSL_CERT_FILE")
    if named and not os.path.isfile(named):
        expected, hint = "a file of certificates", "Correct the variable, or take it away"
        raise network_error("network.auth", "SSL_CERT_FILE", expected, f"{quoted(named)}, which isn't a file", hint)
    context = ssl.create_default_context()  # it reads SSL_CERT_FILE and SSL_CERT_DIR
    if not any(os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR")):
        for place in filter(None, map(os.environ.get, _CERTIFICATES)):
            with contextlib.suppress(OSError):
                context.load_verify_locations(**{"capath" if os.path.isdir(place) else "cafile": place})
    return context


class _Proxies(urllib.request.ProxyHandler):
    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:  # noqa: A002
        if is_loopback(req.host or ""):
            return None  # this machine is asked directly: a proxy would ask itself, and see the credential
        scheme, mark, _ = proxy.partition("://")
        if mark and scheme.lower() not in ("http", "https"):
            place, hint = (
                without_query(req.full_url),
                "Name one whose URL begins with http://, or take the variable away",
            )
            raise network_error("network", place, "a proxy that speaks HTTP", f"one by {quoted(scheme)}", hint)
        return super().proxy_open(req, proxy, type)


def proxy_of(url: str) -> str | None:
    """Return the proxy through which a URL is asked, without its credentials, or None."""
    parts = urllib.parse.urlsplit(url)
    if is_loopback(parts.netloc) or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    found = urllib.request.getproxies().get(parts.scheme)
    return None if not found else found.rpartition("@")[2].rpartition("//")[2]


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = MAX_REDIRECTS
    max_repeats = MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        place = without_query(req.full_url)
        check_url(newurl)
        if req.get_method() not in ("GET", "HEAD"):
            raise network_error("network.redirect", place, "no redirect of what is sent", f"one to {quoted(newurl)}")
        # urllib forwards every header but those that were added as unredirected: the credential is one of these. It
        # would also forward what belongs to the proxy.
        headers = {key: value for key, value in req.headers.items() if key.lower() != "proxy-authorization"}
        request = urllib.request.Request(newurl, headers=headers, method=req.get_method())  # noqa: S310  # as above
        request.origin_req_host = req.origin_req_host
        credential = req.unredirected_hdrs.get("Authorization")
        if credential is not None and origin(newurl) == origin(req.full_url):
            request.add_unredirected_header("Authorization", credential)
        return request


class _Arrived(io.BufferedReader):
    """A reader that returns the bytes that are there, so that the pace of a drip is seen.

    The base class would wait until it has as many bytes as the caller has room for.
    """

    def readinto(self, buffer: Any) -> int:
        return self.readinto1(buffer)


class _Response(http.client.HTTPResponse):
    """A response whose status and headers have to be there within the timeout, however slowly their bytes come."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = _Arrived(sock.makefile("rb", buffering=0), 2**16)
        self._socket = sock

    def begin(self) -> None:
        timeout = self._socket.gettimeout()
        if timeout is None:
            super().begin()
            return

        late = threading.Event()

        def end() -> None:
            late.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(timeout, end)
        timer.daemon = True
        timer.start()
        try:
            super().begin()
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise TimeoutError from error
            raise
        else:
            if late.is_set():  # an end within the headers is taken for the end of the headers
                raise TimeoutError
        finally:
            timer.cancel()
            del self._socket  # a reference would keep the connection open
        lengths = set(self.headers.get_all("Content-Length") or ())
        if len(lengths) > 1:
            raise http.client.HTTPException("several values of Content-Length")


class _HttpConnection(http.client.HTTPConnection):
    response_class = _Response


class _HttpsConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(context=context)
        self._own = context

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpsConnection, req, context=self._own)
