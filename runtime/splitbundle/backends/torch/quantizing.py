"""Write a bundle with quantized weights, one tensor at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from splitbundle.backends.torch import rounding
from splitbundle.backends.torch.experts import Stacked
from splitbundle.backends.torch.modules import Linear
from splitbundle.backends.torch.quantized import dequantized
from splitbundle.backends.torch.saving import Note, save_changed
from splitbundle.backends.torch.stage import Stage, load_stages
from splitbundle.backends.torch.weights import MappedTensors, map_tensors
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format.encodings import COLUMNS, ROWS, TABLE, Encoding, is_matrix
from splitbundle.format.manifest.document import EMBEDDING, Storage, expand
from splitbundle.format.weight_layout import SCALE
from splitbundle.records import replace
from splitbundle.storage.files import Progress, is_same
from splitbundle.storage.reader import VECTORS, BundleReader
from splitbundle.verification.verify import check_digests

KINDS: Final = ("int8", "int4")
GROUPS: Final = (32, 64, 128)
METHODS: Final = ("rtn", "search", "gptq")
ENDS: Final = (EMBEDDING, "head.projection.weight")
"""The table and the head. They are stored in 8 bits, which halves the loss of a model in 4 bits."""
ReaderT = TypeVar("ReaderT", bound=BundleReader)


def quantize(
    bundle: ReaderT,
    output: str | os.PathLike[str],
    to: str = "int4",
    *,
    group: int = 32,
    keep: Sequence[str] = (),
    method: str = "search",
    calibration: Sequence[Sequence[int]] | None = None,
    vectors: bool = True,
    force: bool = False,
    notes: Note | None = None,
    progress: Progress | None = None,
) -> ReaderT:
    """Write a bundle with quantized weights. See ``Bundle.quantize``."""
    for name, value, known in (("to", to, KINDS), ("group", group, GROUPS), ("method", method, METHODS)):
        if value not in known:
            raise wrong_argument(name, f"one of {', '.join(map(str, known))}", quoted(value))
    if bundle.manifest.storage.encodings:
        hint = "Quantize the bundle that it was made from: rounding twice loses more"
        raise wrong_argument("bundle", "a bundle without quantized weights", quoted(bundle.path.name), hint)
    if is_same(output, bundle.path):
        hint = "Quantized weights don't give back the numbers: keep the bundle that they were made from"
        raise wrong_argument("output", "another directory than the bundle's own", quoted(str(output)), hint)
    if method == "gptq" and to != "int4":
        raise wrong_argument("method", "rtn or search for int8: only codes of 4 bits are calibrated", quoted(method))
    encodings = choose(bundle, to, group, keep)
    if not encodings:
        which = f"keep={list(keep)!r} leaves none" if choose(bundle, to, group, ()) else "none has such sizes"
        rule = "rows8 needs a multiple of 16 columns, and blocks4 a multiple of the group and of 16 rows"
        raise wrong_argument("keep" if keep else "bundle", "at least one matrix that can be quantized", which, rule)
    if notes is not None:
        for note in _unlike(bundle, to, group, encodings):
            notes(note)
    old = bundle.manifest.storage
    storage = replace(
        old, exceptions={n: d for n, d in old.exceptions.items() if n not in encodings}, encodings=encodings
    )
    check_digests(bundle, list(bundle.manifest.weight_files()), progress)
    ids = _calibration(bundle, calibration) if method == "gptq" and to == "int4" else None
    source = _Quantized(bundle, storage, method, ids, progress)
    return save_changed(
        bundle, output, source, storage, vectors=vectors, exact=False, force=force, notes=notes, progress=progress
    )


def _unlike(bundle: BundleReader, to: str, group: int, encodings: Mapping[str, str]) -> Iterator[str]:
    """Yield sentences about matrices that have another encoding than the one that was asked for."""
    wide = [name for name, own in encodings.items() if to == "int4" and name not in ENDS and own == "rows8"]
    if wide:
        rule = f"blocks of {group} need a multiple of {group} columns and of {ROWS} rows"
        yield f"{len(wide)} matrices are stored in 8 bits, because {rule}: {_parts(wide)}."
    shapes = bundle.architecture.tensors()
    plain = [name for name in shapes if is_matrix(name) and not TABLE["rows8"].fits(shapes[name])]
    if plain:
        rule = f"8 bits need a multiple of {COLUMNS} columns"
        yield f"{len(plain)} matrices stay as they are, because {rule}: {_parts(plain)}."


def _parts(names: Sequence[str]) -> str:
    """Return the names without ``weight`` and without the numbers of layers, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"^layers\.\d+\.", "", name).removesuffix(".weight") for name in names))


