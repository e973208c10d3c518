"""The configuration files and the tokenizer of an exported checkpoint."""

from __future__ import annotations

import json
import os
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
_DTYPES: Final = ("dtype", "torch_dtype")
"""The field of a configuration for the dtype of the weights, in newer and in older versions of transformers."""


def config_file(bundle: Bundle, given: str | os.PathLike[str] | None, notes: Note) -> bytes | None:
    """Return the content of ``config.json``: the source's own, with the dtype of the bundle and without code.

    Args:
        bundle: The bundle.
        given: The path of a configuration to take in place of the one in the bundle.
        notes: A function that is called with a sentence for each thing that was changed or left out.

    Raises:
        BundleError: ``file.*``, ``json.*``; ``source.config`` for a configuration that isn't an object.
    """
    model = bundle.manifest.model
    carried = model.source_configuration
    if given is not None:
        path = Path(given)
        file, data = str(given), read_file(path.absolute().parent, path.name, strict_json.MAX_BYTES)
    elif carried is None:
        at = f" at {model.revision}" if model.revision else ""
        notes(
            f"config.json is left out: the bundle carries no configuration of its source. Copy it from {model.source}"
            f"{at}, or name it: config="
        )
        return None
    else:
        file = carried.file if carried.part is None else carried.part
        if carried.part is None and "part" in bundle.manifest.extensions:
            notes("config.json is left out: the bundle carries only the configuration of the whole source.")
            return None
        data = read_listed(bundle.path, file, bundle.manifest.files[file], strict_json.MAX_BYTES)
    # Python writes NaN and the infinities into JSON, and reads them.
    raw = strict_json.parse(data, file, constant=float)
    if not isinstance(raw, dict):
        raise refusal("source.config", file, "an object", quoted(raw))
    plain = without_fields(raw, IMPLEMENTATION, REMOTE)
    if json.dumps(plain) != json.dumps(raw):
        notes("config.json lacks the fields of its source that select code.")
    changed = _with_dtype(plain, bundle.manifest.storage.dtype) if carried is not None and carried.cast else plain
    same = json.dumps(changed) == json.dumps(raw)  # as text, because NaN doesn't equal itself
    return data if same else f"{json.dumps(changed, indent=2)}\n".encode()


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
        raw = strict_json.parse(data, path, constant=float)
    except BundleError as error:
        notes(f"{path} is left out: {error}")
        return None
    plain = without_fields(raw, IMPLEMENTATION, REMOTE)
    if json.dumps(plain) == json.dumps(raw):
        return data
    notes(f"{path} lacks its fields that select code.")
    return f"{json.dumps(plain, indent=2)}\n".encode()
