"""Turn the state of an optimizer or a schedule into JSON and tensors, and back, exactly. No pickle."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.dtypes import TABLE
from splitbundle.format.strict_json import MAX_INTEGER

_DICTS: Final = {"dict": dict, "counter": Counter, "ordered": OrderedDict}
_LISTS: Final = {"list": list, "tuple": tuple}
_MAX_DEPTH: Final = 24
"""Each level takes up to three levels of JSON, of which a document may have 64."""


def encode(value: object, where: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return a value as JSON, and add its tensors to ``tensors``.

    Text, booleans, None and most numbers are themselves. Everything else is an object with one member, which says what
    it is: ``{"tensor": NAME}``, ``{"list": […]}``, ``{"dict": [[KEY, VALUE], …]}``, ``{"float": "inf"}`` and so on.

    Args:
        value: what to store.
        where: a path, for the names of tensors and for errors.
        tensors: takes the tensors, by the names that the JSON has.
        depth: the number of containers around the value.

    Raises:
        BundleError: ``input.value`` for what is neither a tensor, a number, text nor a container of these.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) <= MAX_INTEGER else {"int": str(int(value))}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in TABLE or value.layout is not torch.strided:
            raise _unknown(where, f"a {value.layout} tensor of {value.dtype}")
        if where in tensors:
            raise _unknown(where, "two keys that look the same, such as 1 and '1'")
        tensors[where] = value.detach()
        return {"tensor": where}
    if depth == _MAX_DEPTH:
        raise _unknown(where, f"containers in more than {_MAX_DEPTH} containers")
    for name, kind in (*_DICTS.items(), *_LISTS.items()):
        if type(value) is not kind:
            continue
        if isinstance(value, Mapping):
            pairs = []
            for key, item in value.items():
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise _unknown(where, f"the key {quoted(key)}")
                pairs.append([key, encode(item, f"{where}/{key}", tensors, depth + 1)])
            return {name: pairs}
        return {name: [encode(item, f"{where}/{i}", tensors, depth + 1) for i, item in enumerate(value)]}
    raise _unknown(where, f"a {type(value).__name__}")


def decode(value: Any, tensors: Mapping[str, Tensor], file: str, pointer: str) -> Any:
    """Return what ``encode`` was given.

    Raises:
        BundleError: ``field.value`` for JSON that ``encode`` doesn't write.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise _wrong(file, pointer, value)
        return value
    if len(value) != 1:
        raise _wrong(file, pointer, value)
    ((name, inner),) = value.items()
    at = f"{pointer}/{name}"
    if name == "tensor" and isinstance(inner, str) and inner in tensors:
        return tensors[inner]
    if name == "int" and isinstance(inner, str) and len(inner) < 40 and inner.removeprefix("-").isdecimal():
        return int(inner)
    if name == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if name in _LISTS and isinstance(inner, list):
        return _LISTS[name](decode(item, tensors, file, f"{at}/{i}") for i, item in enumerate(inner))
    if name in _DICTS and isinstance(inner, list):
        made = _DICTS[name]()
        for i, pair in enumerate(inner):
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in made:
                raise _wrong(file, f"{at}/{i}", pair)
            made[pair[0]] = decode(pair[1], tensors, file, f"{at}/{i}/1")
        return made
    raise _wrong(file, at, inner)


def _unknown(where: str, got: str) -> BundleError:
    expected = "tensors, numbers, text, and lists and dicts of them"
    hint = "Keep anything else yourself: a checkpoint has no pickle"
    return BundleError(Problem(code="input.value", argument=where, expected=expected, got=got, hint=hint))


def _wrong(file: str, pointer: str, got: object) -> BundleError:
    expected = "a value as a checkpoint stores it"
    return BundleError(Problem(code="field.value", file=file, pointer=pointer, expected=expected, got=quoted(got)))
