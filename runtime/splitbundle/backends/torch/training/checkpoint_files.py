"""The two files of a training checkpoint, read and checked. ``checkpoint.schema.json`` describes the document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.backends.torch.training.state_tree import decode
from splitbundle.backends.torch.weights import MappedTensors
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import names, strict_json, weight_layout
from splitbundle.format.dtypes import TABLE
from splitbundle.format.fields import Field, Problems
from splitbundle.format.manifest.document import File
from splitbundle.storage import files

FILE: Final = "checkpoint.json"
TENSORS: Final = "tensors.safetensors"
FORMAT: Final = "splitbundle-checkpoint"
VERSION: Final = "1.0"


class Found:
    """A checkpoint that was read and checked."""

    def __init__(self, path: Path, document: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors
        self.bundles, self.position, self.state = document["bundles"], document["position"], document["state"]

    def value(self, *names_: str) -> Any:
        """Return a part of the state."""
        value = self.state
        for name in names_:
            value = value[name]
        return decode(value, self.tensors, FILE, "/state/" + "/".join(names_))

    def check(self, what: str, given: object, stored: object) -> None:
        """Raise ``checkpoint.mismatch`` if what the caller gave isn't what the checkpoint has."""
        if given != stored:
            raise self.refuse(what, f"{what} as in the checkpoint: {quoted(stored, 200)}", quoted(given, 200))

    def refuse(self, what: str, expected: str, got: str) -> BundleError:
        hint = "Build the same stages, optimizer and schedule as in the run that saved it"
        place = str(self.path)
        return BundleError(
            Problem(code="checkpoint.mismatch", file=place, argument=what, expected=expected, got=got, hint=hint)
        )


def read_checkpoint(path: Path) -> Found:
    """Read a checkpoint. Its tensors are read into private memory, once, and hashed there."""
    document = Field(
        strict_json.parse(files.read_file(path, FILE, strict_json.MAX_BYTES), FILE), problems := Problems(FILE)
    )
    head = document.members(["format", "format_version"], open=True)
    head["format"].choice([FORMAT])
    head["format_version"].choice([VERSION])
    problems.raise_if_any()
    members = document.members(["format", "format_version", "step", "bundles", "position", "state", "tensors", "file"])
    members["step"].integer(0, 10**16)
    for item in members["bundles"].items():
        item.string(names.IDENTITY, '"sha256:" and 64 digits of 0-9a-f')
    state = members["state"].members(["optimizer", "schedule", "others", "random", "adapters"])
    objects = [item for _, item in state["others"].mapping()]
    for item in [*objects, *([] if state["schedule"].is_null else [state["schedule"]])]:
        item.members(["class", "state"])["class"].string()
    state["adapters"].items()
    expected: dict[str, weight_layout.Tensor] = {}
    for item in members["tensors"].items():
        own = item.members(["name", "dtype", "shape"])
        shape = tuple(size.integer() for size in own["shape"].items(maximum=8))
        name = own["name"].string()
        if name in expected:
            own["name"].refuse("a name of one tensor")
        expected[name] = weight_layout.Tensor(dtype=own["dtype"].choice(tuple(TABLE)), shape=shape)
    listed = members["file"].members(["size", "sha256", "header_sha256"])
    digest = "64 digits of 0-9a-f"
    entry = File(
        size=listed["size"].integer(),
        sha256=listed["sha256"].string(names.SHA256, digest),
        header_sha256=listed["header_sha256"].string(names.SHA256, digest),
    )
    problems.raise_if_any()
    with files.open_file(path, TENSORS, entry) as file:
        memory = files.read_private(file, TENSORS, entry)
    tensors = MappedTensors()
    start = entry.size - sum(tensor.size for tensor in expected.values())
    header = weight_layout.as_expected(memory[: max(start, 0)], entry.size, expected)
    if header is None:
        wanted, got = f"exactly the tensors that {FILE} lists, in the canonical layout", "another header"
        raise BundleError(Problem(code="weights.layout", file=TENSORS, expected=wanted, got=got))
    for name, (tensor, offset) in header.layout.items():
        tensors.add(name, getattr(torch, tensor.dtype), tensor.shape, memory, header.start + offset)
    return Found(path, document.value, tensors)


def as_json(document: dict[str, Any]) -> bytes:
    """Return the bytes of ``checkpoint.json``.

    Raises:
        BundleError: ``input.value`` for a position that JSON would change.
    """
    try:
        data = strict_json.dump(document)
        if strict_json.parse(data, FILE)["position"] == document["position"]:
            return data
        got = "a value that JSON changes, such as a tuple or a number as a key"
    except (TypeError, ValueError, BundleError) as error:
        got = " ".join(str(error).split())[:200]
    expected = "what JSON has: text, numbers, lists, and dicts with text as keys"
    raise BundleError(Problem(code="input.value", argument="position", expected=expected, got=got))
