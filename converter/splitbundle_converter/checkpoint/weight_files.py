"""The weight files of a checkpoint: read their headers, and the index that assigns each tensor to a file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.fields import MAX_PROBLEMS
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.errors import line, problem, refusal, source_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """The names of a checkpoint's weight files: a single file, or an index with the suffix of the files in it."""

    single: str
    index: str
    suffix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapper:
    """A wrapper for training, and the mark that it leaves in the names of tensors."""

    name: str
    mark: str
    remedy: str
    everywhere: bool = True
    """Whether it shows as a prefix of all names."""
    inside: bool = True
    """Whether it shows within any name. No family has a module of this name."""


_ADAPTER: Final = "Merge the adapter and save the result: model.merge_and_unload().save_pretrained(...)"
_SHARDED: Final = (
    "Save the full state dict of the model inside: get_model_state_dict of torch.distributed.checkpoint.state_dict, "
    "with full_state_dict=True"
)
WRAPPERS: Final = (
    Wrapper(name="PEFT", mark="base_model.model.", remedy=_ADAPTER, inside=False),
    Wrapper(name="PEFT", mark="base_layer.", remedy=_ADAPTER, everywhere=False),
    Wrapper(name="PEFT", mark="lora_A.", remedy=_ADAPTER, everywhere=False),
    Wrapper(name="FullyShardedDataParallel", mark="_fsdp_wrapped_module.", remedy=_SHARDED),
    Wrapper(name="activation checkpointing", mark="_checkpoint_wrapped_module.", remedy=_SHARDED),
    Wrapper(
        name="torch.compile",
        mark="_orig_mod.",
        remedy="Save the state dict of the model that was compiled, and not that of the compiled one",
    ),
    Wrapper(
        name="DistributedDataParallel",
        mark="module.",
        remedy="Save the state dict of the model inside: wrapper.module.state_dict()",
        inside=False,
    ),
)
SAFETENSORS: Final = Naming(single="model.safetensors", index="model.safetensors.index.json", suffix=".safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """A tensor of the checkpoint, as the header of its file describes it."""

    file: str
    """The name of the checkpoint's file, for messages."""
    stored: str
    """The name of the tensor in this file."""
    path: Path
    """The path of the bytes: this file, or the safetensors file that a pickle was rewritten to."""
    dtype: str
    shape: tuple[int, ...]


Headers = Callable[[str], Iterator[tuple[str, SourceTensor]]]
"""The name of a weight file -> its tensors by name."""


def weight_files(directory: CheckpointDirectory, naming: Naming) -> tuple[dict[str, str] | None, list[str]]:
    """Return the map of the index, or None without an index, and the weight files. The list is empty without weights.

    The single file comes first, as it does for transformers: an index beside it is not read.

    Raises:
        BundleError: ``source.index``, ``source.unreadable``, ``source.changed``, ``json.*``.
    """
    if (directory.path / naming.single).is_file():
        return None, [naming.single]
    if not (directory.path / naming.index).is_file():
        return None, []
    weight_map = _weight_map(directory.read(naming.index), naming)
    return weight_map, sorted(set(weight_map.values()))


def gather(
    weight_map: dict[str, str] | None, files: list[str], naming: Naming, headers: Headers
) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """Return the tensors of all files by name, and the tensors that the index names and no file has.

    Each tensor that exists must be in exactly one file, the one that the index names.

    Raises:
        BundleError: ``source.tensor``, and the errors of ``headers``.
    """
    tensors: dict[str, SourceTensor] = {}
    problems: list[Problem] = []
    for file in files:
        for name, tensor in headers(file):
            if weight_map is not None and weight_map.get(name) != file:
                got = f"it is in {file} too" if name in weight_map else f"none; it is in {file}"
                problems.append(problem("source.tensor", naming.index, f"one entry for {quoted(name)}", got))
            tensors[name] = tensor
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])
    return tensors, {name: file for name, file in (weight_map or {}).items() if name not in tensors}


def read_headers(file: str, path: Path) -> Iterator[tuple[str, SourceTensor]]:
    """Return the tensors of the safetensors file at ``path``. Messages call it ``file``.

    Raises:
        BundleError: ``source.safetensors``, ``source.unreadable``, ``json.*``.
    """
    try:
        _check_header(file, path)
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it has keys() but is not iterable
                piece = opened.get_slice(name)
                yield (
                    name,
                    SourceTensor(
                        file=file, stored=name, path=path, dtype=piece.get_dtype(), shape=tuple(piece.get_shape())
                    ),
                )
    except SafetensorError as error:
        raise refusal("source.safetensors", file, "a safetensors file", line(error)) from error
    except (OSError, RuntimeError) as error:  # torch maps the file and raises its own errors
        raise refusal("source.unreadable", file, "a file that can be read", line(error)) from error


def _check_header(file: str, path: Path) -> None:
    """Check that all readers read a header in the same way. The library keeps only the last of two equal names.

    Raises:
        BundleError: ``source.safetensors``, ``json.*``.
    """
    with path.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(size, strict_json.MAX_BYTES + 1))
    if not header or len(header) < min(size, strict_json.MAX_BYTES + 1):
        return  # empty or truncated: the library reports this
    if not header.startswith(b"{"):
        raise refusal("source.safetensors", file, "a header that begins with {", quoted(header[:8]))
    source_json(header, file)


def _weight_map(data: bytes, naming: Naming) -> dict[str, str]:
    document = source_json(data, naming.index)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        expected = "an object weight_map"
        raise refusal("source.index", naming.index, expected, quoted(weight_map), pointer="/weight_map")
    name_of_file = re.compile(rf"[\w.-]+{re.escape(naming.suffix)}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not name_of_file.fullmatch(file) or file.startswith("."):
            expected = f"the name of a {naming.suffix} file beside the index"
            raise refusal("source.index", naming.index, expected, quoted(file), pointer=f"/weight_map/{name}")
    return dict(weight_map)


def check_unwrapped(names: Iterable[str], file: str) -> None:
    """Check that the tensor names are not those of a model in a wrapper for training.

    Raises:
        BundleError: ``source.tensor``.
    """
    known = list(names)
    for wrapper in WRAPPERS:
        if wrapper.everywhere and known and all(name.startswith(wrapper.mark) for name in known):
            got = f"names that all begin with {wrapper.mark!r}, as {wrapper.name} makes them"
        elif (named := next((name for name in known if f".{wrapper.mark}" in f".{name}"), None)) and wrapper.inside:
            got = f"{quoted(named)}, a name that {wrapper.name} makes"
        else:
            continue
        raise refusal("source.tensor", file, "the names that the model's tensors have", got, wrapper.remedy)
