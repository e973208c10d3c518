"""Read what the files of a checkpoint say about text: the chat templates, and how its makers generate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

from splitbundle.errors import quoted
from splitbundle.format.text_document import DEFAULT, MAX_TEMPLATE, MAX_TEMPLATES, Defaults
from splitbundle_converter.checkpoint.file_names import GENERATION, TEMPLATES
from splitbundle_converter.errors import source_json
from splitbundle_converter.options import Note

TEMPLATE_FILE: Final = "chat_template.jinja"
_UNUSED: Final = {
    **dict.fromkeys(("stop_strings", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "sequence_bias", "watermarking_config")),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_new_tokens", "min_length"), 0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "encoder_repetition_penalty", "guidance_scale"), 1),
}
"""Fields of ``generation_config.json`` that change what transformers generates -> their value that changes nothing."""


def chat_templates(files: Mapping[str, bytes], config: Mapping[str, Any], say: Note) -> dict[str, str]:
    """Return the chat templates of a checkpoint by name.

    Args:
        files: The tokenizer files by name.
        config: The parsed tokenizer_config.json.
        say: A function that is called with a sentence for each template that was left out.
    """
    found: dict[str, str] = {}
    for name, text in _each_template(files, config):
        if len(text) > MAX_TEMPLATE or len(found) == MAX_TEMPLATES:
            say(f"The chat template {quoted(name, 30)} was left out: it is too long, or there are too many.")
        elif re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
            found[name] = text
    return found


def _each_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of chat templates. As in transformers, files go before the configuration."""
    in_config = config.get("chat_template")
    if isinstance(in_config, str):
        yield DEFAULT, in_config
    for entry in in_config if isinstance(in_config, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str):
            yield entry["name"], entry["template"]
    for path, data in files.items():
        if path == TEMPLATE_FILE:
            yield DEFAULT, data.decode("utf-8", "replace")
        elif path.startswith(TEMPLATES):
            yield PurePosixPath(path).stem, data.decode("utf-8", "replace")


def generation_defaults(generation: bytes | None, say: Note) -> Defaults:
    """Return how the makers of a checkpoint generate.

    Args:
        generation: The content of ``generation_config.json``, or None.
        say: A function that is called with a sentence about fields that have no effect here.

    Raises:
        BundleError: ``json.*``.
    """
    config = source_json(generation, GENERATION) if generation is not None else {}
    values = config if isinstance(config, dict) else {}
    unused = sorted(name for name, usual in _UNUSED.items() if values.get(name, usual) not in (usual, None, []))
    if unused:
        say(f"{GENERATION} also has {', '.join(unused)}, by which no text is generated here.")

    def number(name: str, most: float = 1e37, *, zero: bool = False) -> float | None:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if 1e-37 <= value <= most or (zero and value == 0) else None

    top_k, sample = values.get("top_k"), values.get("do_sample")
    return Defaults(
        sample=sample if isinstance(sample, bool) else None,
        temperature=number("temperature", zero=True),
        top_k=top_k if type(top_k) is int and 0 < top_k < 2**53 else None,  # transformers takes 0 for no limit
        top_p=number("top_p", 1),
        min_p=number("min_p", 1, zero=True),
        typical_p=number("typical_p", 1),
        repetition_penalty=number("repetition_penalty"),
    )
