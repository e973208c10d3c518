"""Load the weights of some modules of an original model, while the rest of the model is on the meta device.

transformers renames, joins and divides tensors while it loads them. Its own code does this here too, for the tensors of
a few modules at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from splitbundle.backends.torch.weights import DTYPES
from splitbundle_converter.checkpoint.source import Checkpoint, Reader, dtype_of
from splitbundle_converter.errors import refusal
from splitbundle_converter.reference.original_errors import nothing

TENSORS = ("_parameters", "_buffers")


def empty_original(config: Any) -> Any:
    """Return the causal language model of a configuration, in float32 on the meta device, in evaluation mode."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the mapping has a class for each family
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = torch.float32  # as from_pretrained sets it
    with torch.device("meta"):
        return original(config).eval()


@dataclass(frozen=True, slots=True)
class _Later:
    """A source tensor that is read when transformers asks for its values. It asks slices of safetensors so too."""

    reader: Reader
    lock: threading.Lock
    """transformers asks in several threads, and a reader keeps one file open."""
    name: str

    def __getitem__(self, everything: object) -> Tensor:
        with self.lock:
            return self.reader.get(self.name)


class ModuleWeights:
    """The weights of a model's modules: the source tensors that they come from, and how they come into memory."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, sources: Mapping[str, str], refused: Collection[str]
    ) -> None:
        """Find the module of each source tensor.

        Args:
            model: The model on the meta device.
            checkpoint: The checkpoint.
            sources: The name of a tensor for the model's own class -> its name in the checkpoint.
            refused: The entries of transformers' report that must be empty: "missing_keys", "mismatched_keys",
                "unexpected_keys".

        Raises:
            BundleError: ``source.tensor`` for tensors that are missing or unexpected.
        """
        self.model, self._checkpoint, self._sources, self._refused = model, checkpoint, sources, refused
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._deciding = dict(_deciding("", model, model))
        self._of_module: dict[str, dict[str, set[str]]] = {}
        """The name of a module -> the tensors that it is loaded from -> the tensors of the model that they become."""
        self._tied: dict[str, str] = {}
        """A tensor of the model without a source tensor -> the tensor that it is the same as."""
        self._initialized: set[str] = set()
        """The tensors of the model that no checkpoint has, as rotary frequencies."""
        self._plan()
        self._empty = {
            name: [dict(getattr(module, kind)) for kind in TENSORS] for name, module in self._modules.items()
        }
        """The name of a module -> its tensors on the meta device, which tell transformers what to load."""
        self._loaded: dict[str, None] = {}
        self.free(self._modules)

    @property
    def names(self) -> list[str]:
        """Return the names of all modules. The name of the model itself is empty."""
        return list(self._modules)

    def inside(self, place: str) -> list[str]:
        """Return the names of a module and of all modules in it."""
        return [name for name in self._modules if name == place or name.startswith(f"{place}.")]

    def module(self, name: str) -> Any:
        """Return the module with this name."""
        return self._modules[name]

    def has_sources(self, name: str) -> bool:
        """Return whether tensors of the checkpoint are loaded into a module, without the modules in it."""
        own = self._modules[name]._parameters.keys() | self._modules[name]._buffers.keys()
        return name in self._of_module or any(_full(name, tensor) in self._tied for tensor in own)

    def load(self, names: Collection[str], reader: Reader, dtype: torch.dtype | None) -> None:
        """Load the tensors of some modules in float32, rounded to ``dtype`` unless it is None.

        Raises:
            BundleError: ``source.tensor``, ``source.unreadable``.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        new = [name for name in names if name not in self._loaded]
        tied = {
            full: self._tied[full]
            for name in new
            for kind in TENSORS
            for tensor in getattr(self._modules[name], kind)
            if (full := _full(name, tensor)) in self._tied
        }
        new += [name for name in dict.fromkeys(map(_module_of, tied.values())) if name not in {*new, *self._loaded}]
        for name in new:
            self._put(name, self._empty[name])
            self._loaded[name] = None
        self._initialize(new)
        wanted = {own: made for name in new for own, made in self._of_module.get(name, {}).items()}
        if wanted:
            lock = threading.Lock()
            later = {own: _Later(reader, lock, self._sources[own]) for own in wanted}
            self._expect_stored_dtypes(wanted)
            info, _ = convert_and_load_state_dict_in_model(self.model, later, self._load_config)
            if info.conversion_errors:
                raise RuntimeError(" ".join(info.conversion_errors.values()))
            missing = info.missing_keys & {full for made in wanted.values() for full in made}
            self._check({"missing_keys": missing, "mismatched_keys": info.mismatched_keys})
        for full, same in tied.items():
            name, _, tensor = full.rpartition(".")
            setattr(self._modules[name], tensor, self._tensor(same))
        for name in new:
            self._to_float32(name, dtype)

    def free(self, names: Iterable[str]) -> None:
        """Replace the tensors of some modules with NaN that takes no memory.

        Some classes look at the device of a weight of a module before they call it, which must not be the meta device.
        """
        for name in names:
            empty = [
                {key: None if each is None else nothing(each) for key, each in kind.items()}
                for kind in self._empty[name]
            ]
            self._put(name, empty)
            self._loaded.pop(name, None)

    def loaded(self) -> list[str]:
        """Return the names of the modules that are in memory."""
        return list(self._loaded)

    def _put(self, name: str, tensors: Sequence[Mapping[str, Any]]) -> None:
        for kind, own in zip(TENSORS, tensors, strict=True):
            getattr(self._modules[name], kind).update(own)

    def _initialize(self, names: Collection[str]) -> None:
        """Give the tensors that no checkpoint has the values that transformers gives them."""
        from transformers.initialization import guard_torch_init_functions

        for name in names:
            for kind in TENSORS:
                tensors = getattr(self._modules[name], kind)
                for tensor in [tensor for tensor in tensors if _full(name, tensor) in self._initialized]:
                    filled = torch.empty_like(tensors[tensor], device="cpu")
                    tensors[tensor] = filled if kind == "_buffers" else torch.nn.Parameter(filled, False)
        with torch.no_grad(), guard_torch_init_functions():
            for name in sorted(names, key=lambda name: -name.count(".")):  # inner modules first, as transformers does
                self._deciding[name]._init_weights(self._modules[name])

    def _expect_stored_dtypes(self, wanted: Mapping[str, Collection[str]]) -> None:
        """Let transformers join narrow tensors before they become float32, which takes half of the memory."""
        dtypes: dict[str, torch.dtype] = {}
        for own, made in wanted.items():
            stored = dtype_of(self._checkpoint.tensors[self._sources[own]])
            for full in made:
                dtype = torch.float32 if stored is None else DTYPES[stored]
                dtypes[full] = torch.promote_types(dtypes.get(full, dtype), dtype)
        for full, dtype in dtypes.items():
            tensor = self._tensor(full)
            if tensor.is_floating_point():
                name, _, key = full.rpartition(".")
                narrow = torch.empty(tensor.shape, dtype=dtype, device="meta")
                is_buffer = key in self._modules[name]._buffers
                setattr(self._modules[name], key, narrow if is_buffer else torch.nn.Parameter(narrow, False))

    def _to_float32(self, name: str, dtype: torch.dtype | None) -> None:
        """Widen the tensors of a module, and round what ``golden_vectors.learned_tensors`` yields of a whole model."""
        for kind, empty in zip(TENSORS, self._empty[name], strict=True):
            for key, tensor in getattr(self._modules[name], kind).items():
                if tensor is None or tensor.is_meta or not tensor.is_floating_point():
                    continue
                wide = tensor.data.to(empty[key].dtype)
                if dtype is not None and (kind == "_parameters" or key.endswith("bias")):
                    wide = wide.to(dtype).to(wide.dtype)  # a mapped tensor must not be written
                tensor.data = wide

    def _plan(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
        from transformers.modeling_utils import LoadStateDictConfig

        mapping: Any = get_model_conversion_mapping(self.model)
        dtype_plan = self.model._get_dtype_plan(torch.float32)
        self._load_config = LoadStateDictConfig(dtype=torch.float32, dtype_plan=dtype_plan, weight_mapping=mapping)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        made_by = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        names = self.model.state_dict()
        prefix = self.model.base_model_prefix
        unexpected: set[str] = set()
        covered: set[str] = set()
        for own in sorted(self._sources, key=dot_natural_key):  # as transformers: some renamings depend on the order
            full, pattern = rename_source_key(own, renamings, converters, prefix, names)
            if full not in names and own in names:
                full, pattern = rename_source_key(own, [], [], prefix, names)
            if full not in names:
                unexpected.add(full)
                continue
            targets = made_by[pattern] if pattern is not None else [""]
            made = {full.replace(targets[0], target) for target in targets} & names.keys()
            covered |= made
            self._of_module.setdefault(_module_of(full), {})[own] = made
        missing = self._find_tied(names.keys() - covered, covered)
        report = SimpleNamespace(missing_keys=missing, unexpected_keys=unexpected)
        self.model._adjust_missing_and_unexpected_keys(report)
        self._check({"missing_keys": report.missing_keys, "unexpected_keys": report.unexpected_keys})
        self._initialized = missing | {name for name, _ in self.model.named_non_persistent_buffers()}

    def _find_tied(self, missing: set[str], covered: set[str]) -> set[str]:
        """Find the tensors that are the same as others. Return the missing tensors that aren't."""
        groups: dict[str, set[str]] = {}
        for target, source in self.model.all_tied_weights_keys.items():
            groups.setdefault(source, {source}).add(target)
        for group in groups.values():
            stored = sorted(group & covered)
            self._tied |= {full: stored[0] for full in group & missing if stored}
        return missing - self._tied.keys()

    def _check(self, report: Mapping[str, Collection[Any]]) -> None:
        wrong = {key: sorted(map(str, names)) for key, names in report.items() if names and key in self._refused}
        if wrong:
            raise refusal("source.tensor", self._checkpoint.name, "every tensor that transformers wants", str(wrong))

    def _tensor(self, full: str) -> Any:
        name, _, tensor = full.rpartition(".")
        return getattr(self._modules[name], tensor)


def _deciding(name: str, module: Any, model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name of each module, and the model whose class initializes it: the innermost one that contains it."""
    from transformers import PreTrainedModel

    model = module if isinstance(module, PreTrainedModel) else model
    yield name, model
    for child, inner in module.named_children():
        yield from _deciding(_full(name, child), inner, model)


def _full(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]