def choose(bundle: BundleReader, to: str, group: int, keep: Sequence[str]) -> dict[str, str]:
    """Return the encoding of each tensor that is to be quantized. Names in ``keep`` stay as they are.

    A name in ``keep`` may also be one of the source's, such as ``lm_head`` or ``down_proj``.

    Raises:
        BundleError: ``input.value`` for a name in ``keep`` that no matrix has.
    """
    if isinstance(keep, str):
        raise wrong_argument("keep", "names of parts, as a list", quoted(keep))
    tied = bundle.architecture.head.tied
    shapes = {name: shape for name, shape in bundle.architecture.tensors().items() if is_matrix(name)}
    sources = {
        name: entry.source
        for row in bundle.manifest.source_names
        for entry in expand(row, len(bundle.architecture.layers))
        for name in entry.tensors
    }
    kept: set[str] = set()
    for part in keep:
        own = {name for name in shapes if f".{part}." in f".{name}." or f".{part}." in f".{sources.get(name, '')}."}
        if part in ("head", "lm_head") and tied:
            own.add(EMBEDDING)
        if not own:
            last = len(bundle.architecture.layers) - 1
            expected = f"parts such as head, embedding, layers.0 to layers.{last}, or mlp.down"
            raise wrong_argument("keep", expected, quoted(part))
        kept |= own
    found = {}
    for name, shape in shapes.items():
        wanted = ["rows8"] if to == "int8" or name in ENDS else [f"blocks4_{group}", "rows8"]
        fitting = [each for each in wanted if TABLE[each].fits(shape)]
        if name not in kept and fitting:
            found[name] = fitting[0]
    return found


def _calibration(bundle: BundleReader, given: Sequence[Sequence[int]] | None) -> list[Tensor]:
    if given is not None:
        texts = [torch.tensor([list(ids)]) for ids in given if len(ids)]
        if texts:
            return texts
        raise wrong_argument("calibration", "at least one text with a token", "none")
    if bundle.manifest.vectors is None:
        hint = "Give a text to calibrate with (calibration), or another method"
        raise BundleError(
            Problem(code="vectors.none", expected="golden vectors, to calibrate with", got="none", hint=hint)
        )
    tensors = map_tensors(bundle, VECTORS)
    return [tensors[f"case.{case}.ids"][None] for case in range(len(bundle.manifest.vectors.lengths))]


