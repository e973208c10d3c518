"""The backends: the options of each, and their modules, which are imported on first use."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypedDict

from splitbundle import processors  # noqa: F401  # it prepares for a fork
from splitbundle.errors import BundleError, MissingExtra, Problem, broken_library, quoted

if TYPE_CHECKING:
    from splitbundle.comparison.documents import UnitPair
    from splitbundle.comparison.records import Values
    from splitbundle.stages import golden
    from splitbundle.storage.files import Progress
    from splitbundle.storage.reader import BundleReader

BACKENDS: Final = ("torch", "onnxruntime")


class _CommonOptions(TypedDict, total=False):
    dtype: str | None
    threads: int | None


class _TorchOnly(TypedDict, total=False):
    device: str | None
    trainable: bool
    kernels: str | None
    checkpoint_activations: bool
    dropout: Mapping[str, float] | str | None


class _OnnxRuntimeOnly(TypedDict, total=False):
    providers: Sequence[Any] | None
    prepack: bool


class TorchOptions(_CommonOptions, _TorchOnly, total=False):
    """The options of the backend torch. ``Bundle.stage`` explains each."""


class OnnxRuntimeOptions(_CommonOptions, _OnnxRuntimeOnly, total=False):
    """The options of the backend onnxruntime. ``Bundle.stage`` explains each."""


class AllOptions(_CommonOptions, _TorchOnly, _OnnxRuntimeOnly, total=False):
    """The options of every backend, for a call that names its backend by a variable."""


class _RemoteOptions(TypedDict, total=False):
    tls: str | os.PathLike[str] | None
    token: str | None
    wire: str | None
    replay: str | None
    timeout: float | None
    step_timeout: float | None
    insecure: bool | None
    same_weights: bool | None


class RemoteStageOptions(_RemoteOptions, total=False):
    """The options of a stage of another machine. ``Bundle.stage`` explains each."""

    device: str | None
    trainable: bool


class RemotePipelineOptions(_CommonOptions, _TorchOnly, _OnnxRuntimeOnly, _RemoteOptions, total=False):
    """The options of a pipeline with stages of other machines. ``Bundle.stage`` explains each."""


OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "torch": tuple(TorchOptions.__annotations__),
    "onnxruntime": tuple(OnnxRuntimeOptions.__annotations__),
}
"""The options of each backend. An option that is None or False counts as not given."""
LIBRARIES: Final = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "numpy")}


def own_options(backend: str, given: Mapping[str, Any], call: str, others: Iterable[str] = ()) -> dict[str, Any]:
    """Return the options for one backend from the options of a call.

    Args:
        backend: the backend.
        given: every option of the call.
        call: the name of the called method, for errors.
        others: the other backends of a mixed pipeline. Their options are allowed too.

    Raises:
        BundleError: ``stage.backend`` for an unknown backend, or for an option of another backend.
        TypeError: for an option that no backend has.
    """
    for name in given:
        if not any(name in known for known in OPTIONS.values()):
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise BundleError(
            Problem(code="stage.backend", argument="backend", expected=" or ".join(BACKENDS), got=quoted(backend))
        )
    others = set(others)
    known = {name for used in (backend, *others) for name in OPTIONS.get(used, ())}
    chosen = {name: given[name] for names in OPTIONS.values() for name in names if not _unset(given.get(name))}
    if backend == "onnxruntime" and "torch" in others:
        chosen.pop("dtype", None)  # in a mixed pipeline it is for torch: a graph has its own dtype
    for name, value in chosen.items():
        if name not in known:
            hint = f"It is an option of another backend; {backend} has {', '.join(OPTIONS[backend])}"
            raise BundleError(
                Problem(code="stage.backend", argument=name, expected="nothing", got=quoted(value), hint=hint)
            )
    return {name: value for name, value in chosen.items() if name in OPTIONS[backend]}


def _unset(value: object) -> bool:
    return value is None or value is False  # not a truth test: a device may be 0


def module(backend: str, name: str) -> ModuleType:
    """Return a module of a backend, and import it on first use.

    Args:
        backend: the backend.
        name: the name of a file in the backend's folder, or of one in torch's folder ``training``. ``_import`` lists
            them.
    """
    full = f"splitbundle.backends.{backend}.{name}"
    known = sys.modules.get(full)
    if known is not None and not getattr(known.__spec__, "_initializing", False):  # another thread may be at it
        return known
    try:
        with warnings.catch_warnings():
            # torch warns about this if numpy is missing, which is normal when torch is installed alone.
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
            return _import(backend, name)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name in LIBRARIES[backend]:
            raise MissingExtra.of(backend, backend, f'compute with backend="{backend}"') from None
        broken = broken_library(error, LIBRARIES[backend])
        if broken is None:
            raise
        raise broken from error


def _import(backend: str, name: str) -> ModuleType:
    """Import a module by a statement that names it: tools that freeze an app find modules by such statements."""
    if backend == "torch":
        if name == "golden":
            from splitbundle.backends.torch import golden as torch_golden

            return torch_golden
        if name == "stage":
            from splitbundle.backends.torch import stage as torch_stage

            return torch_stage
        if name == "saving" or name.startswith("training."):
            from splitbundle.backends.torch import saving
            from splitbundle.backends.torch.training import checkpoints, helpers, lora_files

            own = {"saving": saving, "training.checkpoints": checkpoints, "training.helpers": helpers}
            return own.get(name, lora_files)
        if name in ("quantizing", "quantization_report"):
            from splitbundle.backends.torch import quantization_report, quantizing

            return quantizing if name == "quantizing" else quantization_report
        if name in ("remote", "served", "served_training"):
            from splitbundle.backends.torch import remote, served, served_training

            return {"remote": remote, "served": served, "served_training": served_training}[name]
        if name in ("tensors", "payloads"):
            from splitbundle.backends.torch import payloads, tensors

            return tensors if name == "tensors" else payloads
        if name == "differences":
            from splitbundle.backends.torch import differences

            return differences
        if name in ("kernels", "kernel_choice", "threads"):
            from splitbundle.backends.torch import kernel_choice, kernels, threads

            return {"kernels": kernels, "kernel_choice": kernel_choice, "threads": threads}[name]
        from splitbundle.backends.torch import pipeline as torch_pipeline

        return torch_pipeline
    if name == "golden":
        from splitbundle.backends.onnxruntime import golden as onnxruntime_golden

        return onnxruntime_golden
    if name in ("arrays", "payloads"):
        from splitbundle.backends.onnxruntime import arrays
        from splitbundle.backends.onnxruntime import payloads as onnxruntime_payloads

        return arrays if name == "arrays" else onnxruntime_payloads
    if name in ("remote", "served"):
        from splitbundle.backends.onnxruntime import remote as onnxruntime_remote
        from splitbundle.backends.onnxruntime import served as onnxruntime_served

        return onnxruntime_remote if name == "remote" else onnxruntime_served
    if name == "stage":
        from splitbundle.backends.onnxruntime import stage as onnxruntime_stage

        return onnxruntime_stage
    from splitbundle.backends.onnxruntime import pipeline as onnxruntime_pipeline

    return onnxruntime_pipeline


def mixed_pipeline(bundle: BundleReader, own: Mapping[str, str], given: Mapping[str, Any]) -> Any:
    """Return a pipeline with stages of several backends.

    ``own`` maps the name of a shard to its backend. torch computes the other shards.

    Raises:
        BundleError: as for ``Bundle.pipeline``.
    """
    for shard in own:
        bundle.shard(shard)
    backend_of = {shard.name: own.get(shard.name, "torch") for shard in bundle.shards}
    stages: dict[str, Any] = {}
    for used in dict.fromkeys(backend_of.values()):
        named = [shard for shard, its in backend_of.items() if its == used]
        selections = [bundle.select(shard) for shard in named]
        chosen = own_options(used, given, "pipeline", others=backend_of.values())
        loaded = module(used, "stage").load_stages(bundle, selections, **chosen)
        stages |= dict(zip(named, loaded, strict=True))
    last = module("onnxruntime" if "onnxruntime" in backend_of.values() else "torch", "pipeline")
    return last.Pipeline([stages[shard.name] for shard in bundle.shards])


def run_golden(
    bundle: BundleReader, shard: str | None, backend: str, threads: int | None, progress: Progress | None
) -> list[golden.Difference]:
    """Compute the golden vectors and compare the results with the original model. See ``Bundle.run_vectors``.

    The backend "all" means every backend. Their results are also compared with each other.

    Raises:
        BundleError: ``stage.backend``, ``vectors.none``; the errors of loading.
    """
    if backend != "all":
        own_options(backend, {}, "run_vectors")
        differences: list[golden.Difference] = module(backend, "golden").run_vectors(bundle, shard, threads, progress)
        return differences
    return _run_both(bundle, shard, threads, progress)


def _run_both(
    bundle: BundleReader, shard: str | None, threads: int | None, progress: Progress | None
) -> list[golden.Difference]:
    """Compare each backend with the original model, and then the two backends with each other."""
    from splitbundle.stages import golden  # imported here because opening a bundle doesn't need it

    torch, onnxruntime = (module(backend, "stage").load_stages for backend in BACKENDS)
    arrays = module("onnxruntime", "golden")
    tensors = {} if bundle.manifest.vectors is None else arrays.read_golden(bundle)
    # As each backend compares its own vectors: without the rounding of fast products with quantized weights.
    kernels = "torch" if bundle.manifest.storage.encodings else None
    torch_outputs = golden.compute(
        bundle,
        shard,
        tensors,
        lambda part: torch(bundle, [part], dtype="float32", threads=threads, kernels=kernels)[0].over_numpy(),
        progress,
    )
    outputs = golden.compute(
        bundle, shard, tensors, lambda part: onnxruntime(bundle, [part], threads=threads, exact=True)[0], progress
    )
    side = golden.side(bundle)
    original, tolerance = golden.original_outputs(tensors, outputs), arrays.tolerance(bundle)
    return [
        *golden.compare(torch_outputs, original, ("torch", side), tensors),
        *golden.compare(outputs, original, ("onnxruntime", side), tensors, tolerance),
        *golden.compare(outputs, torch_outputs, ("onnxruntime", "torch"), tensors, tolerance),
    ]


def measure(
    a: BundleReader, b: BundleReader, units: Sequence[UnitPair], progress: Progress | None
) -> Mapping[str, Values] | None:
    """Compare the values of two bundles' weights, or return None if torch isn't installed. See ``Bundle.diff``."""
    try:
        differences = module("torch", "differences")
    except MissingExtra:
        return None
    found: Mapping[str, Values] = differences.measure(a, b, units, progress)
    return found


def installed_backend() -> str:
    """Return the first backend whose library is installed, or the first backend if none is."""
    return next((backend for backend in BACKENDS if _is_installed(backend)), BACKENDS[0])


def _is_installed(library: str) -> bool:
    if library in sys.modules:
        return sys.modules[library] is not None  # None bars an import
    return importlib.util.find_spec(library) is not None
