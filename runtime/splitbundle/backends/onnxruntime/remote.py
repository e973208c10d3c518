"""A stage of another machine, over numpy arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from splitbundle.backends.onnxruntime.arrays import ArrayStage
from splitbundle.backends.onnxruntime.payloads import decode, encode
from splitbundle.remote.link import Link, RemoteCache
from splitbundle.stages.call import Call
from splitbundle.stages.stage import LogitsWanted

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.remote.options import RemoteOptions
    from splitbundle.remote.peers import Peers
    from splitbundle.storage.reader import BundleReader


class RemoteStage(ArrayStage):
    """A part of the model that a server computes. It is called like a stage of this machine."""

    takes_rows = True

    def __init__(self, bundle: BundleReader, selection: Selection, peers: Peers, options: RemoteOptions) -> None:
        """Connect to a server.

        Raises:
            BundleError: ``peer.*``.
        """
        self.describe(bundle, selection)
        self.link = Link(peers, options)

    def __repr__(self) -> str:
        return f"RemoteStage({self.name}, layers [{self.layer_range[0]}, {self.layer_range[1]}))"

    @property
    def where(self) -> str:
        """Return the addresses of the servers."""
        return self.link.where

    def _make_cache(self, batch_size: int, capacity: int) -> RemoteCache:
        return RemoteCache(self.architecture, self.layer_range, batch_size, capacity)

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, RemoteCache) or cache.layers != self.layer_range:
            expected = f"a cache of layers {self.layer_range} on a server"
            got = f"one of layers {cache.layers}" if isinstance(cache, RemoteCache) else type(cache).__name__
            self._refuse("input.cache", "cache", expected, got)

    def __call__(
        self,
        inputs: numpy.ndarray,
        *,
        past: Any = None,
        count: Any = None,
        cache: RemoteCache | None = None,
        logits: LogitsWanted = "all",
        rows: Any = None,
        positions: Call | None = None,
    ) -> numpy.ndarray:
        """Compute the stage on a server. Arguments, results and errors are those of a stage of this machine.

        *Shape:* hidden (batch, sequence, hidden) in float32 -> the same.

        Raises:
            BundleError: ``peer.unreachable`` if no server answers in time; ``wire.value``; ``input.*``.
        """
        call = positions
        if call is None:
            call = self.check(inputs, past=past, count=count, cache=cache, logits=logits, rows=rows)
        x = inputs[:, : call.length]
        result = numpy.zeros_like(x) if not any(call.count) else self._compute(x, call, cache)
        short = inputs.shape[1] - call.length
        return numpy.pad(result, ((0, 0), (0, short), (0, 0))) if short else result

    def _compute(self, x: numpy.ndarray, call: Call, cache: RemoteCache | None) -> numpy.ndarray:
        pieces = self.link.pieces(call, cache)
        parts = [self._piece(x[:, start : start + each.length], each, cache) for start, each in pieces]
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts, axis=1)

    def _piece(self, x: numpy.ndarray, call: Call, cache: RemoteCache | None) -> numpy.ndarray:
        encoding = self.link.encoding
        payload = self.link.run(call, encode(x, call.count, encoding), cache, call.length)
        if cache is not None:
            cache.advance(call)
        return decode(payload, encoding, call.count, call.length, self.link.welcome.width)
