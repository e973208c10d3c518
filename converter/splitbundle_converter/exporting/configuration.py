"""The configuration files and the tokenizer of an exported checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, quoted
from splitbundle.format import strict_json
from splitbundle.format.manifest.document import TOKENIZER
from splitbundle.storage.files import MAX_TEXT_BYTES, read_file, read_listed
from splitbundle_converter.checkpoint.file_names import GENERATION, TEMPLATE, TEMPLATES, TEXT_FILES
from splitbundle_converter.code_fields import IMPLEMENTATION, REMOTE, without_fields
from splitbundle_converter.errors import refusal
from splitbundle_converter.options import Note

_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_MAX_INTEGER: Final = 10**40
"""The largest integer in these files: published ones have 10^30 as the longest text."""
_DTYPES: Final = ("dtype", "torch_dtype")
"""The field of a configuration for the dtype of the weights, in newer and in older versions of transformers."""


def config_file(bundle: Bundle, given: str | os.PathLike[str] | None, notes: Note) -> bytes | None:
    """Return the content of ``config.json``: the source's own, with the dtype of the bundle and without code.

    Args:
        bundle: The bundle.
        given: The path of a configuration to take in place of the one in the bundle.
        notes: A function that is called with a sentence for each thing that was changed or left out.

    Raises:
        BundleError: ``file.*``, ``json.*``, ``source.missing``; ``source.config`` for a configuration that isn't an
            object, and for a given one of another type of model.
    """
    found = _carried(bundle, notes) if given is None else _given(given)
    if found is None:
        return None
    file, data = found
    # Python writes NaN and the infinities into JSON, and reads them.
    raw = strict_json.parse(data, file, constant=float)
    if not isinstance(raw, dict):
        raise refusal("source.config", file, "an object", quoted(raw))
    config = _without_code(raw, "config.json", notes)
    stored, carried = bundle.manifest.storage.dtype, bundle.manifest.model.source_configuration
    if given is not None:
        family, own = bundle.manifest.model.family, raw.get("model_type")
        if own != family:
            hint = "Give the config.json that was published with these weights"
            raise refusal("source.config", file, quoted(family), quoted(own), hint, "/model_type")
        stated = next((raw[field] for field in _DTYPES if isinstance(raw.get(field), str)), stored)
        if stated != stored:
            notes(f"config.json says {quoted(stated)}, in which the weights, stored as {stored}, will be loaded.")
    elif carried is not None and carried.cast:
        config = _with_dtype(config, stored)
    return _written(data, raw, config)


def _carried(bundle: Bundle, notes: Note) -> tuple[str, bytes] | None:
    """Return the path and the content of the configuration in the bundle, or None and a note if it has none."""
    model = bundle.manifest.model
    carried = model.source_configuration
    if carried is None:
        at = f" at {model.revision}" if model.revision else ""
        notes(
            f"config.json is left out: the bundle carries no configuration of its source. Copy it from {model.source}"
            f"{at}, or name it: config="
        )
        return None
    if carried.part is None and "part" in bundle.manifest.extensions:
        notes("config.json is left out: the bundle carries only the configuration of the whole source.")
        return None
    file = carried.file if carried.part is None else carried.part
    return file, read_listed(bundle.path, file, bundle.manifest.files[file], strict_json.MAX_BYTES)


def _given(path: str | os.PathLike[str]) -> tuple[str, bytes]:
    """Return the path and the content of a configuration that the user names. It may be a link, as in the hub's cache.

    Raises:
        BundleError: ``source.missing``, ``source.unreadable``, ``json.size``.
    """
    name, real = str(path), Path(os.path.realpath(path))
    if not real.is_file():
        got = "a directory" if real.is_dir() else "something else" if real.exists() else "nothing there"
        raise refusal("source.missing", name, "a file with a configuration", got, "Check the path", argument="config")
    try:
        return name, read_file(real.parent, real.name, strict_json.MAX_BYTES)
    except BundleError as error:
        raise BundleError(replace(problem, file=name) for problem in error.problems) from error


def _without_code(raw: Any, file: str, notes: Note) -> Any:
    """Return a JSON value without the fields that select code, and say so if it had some."""
    plain = without_fields(raw, IMPLEMENTATION, REMOTE)
    if json.dumps(plain) != json.dumps(raw):
        notes(f"{file} lacks the fields of its source that select code.")
    return plain


def _written(data: bytes, raw: Any, value: Any) -> bytes:
    """Return the bytes of a JSON value: those of its file if it is still the value there."""
    same = json.dumps(value) == json.dumps(raw)  # as text, because NaN doesn't equal itself
    return data if same else f"{json.dumps(value, indent=2)}\n".encode()


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    named = [field for field in _DTYPES if field in config] or [_DTYPES[0]]
    return config | dict.fromkeys(named, dtype)


def other_files(bundle: Bundle, notes: Note) -> dict[str, bytes]:
    """Return the tokenizer's files and ``generation_config.json``, by their names in a checkpoint.

    Only names that a checkpoint has are taken, so no file of a bundle can take the place of another one.

    Raises:
        BundleError: ``file.*``.
    """
    listed = bundle.manifest.files
    carried = bundle.manifest.model.source_configuration
    known = {f"{TOKENIZER}{name}": name for name in (*TEXT_FILES, GENERATION)}
    if carried is not None and carried.generation is not None:
        known[carried.generation] = GENERATION
    prefix = f"{TOKENIZER}{TEMPLATES}/"
    known |= {
        path: path.removeprefix(TOKENIZER)
        for path in listed
        if path.startswith(prefix) and TEMPLATE.fullmatch(path.removeprefix(prefix))
    }
    for path in listed:
        if path.startswith(TOKENIZER) and path not in known:
            notes(f"{path} is left out: it isn't a file of a checkpoint.")
    found: dict[str, bytes] = {}
    for path, name in known.items():
        if path in listed:
            data = read_listed(bundle.path, path, listed[path], MAX_TEXT_BYTES)
            plain = _plain(path, data, notes) if name in (GENERATION, _TOKENIZER_CONFIG) else data
            found |= {} if plain is None else {name: plain}
    return found


def _plain(path: str, data: bytes, notes: Note) -> bytes | None:
    """Return a JSON file without the fields that select code, or None if it can't be read in one way only."""
    try:
        raw = strict_json.parse(data, path, constant=float, max_integer=_MAX_INTEGER)
    except BundleError as error:
        notes(f"{path} is left out: {error}")
        return None
    return _written(data, raw, _without_code(raw, path, notes))
