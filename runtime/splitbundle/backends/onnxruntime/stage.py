"""A stage that computes with onnxruntime: one loaded shard, or several consecutive ones."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy
import onnxruntime

from splitbundle import processors
from splitbundle.backends.onnxruntime.arrays import ArrayStage
from splitbundle.backends.onnxruntime.cache import KVCache
from splitbundle.backends.onnxruntime.graph import LoadedGraph, no_graph
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.graph import VARIANTS
from splitbundle.integers import as_integer
from splitbundle.stages.call import Call
from splitbundle.stages.stage import LogitsWanted

if TYPE_CHECKING:
    from splitbundle.format.manifest.document import Shard
    from splitbundle.format.selection import Selection
    from splitbundle.storage.reader import BundleReader

MAX_THREADS: Final = 1024
SPINNING: Final = 50
"""The microseconds for which a thread waits for more work before it sleeps."""
_BOUNDED_SPINNING: Final = (1, 26)
"""The first version of onnxruntime that can limit this time."""
PIECE: int = 512
"""The number of tokens, over all rows, that a graph computes at once.

The attention scores of a whole long prompt would fill the memory, and half of them are for slots that a token doesn't
see (``spec/decisions/0009``)."""
_Pieces = Sequence[tuple[int, Call]]


class Stage(ArrayStage):
    """A part of the model.

    The first stage takes token ids, and the others take ``hidden``. The last stage returns logits, and the others
    return ``hidden``. Hidden states and logits are numpy arrays in float32. The graphs decide the dtype of the
    computation.
    """

    takes_rows = True
    integer_dtypes = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
    dtype = "float32"
    device = "cpu"

    def __init__(self, bundle: BundleReader, selection: Selection, graphs: Sequence[LoadedGraph]) -> None:
        self.describe(bundle, selection)
        self.graphs = tuple(graphs)
        self._cache_dtypes = {name: dtype for graph in self.graphs for name, dtype in graph.caches.items()}

    def __repr__(self) -> str:
        return f"Stage({self.name}, layers [{self.layer_range[0]}, {self.layer_range[1]}), onnxruntime)"

    def _make_cache(self, batch_size: int, capacity: int) -> KVCache:
        return KVCache(self.architecture, self.layer_range, batch_size, capacity, self._cache_dtypes)

    def _check_cache(self, cache: KVCache) -> None:
        own = self.layer_range, self._cache_dtypes
        if not isinstance(cache, KVCache) or (cache.layers, cache.dtypes) != own:
            got = f"one of {_said(cache.layers, cache.dtypes)}" if isinstance(cache, KVCache) else type(cache).__name__
            self._refuse("input.cache", "cache", f"a cache of {_said(*own)} for onnxruntime", got)

    def __call__(
        self,
        inputs: numpy.ndarray,
        *,
        past: Any = None,
        count: Any = None,
        cache: KVCache | None = None,
        logits: LogitsWanted = "all",
        rows: Any = None,
        positions: Call | None = None,
    ) -> numpy.ndarray:
        """Compute this stage for some tokens of each row.

        The tokens of row b are its first ``count[b]``. The rest is padding, and its results are zeros.

        *Shape:* token ids (batch, sequence) of an integer dtype, or hidden (batch, sequence, hidden) in float32 ->
        hidden (batch, sequence, hidden), or logits (batch, k, vocab), in float32.

        Args:
            inputs: token ids for a stage that embeds, else the hidden states from the stage before.
            past: (batch) the number of earlier positions of each row; by default 0. Any other value needs a cache.
            count: (batch) the number of tokens of each row in this call; by default the whole sequence.
            cache: a cache from ``cache()``. This call adds its tokens to the cache.
            logits: the positions for which the last stage computes logits: "all", "last" (k = 1), or an integer k for
                the last k of each row. A row with fewer tokens starts with zeros.
            rows: (batch) the rows of the cache that this call computes: its row i is the cache's row ``rows[i]``.
                They are distinct numbers from 0 in any order; by default all rows in order. The other rows stay as
                they are, and cost no time.
            positions: the result of ``check`` for this call. It replaces ``past``, ``count`` and ``rows``, and the
                call is not checked again.

        Raises:
            BundleError: ``input.*`` with the name of the boundary, the expected value and the given one.
        """
        call = positions
        if call is None:
            call = self.check(inputs, past=past, count=count, cache=cache, logits=logits, rows=rows)
        length = inputs.shape[1]
        x = self._compute(inputs[:, : call.length], call, cache, self._logits_wanted(logits))
        short = length - call.length if not self.has_head or logits == "all" else 0
        return numpy.pad(x, ((0, 0), (0, short), (0, 0))) if short else x

    def _compute(self, x: numpy.ndarray, call: Call, cache: KVCache | None, wanted: int | None) -> numpy.ndarray:
        batch = len(x)
        if not any(call.count):  # no row has a token: there is nothing to compute or to attend to
            width = self.architecture.vocab_size if self.has_head else self.architecture.hidden_size
            return numpy.zeros((batch, wanted or call.length, width), numpy.float32)
        own = cache if cache is not None else self._make_cache(batch, call.stop)
        call = own.arrange(call)
        x, placed = x if call.order is None else x[list(call.order)], call.placed
        pieces = [(0, placed)] if own.rescales(call) else list(placed.pieces(max(PIECE // batch, 1)))
        result = self._logits(x, pieces, own, call, wanted) if self.has_head else self._hidden(x, pieces, own, call)
        if cache is not None:
            cache.advance(call)
        return result

    def _hidden(self, x: numpy.ndarray, pieces: _Pieces, cache: KVCache, call: Call) -> numpy.ndarray:
        """Compute hidden states, in the order of the call. ``x`` and ``pieces`` have the order of the cache.

        *Shape:* (batch, sequence) or hidden -> (batch, sequence, hidden), zero at padding.
        """
        parts = [self._run(x[:, start : start + piece.length], piece, cache) for start, piece in pieces]
        hidden = parts[0] if len(parts) == 1 else numpy.concatenate(parts, axis=1)
        hidden = hidden if call.order is None else hidden[numpy.argsort(call.order)]
        if call.padded:
            hidden[numpy.arange(call.length)[None] >= numpy.array(call.count)[:, None]] = 0
        return hidden

    def _logits(
        self, x: numpy.ndarray, pieces: _Pieces, cache: KVCache, call: Call, wanted: int | None
    ) -> numpy.ndarray:
        """Compute logits, in the order of the call. ``x`` and ``pieces`` have the order of the cache.

        *Shape:* (batch, sequence) or hidden -> (batch, k, vocab), zero where a row has no token.
        """
        count = numpy.array(call.count)[:, None]
        offsets = numpy.arange(call.length)[None] if wanted is None else count + numpy.arange(-wanted, 0)[None]
        valid = (offsets >= 0) & (offsets < count)  # (batch, k)
        logits = numpy.zeros((*valid.shape, self.architecture.vocab_size), numpy.float32)
        for start, piece in pieces:
            here = valid & (offsets >= start) & (offsets < start + piece.length)
            rows, places = numpy.nonzero(here)
            lines = rows if call.order is None else numpy.argsort(call.order)[rows]
            selected = lines * piece.length + numpy.broadcast_to(offsets, here.shape)[rows, places] - start
            part = self._run(x[:, start : start + piece.length], piece, cache, selected)
            if here.all():  # all in one piece and in order: the logits may be large, so don't copy them
                logits = part.reshape(logits.shape)
            else:
                logits[rows, places] = part
        return logits

    def _run(
        self, x: numpy.ndarray, call: Call, cache: KVCache, selected: numpy.ndarray | None = None
    ) -> numpy.ndarray:
        cache.make_room(call)
        for graph in self.graphs:
            x = graph.run(x, call, cache, selected)
        return x


def _said(layers: tuple[int, int], dtypes: Mapping[str, str]) -> str:
    return f"layers {layers}" + "".join(f" in {dtype}" for dtype in sorted(set(dtypes.values())))


def load_stages(
    bundle: BundleReader,
    selections: Sequence[Selection],
    *,
    dtype: str | None = None,
    providers: Sequence[Any] | None = None,
    threads: int | None = None,
    prepack: bool = False,
    exact: bool = False,
) -> list[Stage]:
    """Load stages over graphs, which read the weight files in place. See ``Bundle.stage``.

    With ``exact``, products with ``blocks4`` don't round what they multiply by. They are slower.

    Raises:
        BundleError: ``stage.graph`` if the graphs of one shard, or of several consecutive shards, don't cover exactly
            the range; ``input.dtype`` for any dtype except that of the graphs.
    """
    usable = processors.usable()
    # onnxruntime's own number is that of the machine's cores, which is right unless this process may use fewer.
    number = as_integer(threads) if threads is not None else usable if usable < (os.cpu_count() or 1) else None
    if threads is not None and (number is None or not 1 <= number <= MAX_THREADS):
        expected = f"1 to {MAX_THREADS}"
        raise BundleError(Problem(code="input.value", argument="threads", expected=expected, got=quoted(threads)))
    available = onnxruntime.get_available_providers()
    chosen = ["CPUExecutionProvider"] if providers is None else [] if isinstance(providers, str) else list(providers)
    if not chosen:
        expected = f"a list of some of {', '.join(available)}"
        raise BundleError(Problem(code="input.device", argument="providers", expected=expected, got=quoted(providers)))
    for provider in chosen:
        name = provider[0] if isinstance(provider, tuple) else provider
        if name not in available:
            expected = f"some of {', '.join(available)}"
            raise BundleError(Problem(code="input.device", argument="providers", expected=expected, got=quoted(name)))
    stages = []
    for selection in selections:
        shards = _shards_of(bundle, selection)
        graphs = []
        for shard in shards:
            _check_dtype(shard, dtype)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            for entry, value in _waiting().items():
                options.add_session_config_entry(entry, value)
            if number is not None:
                options.intra_op_num_threads = number
            # Products with quantized weights are ten times as slow without their copy of the weights.
            if not prepack and not bundle.manifest.storage.encodings:
                options.add_session_config_entry("session.disable_prepacking", "1")
            graphs.append(LoadedGraph(bundle, shard, options, chosen, exact=exact))
        stages.append(Stage(bundle, selection, graphs))
    return stages


def _waiting() -> dict[str, str]:
    """Return the options for how the threads of a session wait for work.

    By default they spin for up to half a second, and take CPU time from other processes and from the session of the
    next shard. If they sleep at once, each product waits until they have woken up. ``spec/decisions/0016`` has what
    that costs. ``OMP_WAIT_POLICY=PASSIVE``, which the commands set, says the same to torch.
    """
    number = re.match(r"(\d+)\.(\d+)", onnxruntime.__version__)
    bounded = number is not None and (int(number[1]), int(number[2])) >= _BOUNDED_SPINNING
    if not bounded or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return {"session.intra_op.allow_spinning": "0"}
    return {"session.intra_op.spin_duration_us": str(SPINNING)}


def _check_dtype(shard: Shard, wanted: str | None) -> None:
    own = None if shard.graph is None else VARIANTS[shard.graph.variant]
    if own is not None and wanted not in (None, own):
        expected = f"{own}, in which the graph of shard {shard.name} computes"
        hint = (
            "splitbundle_converter.add_onnx with variant= writes graphs in another dtype; torch computes in any dtype"
        )
        raise BundleError(
            Problem(code="input.dtype", argument="dtype", expected=expected, got=quoted(wanted), hint=hint)
        )


def _shards_of(bundle: BundleReader, selection: Selection) -> list[Shard]:
    """Return the shards that make up a selection."""
    start, stop = selection.layers
    inside = [shard for shard in bundle.shards if start <= shard.layers[0] and shard.layers[1] <= stop]
    # A shard without layers belongs to the selection only if the selection also has its end: embedding or head.
    inside = [
        s for s in inside if s.layers[0] < s.layers[1] or (s.embeds and selection.embeds) or (s.head and selection.head)
    ]
    whole = bool(inside) and inside[0].layers[0] == start and inside[-1].layers[1] == stop
    ends = whole and inside[0].embeds == selection.embeds and inside[-1].head == selection.head
    if not ends or any(shard.graph is None for shard in inside):
        raise no_graph(bundle, f"layers [{start}, {stop})")
    return inside
