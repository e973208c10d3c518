"""A stage: a shard, or several in a row, loaded and ready to compute with onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import onnxruntime

from splitbundle import graph_rules
from splitbundle.calls import Call
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.graphs import cache_names
from splitbundle.onnxruntime_cache import KVCache
from splitbundle.stages import Given, LogitsWanted, StageSurface

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle, Selection
    from splitbundle.manifest import Shard


class Stage(StageSurface):
    """A part of the model. The first stage takes token ids, the others ``hidden``; the last one gives logits.

    It takes and gives numpy arrays, and computes in float32.
    """

    backend = "onnxruntime"
    array = "a numpy.ndarray"
    integer_dtypes = frozenset(("int64", "int32", "int16", "uint8", "int8"))
    dtype = "float32"
    device = "cpu"

    def __init__(self, bundle: Bundle, selection: Selection, graphs: Sequence[LoadedGraph]) -> None:
        self._describe(bundle, selection)
        self.graphs = tuple(graphs)

    def __repr__(self) -> str:
        return f"Stage({self.name}, layers [{self.layer_range[0]}, {self.layer_range[1]}), onnxruntime)"

    def _make_cache(self, batch_size: int, capacity: int) -> KVCache:
        return KVCache(self.architecture, self.layer_range, batch_size, capacity)

    def _given(self, array: object) -> Given | None:
        if not isinstance(array, numpy.ndarray):
            return None
        return Given(shape=array.shape, dtype=str(array.dtype), device=self.device)

    def _bounds(self, array: numpy.ndarray) -> tuple[int, int]:
        return int(array.min()), int(array.max())

    def _place(self) -> Given:
        return Given(shape=(), dtype=self.dtype, device=self.device)

    def _other_dtype(self) -> str:
        return "Convert it with .astype(numpy.float32)"

    def _check_cache(self, cache: KVCache) -> None:
        if not isinstance(cache, KVCache) or cache.layers != self.layer_range:
            got = f"one of layers {cache.layers}" if isinstance(cache, KVCache) else type(cache).__name__
            self._refuse("input.cache", "cache", f"a cache of layers {self.layer_range} for onnxruntime", got)

    def __call__(
        self,
        inputs: numpy.ndarray,
        *,
        past: Any = None,
        count: Any = None,
        cache: KVCache | None = None,
        logits: LogitsWanted = "all",
        positions: Call | None = None,
    ) -> numpy.ndarray:
        """Computes this stage for some tokens of each row.

        Row b's tokens are its first ``count[b]``; what follows is padding, and comes out as zeros.

        *Shape:* token ids (batch, sequence) of an integer dtype, or hidden (batch, sequence, hidden) in float32 ->
        hidden (batch, sequence, hidden), or logits (batch, k, vocab), in float32.

        Args:
            inputs: token ids for a stage that embeds, else the hidden states of the stage before.
            past: (batch) the positions that each row has behind it; by default 0. Needs a cache where it isn't 0.
            count: (batch) the tokens that each row brings; by default all of the sequence.
            cache: what ``cache()`` gave, to be extended by this call's tokens.
            logits: of which positions the last stage computes logits: "all", "last" (k = 1) or each row's last k,
                standing at the end; what a row lacks is zero.
            positions: what ``check`` gave for this call, in place of ``past`` and ``count``: checks nothing again.

        Raises:
            BundleError: ``input.*`` with the boundary's name, what was expected and what came.
        """
        call = (
            self.check(inputs, past=past, count=count, cache=cache, logits=logits) if positions is None else positions
        )
        length = inputs.shape[1]
        x = self._compute(inputs[:, : call.length], call, cache, self._logits_wanted(logits))
        short = length - call.length if not self.has_head or logits == "all" else 0
        return numpy.pad(x, ((0, 0), (0, short), (0, 0))) if short else x

    def _compute(self, x: numpy.ndarray, call: Call, cache: KVCache | None, wanted: int | None) -> numpy.ndarray:
        batch, width = len(x), self.architecture.vocab_size if self.has_head else self.architecture.hidden_size
        places, valid = _selected(call, wanted) if self.has_head else (None, None)
        if not any(call.count):  # no row brings a token: there is nothing to compute, and nothing to attend to
            return numpy.zeros((batch, wanted or call.length, width), numpy.float32)
        own = cache if cache is not None else KVCache(self.architecture, self.layer_range, batch, call.stop)
        own.make_room(call)
        for graph in self.graphs:
            x = graph.run(x, call, own, places)
        if cache is not None:
            cache.advance(call)
        if self.has_head:
            shape = (batch, wanted or call.length, width)
            if valid is None:
                return x.reshape(shape)
            spread = numpy.zeros(shape, numpy.float32)
            spread[valid] = x
            return spread
        if call.padded:
            x[numpy.arange(call.length)[None] >= numpy.array(call.count)[:, None]] = 0
        return x


def _selected(call: Call, wanted: int | None) -> tuple[numpy.ndarray, numpy.ndarray | None]:
    """Which tokens logits are computed of, counted through all rows, and where they stand (None: one after another).

    *Shape:* (selected), int64; (batch, k), bool.
    """
    batch, length = len(call.past), call.length
    if wanted is None:
        offsets = numpy.broadcast_to(numpy.arange(length), (batch, length))
    else:
        offsets = numpy.array(call.count)[:, None] + numpy.arange(-wanted, 0)[None]
    valid = (offsets >= 0) & (offsets < numpy.array(call.count)[:, None])
    places = offsets + numpy.arange(batch)[:, None] * length
    return places[valid].astype(numpy.int64), None if valid.all() else valid


class LoadedGraph:
    """A shard's graph in a session of onnxruntime."""

    def __init__(self, bundle: Bundle, shard: Shard, options: Any, providers: Sequence[Any]) -> None:
        graph = shard.graph
        if graph is None:
            raise _no_graph(bundle, f"shard {shard.name}")
        data = graph_rules.read(bundle, shard, graph)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=list(providers))
        except Exception as error:  # its errors derive from Exception alone
            if not type(error).__module__.startswith("onnxruntime"):
                raise
            got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            expected = "a graph that onnxruntime can run"
            raise BundleError(Problem(code="stage.graph", file=graph.file, expected=expected, got=got)) from error
        self.input = graph.inputs[0].name
        self.output = graph.outputs[0]
        self.head = shard.head
        self.caches = cache_names(shard.layers)

    def run(self, x: numpy.ndarray, call: Call, cache: KVCache, selected: numpy.ndarray | None) -> numpy.ndarray:
        """*Shape:* token ids (batch, sequence) or hidden -> hidden (batch, sequence, hidden), or (selected, vocab)."""
        binding = cache.binding(self.session, self.caches)
        given = {self.input: x, "past": call.past, "count": call.count}
        sizes = {"batch": len(x), "sequence": x.shape[1]}
        if self.head and selected is not None:
            given["selected"], sizes["selected"] = selected, len(selected)
        kept = []
        for name, value in given.items():
            array = numpy.ascontiguousarray(value, numpy.float32 if name == "hidden" else numpy.int64)
            kept.append(array)
            binding.bind_cpu_input(name, array)
        result = numpy.empty(
            [size if isinstance(size, int) else sizes[size] for size in self.output.shape], numpy.float32
        )
        binding.bind_output(self.output.name, "cpu", 0, numpy.float32, result.shape, result.ctypes.data)
        self.session.run_with_iobinding(binding)
        return result