class _Quantized(Mapping[str, Tensor]):
    """The stored tensors of the new bundle by name. Each is computed when it is asked for.

    The codes and the scales of a matrix are computed together, and the other one is kept until it is asked for. Most
    codes come first, so these are the scales of a file. A writer asks for the units in order.
    """

    def __init__(
        self, bundle: BundleReader, storage: Storage, method: str, ids: list[Tensor] | None, progress: Progress | None
    ) -> None:
        self.bundle, self.storage, self.method = bundle, storage, method
        self._unit: tuple[str, MappedTensors] = ("", MappedTensors())
        self._units = {name: unit for unit, tensors in bundle.architecture.unit_tensors().items() for name in tensors}
        self._made: dict[str, Tensor] = {}
        self._inputs = None if ids is None else _Inputs(bundle, ids)

    def __len__(self) -> int:
        return 2 * len(self.storage.encodings)

    def __iter__(self) -> Iterator[str]:
        for name in self.storage.encodings:
            yield from (name, f"{name}{SCALE}")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.removesuffix(SCALE) in self.storage.encodings

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made.pop(name)
        matrix = name.removesuffix(SCALE)
        encoding = self.storage.encoding_of(matrix)
        if encoding is None:
            raise KeyError(name)
        weight = self._source(matrix)
        if not bool(weight.isfinite().all()):
            hint = "Some weights of the model are NaN or infinite"
            raise wrong_argument("bundle", f"finite numbers in {quoted(matrix)}", "NaN or infinity", hint)
        pair = dict(zip((matrix, f"{matrix}{SCALE}"), self._rounded(matrix, weight, encoding), strict=True))
        found = pair.pop(name)
        self._made |= pair
        return found

    def _source(self, name: str) -> Tensor:
        unit = self._units[name]
        if self._unit[0] != unit:
            self._unit = unit, map_tensors(self.bundle, unit)
        return self._unit[1][name]

    def _rounded(self, name: str, weight: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        if self._inputs is None or encoding.block is None:
            return rounding.quantized(weight, encoding, self.method)
        return self._inputs.quantized(name, weight, encoding, self.storage)


class _Inputs:
    """Calibrates layer by layer: each layer sees the hidden states that the quantized layers before it compute."""

    def __init__(self, bundle: BundleReader, ids: list[Tensor]) -> None:
        self.bundle, self.layer = bundle, -1
        self.moments: dict[str, Tensor] = {}
        self.codes: dict[str, tuple[Tensor, Tensor]] = {}
        stage = self._load(layers=(0, 0), embeds=True, head=False)
        with torch.no_grad():
            self.states = [stage(each) for each in ids]

    def _load(self, **selection: Any) -> Stage:
        return load_stages(self.bundle, [self.bundle.select(**selection)], dtype="float32", kernels="torch")[0]

    def quantized(self, name: str, weight: Tensor, encoding: Encoding, storage: Storage) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of a matrix of a layer. The first one of a layer calibrates all of them."""
        if not name.startswith("layers."):
            return rounding.quantized(weight, encoding, "search")
        layer = int(name.split(".")[1])
        if layer != self.layer:
            self.layer = layer
            self._calibrate(layer, storage)
        return self.codes.pop(name)

    def _calibrate(self, layer: int, storage: Storage) -> None:
        stage = self._load(layers=(layer, layer + 1), embeds=False, head=False)
        modules = {
            f"{path}.weight": module
            for path, module in stage.named_modules()
            if isinstance(module, Linear | Stacked) and f"{path}.weight" in storage.encodings
        }
        moments: dict[str, Tensor] = {}
        hooks = [module.register_forward_pre_hook(_summing(moments, name, module)) for name, module in modules.items()]
        with torch.no_grad():
            for state in self.states:
                stage(state)
            for hook in hooks:
                hook.remove()
            for name, module in modules.items():
                encoding = storage.encoding_of(name)
                if encoding is None:
                    continue
                pair = rounding.quantized(module.weight, encoding, "gptq", moments.pop(name, None))
                if encoding.block is not None:
                    self.codes[name] = pair
                module.weight = nn.Parameter(dequantized(*pair, encoding, torch.float32), requires_grad=False)
            self.states = [stage(state) for state in self.states]


def _summing(moments: dict[str, Tensor], name: str, module: nn.Module) -> Callable[..., None]:
    """Return a hook that adds Xᵀ X of the inputs of a layer, for each expert if there are several."""

    def add(_: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].detach().reshape(-1, given[0].shape[-1]).float()
        if isinstance(module, Stacked):
            width = x.shape[1]
            found = moments.setdefault(name, torch.zeros(module.weight.shape[0], width, width))
            found[given[1]] += x.t() @ x
        elif name in moments:
            moments[name] += x.t() @ x
        else:
            moments[name] = x.t() @ x

    return add
