"""What a hop to a stage server costs: a message that computes nothing, and steps of some sizes."""

from __future__ import annotations

import statistics
import time
from typing import Final

from splitbundle.records import record
from splitbundle.remote.peers import Peer
from splitbundle.wire import frames
from splitbundle.wire.encodings import payload_bytes
from splitbundle.wire.messages import PROTOCOL, Hello, Ran, Run, Welcome

TOKENS: Final = (1, 64)
"""The tokens of the steps: one of decoding, and a short prompt."""


@record(frozen=True, slots=True, kw_only=True)
class Hop:
    """The costs of steps of one size, as medians in microseconds."""

    tokens: int
    bytes: int
    """The bytes of the payload, which go there and come back."""
    total: float
    """From the request to the answer."""
    queued: float
    """How long the step waited for others, at the server."""
    computed: float
    """How long the stage computed."""

    @property
    def wire(self) -> float:
        """Return the rest: the network, TLS and gRPC."""
        return self.total - self.queued - self.computed


@record(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a server is, and what a hop to it costs."""

    welcome: Welcome
    hello: float
    """The median time of a message that computes nothing, in microseconds."""
    hops: tuple[Hop, ...]


def measure(peer: Peer, repeats: int, timeout: float) -> Measured:
    """Measure a server. The first message of each kind isn't counted, because it connects or warms up.

    Args:
        peer: the server.
        repeats: how often to measure a message.
        timeout: the seconds to wait for each answer.

    Raises:
        Lost: the server doesn't answer.
        BundleError: ``peer.*``, and what the server refuses.
    """
    welcome = peer.connect(timeout)
    times: list[float] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        peer.ask(Hello(protocol=PROTOCOL, fingerprint=None, layers=None), (), timeout)
        times.append((time.perf_counter() - began) * 1e6)
    hops = tuple(_hop(peer, welcome, tokens, repeats, timeout) for tokens in TOKENS)
    return Measured(welcome=welcome, hello=statistics.median(times[1:]), hops=hops)


def _hop(peer: Peer, welcome: Welcome, tokens: int, repeats: int, timeout: float) -> Hop:
    size = payload_bytes(welcome.dtype, tokens, welcome.width)
    message = Run(
        session=None,
        number=0,
        past=(0,),
        count=(tokens,),
        sequence=tokens,
        width=welcome.width,
        encoding=welcome.dtype,
    )
    frame = frames.pack(message, (bytes(size),))
    found: list[tuple[float, int, int]] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        answer, _payload = peer.exchange(message, frame, timeout)
        if not isinstance(answer, Ran):
            raise RuntimeError("exchange returned another kind of answer")
        found.append(((time.perf_counter() - began) * 1e6, answer.queued, answer.computed))
    total, queued, computed = (statistics.median(column) for column in zip(*found[1:], strict=True))
    return Hop(tokens=tokens, bytes=size, total=total, queued=queued, computed=computed)
