"""Load the original model of a language part: the checkpoint's own class with only the weights of the language part."""

from __future__ import annotations

from typing import Any

import torch

from splitbundle.errors import BundleError, quoted
from splitbundle_converter.errors import refusal
from splitbundle_converter.families.composites import TEXT
from splitbundle_converter.families.configuration import build
from splitbundle_converter.language_part.language_part import LanguagePart
from splitbundle_converter.quiet_transformers import quiet
from splitbundle_converter.reference.golden_vectors import checked, from_tensors
from splitbundle_converter.reference.original_errors import UNCHECKED, fill_with_nothing


def load_original_part(part: LanguagePart, *, inert: bool = True) -> tuple[Any, str]:
    """Return the original model in float32, and the name of the module list that has its layers.

    The checkpoint's class is built without memory for its weights. Then its language model and its head are replaced by
    loaded modules. So the code of this class computes the reference results, but only the language part uses memory.
    All other weights are NaN: if one of them affects the result, the result is NaN too. ``inert`` is as for
    ``configuration.build``.

    Raises:
        BundleError: ``source.tensor``, ``source.config``, and ``backend.missing`` if the class needs a library that is
            not installed.
    """
    import transformers

    config = build(part.source.configuration(), inert=inert)
    config._attn_implementation = config._experts_implementation = "eager"
    text = getattr(config, TEXT)
    text.tie_word_embeddings = part.architecture.head.tied
    with quiet():
        language = _language_model(part, text)
        own_prefix = language.base_model_prefix + "."
        layers = part.family.modules.removeprefix(own_prefix)
        if part.composite.whole:
            return language, own_prefix + layers
        try:
            with torch.device("meta"):
                whole = getattr(transformers, part.composite.class_name)(config).eval()
        except ImportError as error:
            raise _missing_library(part, error) from error
    base, head = language.base_model, language.get_output_embeddings()
    place = _place(part, whole, [name for name, module in whole.named_modules() if type(module) is type(base)])
    whole.set_submodule(place, base)
    own_head = whole.get_output_embeddings()
    whole.set_submodule(
        _place(part, whole, [name for name, module in whole.named_modules() if module is own_head]), head
    )
    fill_with_nothing(whole)
    return whole, f"{place}.{layers}"


def _language_model(part: LanguagePart, text: Any) -> Any:
    with part.source.reader() as reader:
        loaded = from_tensors(text, {own: reader.get(name) for name, own in part.own_names.items()})
    expected = "every tensor that transformers wants of the language part"
    return checked(loaded, part.source, expected, ("missing_keys", "mismatched_keys", "unexpected_keys"))


def _place(part: LanguagePart, whole: Any, places: list[str]) -> str:
    if len(places) != 1:
        expected = f"one language model in {part.composite.class_name}"
        raise refusal("source.config", part.source.name, expected, quoted(places), UNCHECKED)
    return places[0]


def _missing_library(part: LanguagePart, error: ImportError) -> BundleError:
    expected = f"the libraries that {part.composite.class_name} needs"
    return refusal("backend.missing", None, expected, " ".join(str(error).split())[:300], UNCHECKED)
