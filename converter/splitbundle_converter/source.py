"""A source checkpoint: where it is, what its configuration says, and its tensors, one at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitbundle import strict_json
from splitbundle.architecture import MAX_LAYERS
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.manifest import DTYPES
from splitbundle.weights import CODES
from splitbundle_converter.composites import family_hint
from splitbundle_converter.families import FAMILIES

CONFIG: Final = "config.json"
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
TEXT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES: Final = {CODES[dtype]: dtype for dtype in DTYPES}
_LAYER_COUNTS: Final = ("num_hidden_layers", "n_layer")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTensor:
    """A tensor of the checkpoint, as its file's header describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Source:
    """A local checkpoint directory."""

    def __init__(self, directory: Path, *, name: str, revision: str | None = None) -> None:
        self.directory, self.name, self.revision = directory, name, revision
        self.tensors = self._index()

    def config(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """The model type, the configuration's fields, and the defaults of its class. Remote code never runs.

        Raises:
            BundleError: ``source.missing``, ``source.family``, ``source.remote-code``, ``source.quantised``,
                ``source.config``.
        """
        raw = self.raw_config()
        # Other classes than those of the table aren't even built: some make a list of as many items as a field says.
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            expected = f"one of {', '.join(sorted(FAMILIES))}"
            hint = family_hint(raw, FAMILIES)
            raise _refused("source.family", CONFIG, expected, quoted(model_type), hint, "/model_type")
        check_layer_counts(raw)
        config = self.built_config()
        return config.model_type, config.to_dict(), type(config)().to_dict()

    def raw_config(self) -> dict[str, Any]:
        """The fields of config.json as they stand there, of a checkpoint that may be read at all.

        Raises:
            BundleError: ``source.missing``, ``source.remote-code``, ``source.quantised``, ``source.config``.
        """
        raw = strict_json.parse(self.read(CONFIG), CONFIG)
        if not isinstance(raw, dict):
            raise _refused("source.config", CONFIG, "an object", quoted(raw))
        check_readable(raw)
        return raw

    def built_config(self) -> Any:
        """The configuration as transformers reads it. Only for types that are known to be safe to build.

        Raises:
            BundleError: ``source.config``.
        """
        from transformers import AutoConfig

        try:
            with quiet():
                return AutoConfig.from_pretrained(str(self.directory), trust_remote_code=False, local_files_only=True)
        except (ValueError, TypeError, LookupError, ArithmeticError, OSError, AttributeError) as error:
            raise _refused("source.config", CONFIG, "a configuration that transformers reads", _line(error)) from error
        except Exception as error:  # huggingface_hub's validation errors derive from Exception alone
            if not type(error).__module__.startswith("huggingface_hub"):
                raise
            raise _refused("source.config", CONFIG, "a configuration that transformers reads", _line(error)) from error

    def read(self, name: str) -> bytes:
        """A small file of the checkpoint.

        Raises:
            BundleError: ``source.missing``.
        """
        try:
            return (self.directory / name).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise _refused("source.missing", name, f"a file {name} in {self.name}", "none") from None
        except OSError as error:
            hint = "Check the permissions of the file"
            raise _refused("source.unreadable", name, "a file that can be read", f"{error.strerror}", hint) from error

    def text_files(self) -> tuple[str, ...]:
        """The tokenizer's files, and what goes with them, that are there."""
        return tuple(name for name in TEXT_FILES if (self.directory / name).is_file())

    def stop_ids(self, config: dict[str, Any]) -> tuple[int, ...]:
        """The ids that end a text: of generation_config.json, else of the configuration."""
        ids = config.get("eos_token_id")
        if (self.directory / "generation_config.json").is_file():
            generation = strict_json.parse(self.read("generation_config.json"), "generation_config.json")
            ids = generation.get("eos_token_id", ids) if isinstance(generation, dict) else ids
        ids = ids if isinstance(ids, list) else [ids]
        return tuple(i for i in ids if type(i) is int and 0 <= i < config.get("vocab_size", 0))

    def license(self) -> str | None:
        """The licence that the model card's front matter names."""
        card = self.directory / "README.md"
        if not card.is_file():
            return None
        front = re.match(r"\A---\n(.*?)\n---", card.read_text("utf-8", "replace")[:65536], re.DOTALL)
        found = re.search(r"^license:\s*([\w.-]+)\s*$", front[1], re.MULTILINE) if front else None
        return found[1] if found else None

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Reads tensors, with at most one file open."""
        reader = Reader(self)
        try:
            yield reader
        finally:
            reader.close()

    def _index(self) -> dict[str, SourceTensor]:
        index = self.directory / INDEX
        if index.is_file():
            files, where = self._indexed(), INDEX
        elif (self.directory / SINGLE).is_file():
            files, where = None, SINGLE
        else:
            raise self._no_weights()
        tensors: dict[str, SourceTensor] = {}
        problems: list[Problem] = []
        for file in sorted(set(files.values())) if files is not None else [SINGLE]:
            for name, tensor in self._headers(file):
                if files is not None and files.get(name) != file:
                    got = f"it is in {file} too" if name in files else f"none; it is in {file}"
                    problems.append(_problem("source.tensor", INDEX, f"one entry for {quoted(name)}", got))
                tensors[name] = tensor
        for name in files or ():
            if name not in tensors:
                problems.append(_problem("source.tensor", where, f"{quoted(name)} in {(files or {})[name]}", "none"))
        if problems:
            raise BundleError(problems)
        return tensors

    def _indexed(self) -> dict[str, str]:
        document = strict_json.parse(self.read(INDEX), INDEX)
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise _refused("source.index", INDEX, "an object weight_map", quoted(weight_map), pointer="/weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file) or file.startswith("."):
                expected = "the name of a .safetensors file beside the index"
                raise _refused("source.index", INDEX, expected, quoted(file), pointer=f"/weight_map/{name}")
        return dict(weight_map)

    def _headers(self, file: str) -> Iterator[tuple[str, SourceTensor]]:
        path = self.directory / file
        if not path.is_file():
            raise _refused("source.missing", file, f"a file that {INDEX} names", "none")
        with path.open("rb") as start:
            if start.read(40).startswith(b"version https://git-lfs"):
                hint = "Fetch the weights: git lfs pull"
                raise _refused("source.lfs-pointer", file, "weights", "a Git LFS pointer", hint)
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping, though it has keys
                    piece = opened.get_slice(name)
                    yield (
                        name,
                        SourceTensor(file=file, dtype=piece.get_dtype(), shape=tuple(piece.get_shape())),
                    )
        except SafetensorError as error:
            raise _refused("source.safetensors", file, "a safetensors file", _line(error)) from error

    def _no_weights(self) -> BundleError:
        pickles = sorted(path.name for pattern in _PICKLES for path in self.directory.glob(pattern))
        if pickles:
            return _refused(
                "source.pickle",
                pickles[0],
                f"weights in {SINGLE} or {INDEX}",
                "a pickle, which can run code",
                "Save the model as safetensors where you trust it: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)",
            )
        return _refused("source.missing", SINGLE, f"{SINGLE} or {INDEX} in {self.name}", "neither")


class Reader:
    """Tensors of a checkpoint by name; they are views of a mapping."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file: str | None = None
        self._opened: Any = None
        self._open = ExitStack()

    def get(self, name: str) -> Tensor:
        """A tensor, as it is stored."""
        file = self._source.tensors[name].file
        if file != self._file:
            self.close()
            self._opened = self._open.enter_context(safe_open(self._source.directory / file, framework="pt"))
            self._file = file
        tensor: Tensor = self._opened.get_tensor(name)
        return tensor

    def close(self) -> None:
        """Lets the file go."""
        self._open.close()
        self._opened = self._file = None


def check_readable(raw: dict[str, Any], pointer: str = "") -> None:
    """Refuses a configuration, or a part of one, that asks for code of its own or for quantised weights."""
    if "auto_map" in raw:
        hint = "splitbundle never runs code of a checkpoint"
        got = quoted(raw["auto_map"])
        raise _refused("source.remote-code", CONFIG, "no auto_map", got, hint, f"{pointer}/auto_map")
    if raw.get("quantization_config") is not None:
        hint = "Convert the checkpoint that was quantised"
        got, where = quoted(raw["quantization_config"]), f"{pointer}/quantization_config"
        raise _refused("source.quantised", CONFIG, "weights that aren't quantised", got, hint, where)


def check_layer_counts(raw: dict[str, Any], pointer: str = "") -> None:
    """Refuses numbers of layers that nothing has: some classes make a list of as many items as such a field says."""
    for field in _LAYER_COUNTS:
        count = raw.get(field)
        if type(count) is int and not 1 <= count <= MAX_LAYERS:
            expected = f"an integer from 1 to {MAX_LAYERS}"
            raise _refused("source.config", CONFIG, expected, quoted(count), pointer=f"{pointer}/{field}")


def dtype_of(tensor: SourceTensor) -> str | None:
    """A dtype that can be converted, or None."""
    return _DTYPES.get(tensor.dtype)


def locate(source: str | os.PathLike[str], revision: str | None) -> Source:
    """A checkpoint directory, or a hub id, which is fetched (honouring HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).

    Raises:
        BundleError: ``source.missing``, ``source.pickle``, ``network``.
    """
    path = Path(source)
    if path.is_dir():
        return Source(path, name=path.resolve().name)
    if path.exists():
        raise _refused("source.missing", str(source), "a checkpoint directory or a hub id", "a file")
    identifier = str(source)
    if not _HUB_ID.fullmatch(identifier):
        raise _refused("source.missing", identifier, "a checkpoint directory or a hub id", "neither")
    directory = _fetch(identifier, revision)
    # The hub's cache names a snapshot by its commit.
    commit = directory.name if re.fullmatch(r"[0-9a-f]{40}", directory.name) else revision
    return Source(directory, name=identifier, revision=commit)


def _fetch(identifier: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [CONFIG, "*.safetensors", INDEX, "README.md", *TEXT_FILES]
    try:
        return Path(snapshot_download(identifier, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        hint = "Accept its terms on the hub and set HF_TOKEN"
        raise _refused("network", identifier, "access to the model", _line(error), hint) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        hint = "Check the id and --revision; a private model needs HF_TOKEN"
        raise _refused("network", identifier, "a model of this name on the hub", _line(error), hint) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        hint = "There is no such directory here, and the hub can't be reached"
        raise _refused("network", identifier, "the model from the hub", _line(error), hint) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: what matters is said by an error of ours."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions are untyped
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _problem(
    code: str, file: str, expected: str, got: str, hint: str | None = None, pointer: str | None = None
) -> Problem:
    return Problem(code=code, file=file, pointer=pointer, expected=expected, got=got, hint=hint)


def _refused(
    code: str, file: str, expected: str, got: str, hint: str | None = None, pointer: str | None = None
) -> BundleError:
    return BundleError(_problem(code, file, expected, got, hint, pointer))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
