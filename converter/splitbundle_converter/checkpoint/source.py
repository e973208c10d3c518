"""A source checkpoint: its directory, its configuration, and its tensors, which are read one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitbundle.errors import BundleError, quoted
from splitbundle.format import strict_json
from splitbundle.format.dtypes import SAFETENSORS_CODES, WEIGHTS
from splitbundle.storage.files import MAX_TEXT_BYTES
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.file_names import (
    ADAPTER,
    CARD,
    CONFIG,
    GENERATION,
    TEMPLATE,
    TEMPLATES,
    TEXT_FILES,
)
from splitbundle_converter.checkpoint.weight_files import (
    SAFETENSORS,
    Naming,
    SourceTensor,
    gather,
    read_headers,
    weight_files,
)
from splitbundle_converter.errors import line, refusal, source_json

_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MISTRAL: Final = (
    "consolidated*.safetensors is the layout of Mistral's own programs, with params.json. Convert the same model in "
    "the layout of transformers: config.json with model.safetensors, or its index"
)
_META: Final = (
    "consolidated*.pth is the layout of Meta's own programs, with params.json. Convert the same model in the layout of "
    "transformers: config.json with model.safetensors, or its index"
)
_OTHERS: Final = {
    "consolidated*.safetensors": _MISTRAL,
    "consolidated*.pth": _META,
    ADAPTER: "This is an adapter: merge it into its base model, and save that",
    "*.gguf": "Name one of the GGUF files in place of the directory",
    "tf_model*.h5": "Load it with a version of transformers that knows TensorFlow, and save it as safetensors",
    "flax_model*": "Load it with a version of transformers that knows Flax, and save it as safetensors",
}
"""A pattern of files that a user may have in place of weights -> the hint for this user."""
_DTYPES: Final = {SAFETENSORS_CODES[dtype]: dtype for dtype in WEIGHTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """A parsed configuration, with its file and its JSON pointer in this file."""

    raw: Any
    file: str
    pointer: str = ""


class Checkpoint:
    """A local checkpoint directory, with its weights as safetensors."""

    cuts: tuple[int, ...] = ()
    """The default cuts."""
    rewritten = False
    """Whether the tensors are in other files than those that transformers loads."""
    quantization: Mapping[str, Any] | None = None
    """How weights are quantized in the files, if ``tensors`` shows them as plain ones: the method, its formula, …"""
    naming = SAFETENSORS
    """The names of the weight files."""

    def __init__(self, path: Path, *, name: str, revision: str | None = None) -> None:
        self.directory = CheckpointDirectory(path=path, name=name, revision=revision)
        self.name, self.revision = name, revision
        self.promised: Mapping[str, str] = {}
        """A tensor that the index names and no file has -> the file that the index names. The model may not need it."""
        self.tensors = self._index()

    def configuration(self) -> Configuration:
        """Return the parsed configuration. Python writes NaN and the infinities into JSON; they become their names.

        Raises:
            BundleError: ``source.missing``, ``source.unreadable``, ``json.*``.
        """
        return Configuration(raw=source_json(self.read(CONFIG), CONFIG, constant=str), file=CONFIG)

    def read(self, name: str) -> bytes:
        """Return the content of a small file of the checkpoint.

        Raises:
            BundleError: ``source.missing``, ``source.unreadable``, ``source.changed``.
        """
        most = MAX_TEXT_BYTES if name in TEXT_FILES or name.startswith(TEMPLATES) else strict_json.MAX_BYTES
        return self.directory.read(name, most)

    def place_of(self, name: str) -> tuple[str, str]:
        """Return the file that should have a missing tensor, and the tensor's name there. Messages name both."""
        return self.name, name

    def text_files(self) -> tuple[str, ...]:
        """Return the names of the tokenizer files that exist, readable or not. Reading an unreadable one must fail."""
        more = sorted(path.name for path in (self.directory.path / TEMPLATES).glob("*.jinja"))
        templates = [f"{TEMPLATES}/{name}" for name in more if TEMPLATE.fullmatch(name)]
        return (*(name for name in TEXT_FILES if self.directory.has(name)), *templates)

    def stop_ids(self, config: dict[str, Any]) -> tuple[int, ...]:
        """Return the ids that end a text, from generation_config.json or, without an entry there, from ``config``.

        Raises:
            BundleError: ``source.config``, ``source.unreadable``, ``source.changed``, ``json.*``.
        """
        ids = config.get("eos_token_id")
        if self.directory.has(GENERATION):
            generation = source_json(self.read(GENERATION), GENERATION)
            if not isinstance(generation, dict):
                raise refusal("source.config", GENERATION, "an object", quoted(generation))
            ids = generation.get("eos_token_id", ids)
        ids = ids if isinstance(ids, list) else [ids]
        return tuple(i for i in ids if type(i) is int and 0 <= i < config.get("vocab_size", 0))

    def license(self) -> str | None:
        """Return the license that the front matter of the model card names, or None. The card need not be readable."""
        try:
            text = self.directory.start(CARD, 65536, "a model card").decode("utf-8", "replace").replace("\r\n", "\n")
        except BundleError as error:
            if error.codes[0] in ("source.missing", "source.unreadable"):
                return None  # the card is no part of the model: a broken link to one must not end the conversion
            raise
        front = re.match(r"\A---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*([\w.-]+)\s*$", front[1], re.MULTILINE) if front else None
        return found[1] if found else None

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open a reader of tensors for the duration of the block. It keeps at most one file open."""
        reader = Reader(self)
        try:
            yield reader
        finally:
            reader.close()

    def _index(self) -> dict[str, SourceTensor]:
        weight_map, files = weight_files(self.directory, SAFETENSORS)
        if not files:
            raise no_weights(self.directory.path, self.name)
        if self.directory.has(ADAPTER):
            # If peft is installed, transformers applies the adapter, and loads the weights of the base that it names.
            expected, hint = "weights without an adapter beside them", "Merge it into the model, or remove it"
            raise refusal("source.config", ADAPTER, expected, "an adapter's configuration", hint)

        def headers(file: str) -> Iterator[tuple[str, SourceTensor]]:
            named_by = self.name if weight_map is None else SAFETENSORS.index
            return read_headers(file, self.directory.weights(file, named_by))

        tensors, self.promised = gather(weight_map, files, SAFETENSORS, headers)
        return tensors


def has_weights(directory: Path, naming: Naming) -> bool:
    """Return whether a checkpoint has its weights in files with these names."""
    return any((directory / name).is_file() for name in (naming.index, naming.single))


def no_weights(directory: Path, name: str) -> BundleError:
    """Return the error for a directory without safetensors. The hint depends on the files that are there."""
    found = {pattern: sorted(path.name for path in directory.glob(pattern)) for pattern in (*_OTHERS, *_PICKLES)}
    pickles = [file for pattern in _PICKLES for file in found[pattern] if not file.startswith("consolidated")]
    if pickles:
        return pickled(pickles[0])
    expected = f"{SAFETENSORS.single} or {SAFETENSORS.index} in {name}"
    other = next(((files[0], _OTHERS[pattern]) for pattern, files in found.items() if files), None)
    if other is None:
        return refusal("source.missing", SAFETENSORS.single, expected, "neither")
    return refusal("source.missing", SAFETENSORS.single, expected, f"neither, but {other[0]}", other[1])


def pickled(file: str) -> BundleError:
    """Return the error for weights in a pickle if pickles are not allowed."""
    return refusal(
        "source.pickle",
        file,
        f"weights in {SAFETENSORS.single} or {SAFETENSORS.index}",
        "a pickle, which can run code",
        "Save the model as safetensors where you trust it: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True). Or "
        "allow_pickle=True: "
        "it reads names and tensors alone, and refuses what asks for more, in a process of its own",
    )


class Reader:
    """Reads tensors of a checkpoint by name. The tensors are views of a memory map."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._path: Path | None = None
        self._opened: Any = None
        self._open = ExitStack()

    def get(self, name: str) -> Tensor:
        """Return a tensor with its stored shape and dtype.

        Raises:
            BundleError: ``source.unreadable``.
        """
        found = self._source.tensors[name]
        try:
            if found.path != self._path:
                self.close()
                self._opened = self._open.enter_context(safe_open(found.path, framework="pt"))
                self._path = found.path
            tensor: Tensor = self._opened.get_tensor(found.stored)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch maps the file and raises its own errors
            hint = "Its header was readable before: check the disk, and try again"
            raise refusal("source.unreadable", found.file, "weights that can be read", line(error), hint) from error
        return tensor

    def slices(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor in slices of size 1 along its first dimension."""
        yield from torch.split(self.get(name), 1)

    def close(self) -> None:
        """Close the open file."""
        self._open.close()
        self._opened = self._path = None


def dtype_of(tensor: SourceTensor) -> str | None:
    """Return the name of the tensor's dtype, or None if the dtype can't be converted."""
    return _DTYPES.get(tensor.dtype)
