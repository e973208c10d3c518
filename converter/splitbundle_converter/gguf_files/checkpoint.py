"""A GGUF file of llama.cpp, seen as a checkpoint: the ``gguf`` library reads its blocks, one tensor at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch import Tensor

from splitbundle.backends.torch.rotary import frequencies
from splitbundle.errors import MissingExtra
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.rotary import Rotary, Unscaled
from splitbundle.format.manifest.document import expand
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.file_names import CONFIG, TOKENIZER
from splitbundle_converter.checkpoint.source import Checkpoint, Reader
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.errors import AGAIN, line, refusal
from splitbundle_converter.families.configuration import read_configuration
from splitbundle_converter.gguf_files.header import check_header
from splitbundle_converter.gguf_files.metadata import ARCHITECTURES, ROTARY_FACTORS, configuration
from splitbundle_converter.options import Note
from splitbundle_converter.quantized.packed_weights import TORCH
from splitbundle_converter.quiet_transformers import quiet

SUFFIX: Final = ".gguf"
_CHUNK: Final = 2**22
"""The number of values that are computed at once, so that the temporary memory stays small."""


class GgufCheckpoint(Checkpoint):
    """A GGUF file with the tensor names and the layout of transformers."""

    rewritten = True

    def __init__(self, path: Path, directory: CheckpointDirectory, opened: Any, *, exact: bool) -> None:
        self.path, self.directory = path, directory
        self.name, self.revision = directory.name, None
        self.promised: Mapping[str, str] = {}
        directory.watch(path)
        self._stored = {tensor.name: tensor for tensor in opened.tensors}
        self._kind = str(_fields(opened).get("general.architecture"))
        types = Counter(tensor.tensor_type.name for tensor in opened.tensors)
        blocks = {name: count for name, count in types.items() if name not in TORCH}
        self.blocks = sum(blocks.values())
        """The number of weights that are stored as blocks of codes."""
        if blocks:
            formula = f"dequantize of the library gguf, for blocks of {', '.join(sorted(blocks))}"
            self.quantization = {"method": "gguf", "formula": formula, "weights": self.blocks}
        self.tensors = {}
        self.tensors = self._translated("F32" if exact else "BF16")

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Open a reader of tensors for the duration of the block. It computes one tensor at a time."""
        yield _GgufReader(self._read)

    def place_of(self, name: str) -> tuple[str, str]:
        """Return the file that should have a missing tensor, and the tensor's name there. Messages name both."""
        return self.path.name, name

    def _translated(self, target: str) -> dict[str, SourceTensor]:
        """Return the tensors by transformers' names. A tensor that has none keeps its own."""
        import gguf

        judged = read_configuration(self.configuration())
        layers = len(judged.architecture.layers)
        kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self._kind)
        names = gguf.get_tensor_name_map(kind, layers)
        self._heads = {
            f"blk.{i}.attn_{part}.": getattr(judged.architecture.kind_of(i).attention, count)
            for i in range(layers if self._kind == "llama" else 0)
            for part, count in (("q", "heads"), ("k", "kv_heads"))
        }
        found = {}
        for row in judged.family.names(judged.architecture):
            for entry in expand(row, layers):
                own = names.get_name(entry.source, try_suffixes=(".weight", ".bias"))
                if own is not None and own in self._stored:
                    found[entry.source] = own
        taken = set(found.values())
        if ROTARY_FACTORS in self._stored:
            self._check_rotary_factors(judged.architecture)
            taken.add(ROTARY_FACTORS)
        found |= {name: name for name in self._stored if name not in taken}
        return {name: self._described(own, target) for name, own in found.items()}

    def _check_rotary_factors(self, architecture: Architecture) -> None:
        """Check that the file's factors are those of the configuration's rotary scaling.

        Raises:
            BundleError: ``source.tensor``.
        """
        rotary = architecture.kind_of(0).attention.position
        stored = torch.from_numpy(numpy.array(self._stored[ROTARY_FACTORS].data)).float().flatten()
        if isinstance(rotary, Rotary):
            factors = rotary_factors(rotary)
            if stored.shape == factors.shape and torch.allclose(factors, stored, rtol=1e-4):
                return
        expected = "the factors of rotary positions that the configuration's rope_scaling gives"
        hint = "Take the config.json of this very model"
        raise refusal("source.tensor", self.path.name, expected, "others", hint, f"/{ROTARY_FACTORS}")

    def _described(self, own: str, target: str) -> SourceTensor:
        stored = self._stored[own]
        kind = stored.tensor_type.name
        shape = tuple(int(size) for size in reversed(stored.shape))
        dtype = kind if kind in TORCH else target
        return SourceTensor(file=self.path.name, stored=own, path=self.path, dtype=dtype, shape=shape)

    def _read(self, name: str) -> Tensor:
        """Return a tensor with its shape and dtype.

        Raises:
            BundleError: ``source.unreadable``; ``source.quantised`` for blocks that the library can't read.
        """
        import gguf

        found = self.tensors[name]
        stored = self._stored[found.stored]
        result = torch.empty(found.shape, dtype=TORCH[found.dtype])
        rows = result.view(-1, found.shape[-1])
        step = max(1, _CHUNK // found.shape[-1])
        try:
            data = stored.data.reshape(len(rows), -1)
            for start in range(0, len(rows), step):
                piece = gguf.quants.dequantize(data[start : start + step], stored.tensor_type)
                rows[start : start + step] = torch.from_numpy(numpy.array(piece))
        except NotImplementedError as error:
            expected = "blocks that the library gguf can dequantize"
            got, hint = stored.tensor_type.name, "Convert the checkpoint that the file was made of"
            raise refusal("source.quantised", self.path.name, expected, got, hint, f"/{found.stored}") from error
        except (ValueError, IndexError, OSError) as error:
            expected = "weights that can be read"
            raise refusal("source.unreadable", self.path.name, expected, line(error), AGAIN) from error
        heads = next((heads for start, heads in self._heads.items() if found.stored.startswith(start)), None)
        return result if heads is None else _unrotated(result, heads)


class _GgufReader(Reader):
    def __init__(self, get: Callable[[str], Tensor]) -> None:
        self._get = get

    def get(self, name: str) -> Tensor:
        """Return a tensor with the shape and the dtype that the checkpoint states for it."""
        return self._get(name)

    def close(self) -> None:
        """Do nothing: the file is mapped."""


def gguf_file(directory: Path) -> Path | None:
    """Return the only GGUF file of a directory without other weights, or None."""
    files = sorted(directory.glob(f"*{SUFFIX}"))
    return files[0] if len(files) == 1 else None


def read_gguf(path: Path, private: Path, *, exact: bool, notes: Note | None = None) -> GgufCheckpoint:
    """Open a GGUF file.

    A ``config.json`` beside the file is taken, with the tokenizer there. Otherwise configuration and tokenizer are made
    of the metadata, in the directory ``private``.

    Raises:
        BundleError: ``source.unreadable``, ``source.family``, ``source.config``, ``source.tensor``.
        MissingExtra: The library gguf isn't installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise MissingExtra.of("gguf", "gguf", "read GGUF files") from None
    check_header(path)
    try:
        opened = gguf.GGUFReader(path)
        fields = _fields(opened)
        shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in opened.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, TypeError, MemoryError) as error:
        raise refusal("source.unreadable", path.name, "a GGUF file", line(error), AGAIN) from error
    if fields.get("split.count", 0) not in (0, 1):
        hint = "Join the files with the program llama-gguf-split of llama.cpp"
        raise refusal("source.unreadable", path.name, "a whole GGUF file", "one of several files", hint)
    kind = fields.get("general.architecture")
    if isinstance(kind, str) and kind in ARCHITECTURES and (path.parent / CONFIG).is_file():
        return GgufCheckpoint(path, CheckpointDirectory(path=path.parent, name=path.stem), opened, exact=exact)
    config = configuration(fields, shapes, path.name)
    (private / CONFIG).write_text(json.dumps(config, indent=2), "utf-8")
    _write_tokenizer(path, private, notes)
    return GgufCheckpoint(path, CheckpointDirectory(path=private, name=path.stem), opened, exact=exact)


def _write_tokenizer(path: Path, private: Path, notes: Note | None) -> None:
    """Write the tokenizer of the metadata as transformers makes it of them. A file without one has no text."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            tokenizer.save_pretrained(str(private))
    except Exception as error:  # noqa: BLE001  # any error of a library about a tokenizer that it doesn't know
        (private / TOKENIZER).unlink(missing_ok=True)
        if notes is not None:
            notes(f"transformers can't make a tokenizer of the file's metadata: {line(error)}.")


def _fields(opened: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in opened.fields.items() if _is_small(name)}


def _is_small(name: str) -> bool:
    return not name.startswith("tokenizer.") or name.endswith("_token_id")


def rotary_factors(rotary: Rotary) -> Tensor:
    """Return how many times as slow each pair of channels turns as without scaling. *Shape:* () -> (pairs)."""
    plain, scaled = (frequencies(own, 0, torch.device("cpu")) for own in (replace(rotary, scaling=Unscaled()), rotary))
    return plain / scaled


def _unrotated(stored: Tensor, heads: int) -> Tensor:
    """Return rows in transformers' order. llama.cpp turns neighboring rows, and transformers the halves of a head.

    *Shape:* (heads · head_dim, …) -> the same.
    """
    size = len(stored) // heads // 2
    return stored.reshape(heads, size, 2, *stored.shape[1:]).transpose(1, 2).reshape(stored.shape).contiguous()
