"""Make the configuration with which the language part's own class computes the same as the checkpoint's class."""

from __future__ import annotations

import json
from typing import Any, Final

from splitbundle.errors import BundleError
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.code_fields import IMPLEMENTATION, without_fields
from splitbundle_converter.families.composites import TEXT
from splitbundle_converter.families.configuration import build, read_configuration
from splitbundle_converter.language_part.language_part import LanguagePart

_NEUTRAL: Final[dict[str, dict[str, Any]]] = {
    "multiplier": {"logit_scale": 1.0, "logits_scaling": 1.0},
    "logit_cap": {"final_logit_softcapping": None},
}
"""A fact of the head -> the fields of configurations that state it, with the values that change nothing."""
_DTYPES: Final = ("dtype", "torch_dtype")


def own_configuration(part: LanguagePart) -> dict[str, Any] | None:
    """Return the fields of a ``config.json`` for the language model's own class.

    The checkpoint's class may tie the head in another way, and may leave out a fact of it. The fields say so.

    Returns:
        The fields, or None if no such configuration has exactly the facts of the bundle.

    Raises:
        BundleError: ``source.config``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = part.source.configuration()
    config = getattr(build(found), TEXT)
    own: dict[str, Any] = without_fields(json.loads(config.to_json_string()), IMPLEMENTATION)
    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the mapping has a class for each family
    own |= {"architectures": [original.__name__], "tie_word_embeddings": part.architecture.head.tied}
    if not any(own.get(name) for name in _DTYPES):
        # The configuration of the whole states the dtype for its parts.
        own["dtype"] = next((value for name in _DTYPES if isinstance(value := found.raw.get(name), str)), None)
    for fact in part.not_applied:
        own |= {field: nothing for field, nothing in _NEUTRAL[fact].items() if hasattr(config, field)}
    try:
        judged = read_configuration(Configuration(raw=own, file=found.file))
    except BundleError:
        return None
    return own if judged.architecture == part.architecture else None
