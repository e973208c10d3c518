"""A proxy of TCP that records what a client sends, and searches it for a text and for token ids."""

from __future__ import annotations

import base64
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Final

WINDOW: Final = 3
"""The ids in a row that are looked for. One id alone is a few bytes, which hidden states may have by chance."""
SHORTEST_WORD: Final = 5


class RecordingProxy:
    """Stands before a server at a loopback address. It is a context manager.

    Attributes:
        url: the address to give to clients.
        sent: what clients have sent, a connection after another.
    """

    def __init__(self, target: str) -> None:
        parts = urllib.parse.urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._connections: list[bytearray] = []
        self._open: list[socket.socket] = []

    @property
    def sent(self) -> list[bytes]:
        """Return what each connection has sent so far."""
        return [bytes(data) for data in self._connections]

    def __enter__(self) -> RecordingProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
                self._open.append(client)
                server = socket.create_connection(self._target)
            except OSError:  # this proxy, or the server, has ended
                return
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open.append(server)
            record = bytearray()
            self._connections.append(record)
            threading.Thread(target=self._pass, args=(client, server, record), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, None), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, record: bytearray | None) -> None:
        try:
            while data := one.recv(2**16):
                if record is not None:
                    record += data
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            return


def traces(text: str, ids: Sequence[int]) -> Iterator[tuple[str, bytes]]:
    """Yield the forms in which a text or its ids could travel, each with a name: whole, and in pieces."""
    words = [word for word in re.findall(r"\w+", text) if len(word) >= SHORTEST_WORD]
    assert words, "a text without long words can't be searched for"
    for piece in dict.fromkeys((text, *words)):
        for name in ("utf-8", "utf-16-le", "utf-16-be"):
            yield name, piece.encode(name)
        if urllib.parse.quote(piece) != piece:
            yield "url", urllib.parse.quote(piece).encode()
        yield "hex", piece.encode().hex().encode()
        for before in range(3):  # base64 has three forms of a text, by the bytes before it
            coded = base64.b64encode(b"\0" * before + piece.encode())
            yield "base64", coded[-(-before * 8 // 6) : len(coded) // 4 * 4 - 4]
    for start in range(len(ids) - WINDOW + 1):
        run = ids[start : start + WINDOW]
        for form in "hHiq":
            if max(run) < 2 ** (8 * struct.calcsize(form) - (form != "H")):
                for order in "<>":
                    yield f"ids as {order}{form}", struct.pack(f"{order}{len(run)}{form}", *run)
        for between in (",", ", ", " "):
            yield "ids in decimal", between.join(map(str, run)).encode()


def found_in(data: Sequence[bytes], text: str, ids: Sequence[int], before: Sequence[bytes] = ()) -> list[str]:
    """Return the names of the forms of a text or its ids that some data has.

    Args:
        data: what was sent.
        text: the text.
        ids: its ids.
        before: what was sent before anyone wrote the text. A word that is in there, such as in the name of a header,
            tells nothing.
    """
    forms = [(name, form) for name, form in traces(text, ids) if len(form) >= SHORTEST_WORD]
    telling = [(name, form) for name, form in forms if not any(form in each for each in before)]
    return sorted({name for name, form in telling if any(form in each for each in data)})