def _no_graph(bundle: Bundle, what: str) -> BundleError:
    graphs = [f"{shard.name} [{shard.layers[0]}, {shard.layers[1]})" for shard in bundle.shards if shard.graph]
    return BundleError(
        Problem(
            code="stage.graph",
            argument=what,
            expected=f"layers that shards' graphs compute: {', '.join(graphs)}" if graphs else "a graph a shard",
            got="none for them" if graphs else "a bundle without graphs",
            hint='splitbundle add-onnx BUNDLE adds graphs; backend="torch" computes any range',
        )
    )


def load_stages(
    bundle: Bundle,
    selections: Sequence[Selection],
    *,
    providers: Sequence[Any] | None = None,
    threads: int | None = None,
    prepack: bool = False,
) -> list[Stage]:
    """Stages over graphs, and the weight files that those read where they lie. See ``Bundle.stage``.

    Raises:
        BundleError: ``stage.graph`` for a range that isn't that of one shard's graph, or of several in a row.
    """
    available = onnxruntime.get_available_providers()
    chosen = ["CPUExecutionProvider"] if providers is None else list(providers)
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
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            if threads is not None:
                options.intra_op_num_threads = threads
            if not prepack:
                options.add_session_config_entry("session.disable_prepacking", "1")
            graphs.append(LoadedGraph(bundle, shard, options, chosen))
        stages.append(Stage(bundle, selection, graphs))
    return stages


def _shards_of(bundle: Bundle, selection: Selection) -> list[Shard]:
    """The shards that make up a selection."""
    start, stop = selection.layers
    inside = [shard for shard in bundle.shards if start <= shard.layers[0] and shard.layers[1] <= stop]
    # An empty shard at an end belongs to the selection only if that has the end too.
    inside = [
        s for s in inside if s.layers[0] < s.layers[1] or (s.embeds and selection.embeds) or (s.head and selection.head)
    ]
    whole = bool(inside) and inside[0].layers[0] == start and inside[-1].layers[1] == stop
    ends = whole and inside[0].embeds == selection.embeds and inside[-1].head == selection.head
    if not ends or any(shard.graph is None for shard in inside):
        raise _no_graph(bundle, f"layers [{start}, {stop})")
    return inside
