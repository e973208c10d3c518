"""A shard's graph in a session of onnxruntime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy
import onnxruntime

from splitbundle.backends.onnxruntime.cache import KVCache
from splitbundle.errors import BundleError, Problem
from splitbundle.format.graph import cache_names
from splitbundle.stages.call import Call
from splitbundle.storage.scales import check_scales, check_scales_in
from splitbundle.verification import onnx_rules

if TYPE_CHECKING:
    from splitbundle.format.manifest.document import Shard
    from splitbundle.storage.reader import BundleReader


_EXACT: Final = b"accuracy_level\x18\x04", b"accuracy_level\x18\x00"
"""An attribute of ``MatMulNBits`` as a graph has it (SB-O-021), and the one that rounds no factor, but is slower."""
FOLDER: Final = "session.model_external_initializers_file_folder_path"


class LoadedGraph:
    """A shard's graph in a session of onnxruntime."""

    def __init__(
        self, bundle: BundleReader, shard: Shard, options: Any, providers: Sequence[Any], *, exact: bool = False
    ) -> None:
        graph = shard.graph
        if graph is None:
            raise no_graph(bundle, f"shard {shard.name}")
        data = onnx_rules.read(bundle, shard, graph)
        if exact:
            data = data.replace(*_EXACT)
        if bundle.strict:  # onnxruntime copies the data that it needs and opens no file
            read: dict[str, Any] = {}
            for unit in shard.units:
                for path, (memory, found) in zip(bundle.manifest.units[unit], bundle.weight_bytes(unit), strict=True):
                    check_scales_in(bundle, path, memory, found)
                    read[path] = memory
            sizes = [len(memory) for memory in read.values()]
            options.add_external_initializers_from_files_in_memory(list(read), list(read.values()), sizes)
        else:
            for unit in shard.units:
                check_scales(bundle, unit)
            options.add_session_config_entry(FOLDER, _utf8(bundle.path))
        options.add_session_config_entry("session.load_model_format", "ONNX")  # the format that was checked
        with _refusals(graph.file):
            # onnxruntime's fallback would print to stdout, and would compute with a provider that was not requested.
            self.session = onnxruntime.InferenceSession(data, options, providers=list(providers), enable_fallback=0)
        asked = [provider[0] if isinstance(provider, tuple) else provider for provider in providers]
        if missing := [name for name in asked if name not in self.session.get_providers()]:
            expected = f"{missing[0]}, which was requested"
            got = f"{', '.join(self.session.get_providers())} alone: it couldn't be started here"
            raise BundleError(Problem(code="input.device", argument="providers", expected=expected, got=got))
        if not bundle.strict:
            bundle.locate_tensors(shard)  # check that onnxruntime opened this bundle's files, not newer ones
        self.name, self.file = shard.name, graph.file
        self.input = graph.inputs[0].name
        self.output = graph.outputs[0]
        self.head = shard.head
        names = cache_names(shard.layers)
        self.caches = {port.name: port.dtype for port in graph.inputs if port.name in names}
        """The names of the cache inputs -> their dtypes."""

    def __copy__(self) -> LoadedGraph:
        return self  # it is immutable, and threads may share it

    def __deepcopy__(self, memo: object) -> LoadedGraph:
        return self

    def __reduce__(self) -> NoReturn:
        expected, got = "a stage that stays in its process", "a pickle of a stage of onnxruntime"
        hint = "Send the bundle, which is pickled as its path, and load the stage there"
        raise BundleError(
            Problem(code="stage.copy", argument=f"stage {self.name}", expected=expected, got=got, hint=hint)
        )

    def run(self, x: numpy.ndarray, call: Call, cache: KVCache, selected: numpy.ndarray | None) -> numpy.ndarray:
        """Run the graph for one call, and extend the cache.

        *Shape:* token ids (batch, sequence) or hidden -> hidden (batch, sequence, hidden), or (selected, vocab).
        """
        binding = cache.binding(self.session, tuple(self.caches), call)
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
        with _refusals(self.file):
            self.session.run_with_iobinding(binding)
        return result


@contextlib.contextmanager
def _refusals(file: str) -> Iterator[None]:
    """Raise the errors of onnxruntime as ``stage.graph`` errors that name the file."""
    try:
        yield
    except Exception as error:  # onnxruntime's own errors derive directly from Exception
        if not type(error).__module__.startswith("onnxruntime") and not isinstance(error, (RuntimeError, ValueError)):
            raise
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        version = onnxruntime.__version__
        old = tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < (1, 25)
        hint = f"Graphs need onnxruntime 1.25 or later; this is {version}" if old else None
        problem = Problem(
            code="stage.graph", file=file, expected="a graph that onnxruntime can run", got=got, hint=hint
        )
        raise BundleError(problem) from error


def _utf8(path: Path) -> str:
    """Return a path as a string for onnxruntime, which needs UTF-8."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        hint = 'Move the bundle, or open it with verify="always"'
        expected = "a path in UTF-8, for onnxruntime"
        raise BundleError(
            Problem(code="file.unreadable", file=repr(str(path)), expected=expected, got="other bytes", hint=hint)
        ) from error
    return str(path)


def no_graph(bundle: BundleReader, what: str) -> BundleError:
    graphs = [f"{shard.name} [{shard.layers[0]}, {shard.layers[1]})" for shard in bundle.shards if shard.graph]
    maker = f"splitbundle_converter.{'resplit' if graphs else 'add_onnx'}"
    return BundleError(
        Problem(
            code="stage.graph",
            argument=what,
            expected=f"layers that shards' graphs compute: {', '.join(graphs)}" if graphs else "a graph a shard",
            got="none for them" if graphs else "a bundle without graphs",
            hint=f'{maker} makes them; backend="torch" computes any range',
        )
    )
