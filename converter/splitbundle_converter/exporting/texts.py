"""Write what a bundle's ``text.json`` says into the files of a checkpoint, where it isn't what they say already."""

from __future__ import annotations

import json
from typing import Any, Final

from splitbundle.bundle import Bundle
from splitbundle.format.text_document import DEFAULT, Defaults
from splitbundle.records import as_dict
from splitbundle.verification import text_rules
from splitbundle_converter.checkpoint.file_names import GENERATION, TEMPLATES
from splitbundle_converter.options import Note
from splitbundle_converter.text.source_texts import TEMPLATE_FILE, chat_templates, generation_defaults

_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_NAMES: Final = {"sample": "do_sample"}
"""Fields of ``defaults`` that have another name in ``generation_config.json``."""


def with_texts(files: dict[str, bytes], bundle: Bundle, notes: Note) -> dict[str, bytes]:
    """Return the files of a checkpoint with the chat templates and the defaults of ``text.json``.

    Files that say the same already stay as they are, byte for byte.

    Args:
        files: The tokenizer's files and ``generation_config.json``, by their names in a checkpoint.
        bundle: The bundle.
        notes: A function that is called with a sentence for each thing that isn't as in the source.

    Raises:
        BundleError: ``file.*``, ``json.*``, ``field.*``, ``text.version``.
    """
    document = text_rules.read(bundle)
    if document is None:
        return files
    made = dict(files)
    config = _parsed(files.get(_TOKENIZER_CONFIG))
    if chat_templates(files, config, _quiet) != document.templates:
        notes("The chat templates are those of text.json, which aren't the source's.")
        made = {name: data for name, data in made.items() if name != TEMPLATE_FILE and not name.startswith(TEMPLATES)}
        if config.pop("chat_template", None) is not None:
            made[_TOKENIZER_CONFIG] = _written(config)
        for name, template in document.templates.items():
            made[TEMPLATE_FILE if name == DEFAULT else f"{TEMPLATES}/{name}.jinja"] = template.encode("utf-8")
    source = generation_defaults(files.get(GENERATION), _quiet)
    if source != document.defaults:
        notes("The defaults of generation are those of text.json, which aren't the source's.")
        made[GENERATION] = _written(_with_defaults(_parsed(files.get(GENERATION)), source, document.defaults))
    return made


def _with_defaults(config: dict[str, Any], source: Defaults, wanted: Defaults) -> dict[str, Any]:
    """Return a generation_config.json with other defaults. Only fields that differ are touched."""
    before, after = as_dict(source), as_dict(wanted)
    for name, value in after.items():
        own = _NAMES.get(name, name)
        if value == before[name]:
            continue
        if value is None:
            config.pop(own, None)
        else:
            config[own] = value
    return config


def _parsed(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")  # its numbers may be beyond strict JSON, as 1e30 for the longest text
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(value: dict[str, Any]) -> bytes:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()


def _quiet(_: str) -> None:
    pass
