"""docs/reference/api.md has every public name, and every name there has a docstring that tells its arguments."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pytest

from tests.support.paths import ROOT

PAGE: Final = ROOT / "docs" / "reference" / "api.md"
PUBLIC: Final = (
    "splitbundle",
    "splitbundle.training",
    "splitbundle.extending",
    "splitbundle.ray",
    "splitbundle_converter",
)
"""The modules whose ``__all__`` is what users may rely on."""
INTERNAL: Final = {
    "splitbundle.Bundle": "files_of locate_tensors logical open_weights require stored stored_vectors weight_bytes "
    "weight_groups",
    "splitbundle.backends.torch.stage.Stage": "array backend check_call checkpoint_activations convert_call describe "
    "extra_repr integer_dtypes kernels over_numpy quantized takes_rows threads",
    "splitbundle.backends.onnxruntime.stage.Stage": "array backend check_call convert_call describe integer_dtypes "
    "over_numpy takes_rows",
    "splitbundle.backends.torch.pipeline.Pipeline": "bundle first",
    "splitbundle.backends.onnxruntime.pipeline.Pipeline": "bundle first",
    "splitbundle.backends.torch.remote.RemoteStage": "array backend check_call convert_call describe extra_repr "
    "integer_dtypes over_numpy takes_rows where",
    "splitbundle.backends.torch.tensors.TensorStage": "array backend convert_call integer_dtypes over_numpy takes_rows",
    "splitbundle.backends.onnxruntime.arrays.ArrayStage": "array backend convert_call device dtype integer_dtypes "
    "over_numpy takes_rows",
    "splitbundle.stages.session.Session": "advance make_room",
    "splitbundle.SharedPipeline": "bundle client first most_texts stage_seconds stages wake",
    "splitbundle.remote.link.RemoteCache": "advance arrange check check_rollback grow places reorder rescales",
    "splitbundle.stages.call.Call": "arranged first_place order pieces placed",
    "splitbundle.stages.call.CacheState": "arrange check_rollback places rescales",
    "splitbundle.MissingExtra": "codes of",
    "splitbundle.VerificationError": "codes",
    "splitbundle.ParityError": "codes",
    "splitbundle.text.huggingface.TextTokenizer": "encode_marked longest_token",
    "splitbundle.stages.sampling.Sampling": "adjusts filters_least of",
}
"""A class of the page -> members that the package uses itself, or that a base on the page has."""
_OF_RECORDS: Final = {"may_be_absent", "record_defaults", "record_types"}
_DIRECTIVE: Final = re.compile(r"^\.\. auto(function|class|data):: (\S+)\n((?:   .*\n|\n(?=   ))*)", re.MULTILINE)


class Entry(NamedTuple):
    kind: str
    path: str
    options: str

    def members(self) -> set[str] | None:
        """Return the members that the entry names; None if it has all of them."""
        found = re.search(r":members:(.*)", self.options)
        if found is None:
            return set()
        return {name.strip() for name in found[1].split(",")} if found[1].strip() else None


ENTRIES: Final = [Entry(*found) for found in _DIRECTIVE.findall(PAGE.read_text("utf-8"))]
CLASSES: Final = [
    entry for entry in ENTRIES if entry.kind == "class" and not entry.path.startswith("splitbundle.serving.ray_")
]
"""Those of Ray aren't looked into, as Ray may not be installed."""


def the_object(path: str) -> Any:
    """Return what a dotted path names."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def own_members(cls: type) -> dict[str, Any]:
    """Return the public attributes that classes of this project define: name -> what the class has under it."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("splitbundle"):
            found |= dict.fromkeys(getattr(base, "__annotations__", {})) | vars(base)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def function_of(member: Any) -> Any:
    """Return the function behind a method or a property, or None."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    return member if inspect.isfunction(member) else getattr(member, "func", None)


def untold(function: Any, doc: str | None = None) -> list[str]:
    """Return the parameters that a docstring doesn't name."""
    said = doc if doc is not None else inspect.getdoc(function) or ""
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in parameters if not re.search(rf"\b{name}\b", said)]


def public_names() -> Iterator[tuple[str, Any]]:
    for name in PUBLIC:
        module = importlib.import_module(name)
        yield from ((f"{name}.{own}", getattr(module, own)) for own in module.__all__)
    schemas = importlib.import_module("splitbundle_schemas")
    yield from ((f"splitbundle_schemas.{own}", getattr(schemas, own)) for own in ("load", "NAMES"))


def test_every_public_name_has_an_entry() -> None:
    entries = {entry.path: entry for entry in ENTRIES}
    shown = {id(the_object(path)) for path in entries if not path.startswith("splitbundle.serving.ray_")}
    data = {name for name, found in public_names() if isinstance(found, str | tuple)}
    assert data == {"splitbundle.__version__", "splitbundle_schemas.NAMES"}
    assert sorted(data - entries.keys()) == []
    assert [name for name, found in public_names() if name not in data and id(found) not in shown] == []
    assert len(entries) == len(ENTRIES)


@pytest.mark.parametrize("name", [name for name, found in public_names() if callable(found)])
def test_every_public_name_has_a_docstring_that_names_its_parameters(name: str) -> None:
    found = the_object(name)
    assert (found.__doc__ or "").strip()
    if inspect.isfunction(found):
        assert untold(found) == []


@pytest.mark.parametrize("entry", CLASSES, ids=lambda entry: entry.path)
def test_the_members_of_a_class_are_on_the_page_and_have_docstrings(entry: Entry) -> None:
    cls, listed = the_object(entry.path), entry.members()
    own = own_members(cls)
    internal = set(INTERNAL.get(entry.path, "").split())
    if listed is not None:
        assert sorted(own.keys() - listed - internal - _OF_RECORDS) == []
        source = "".join(inspect.getsource(base) for base in cls.__mro__ if base.__module__.startswith("splitbundle"))
        # Those that __init__ sets have a docstring below them.
        lost = [name for name in listed - own.keys() if not re.search(rf"self\.{name}\b", source)]
        assert [name for name in lost if not hasattr(cls, name)] == []
        assert sorted(internal - own.keys()) == []
    for name in sorted(own.keys() if listed is None else listed & own.keys()):
        function = function_of(own[name])
        if function is not None:
            assert (function.__doc__ or "").strip(), name
            assert untold(function) == [], name
