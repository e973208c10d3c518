"""Load the original model of a language part: the checkpoint's own class with only the weights of the language part."""

from __future__ import annotations

from typing import Any, Final

import torch

from splitbundle.errors import BundleError, quoted
from splitbundle_converter.errors import refusal
from splitbundle_converter.families.composites import TEXT
from splitbundle_converter.families.configuration import build
from splitbundle_converter.language_part.language_part import LanguagePart
from splitbundle_converter.quiet_transformers import quiet
from splitbundle_converter.reference.golden_vectors import checked, from_tensors
from splitbundle_converter.reference.layered_original import LayeredOriginal
from splitbundle_converter.reference.module_weights import ModuleWeights, empty_original
from splitbundle_converter.reference.original_errors import UNCHECKED, fill_with_nothing

_MUST_BE_EMPTY: Final = ("missing_keys", "mismatched_keys", "unexpected_keys")
"""What transformers may not report when it loads a language part."""


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
    config = _configuration(part, inert=inert)
    with quiet():
        return _whole(part, config, _language_model(part, getattr(config, TEXT)))


def layered_original_part(part: LanguagePart, *, inert: bool = True) -> LayeredOriginal:
    """Return the same model, which runs with one of its layers in memory at a time.

    Raises:
        BundleError: as for ``load_original_part``.
    """
    config = _configuration(part, inert=inert)
    names = {own: name for name, own in part.own_names.items()}
    with quiet():
        language = empty_original(getattr(config, TEXT))
        weights = ModuleWeights(language, part.source, names, _MUST_BE_EMPTY)
        whole, _ = _whole(part, config, language)
    return LayeredOriginal(part.source, weights, part.family.modules, whole)


def _configuration(part: LanguagePart, *, inert: bool) -> Any:
    config = build(part.source.configuration(), inert=inert)
    config._attn_implementation = config._experts_implementation = "eager"
    getattr(config, TEXT).tie_word_embeddings = part.architecture.head.tied
    return config


def _whole(part: LanguagePart, config: Any, language: Any) -> tuple[Any, str]:
    """Return the checkpoint's class with this language model in it, and the name of the module list of the layers."""
    import transformers

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
    return checked(loaded, part.source, "every tensor that transformers wants of the language part", _MUST_BE_EMPTY)


def _place(part: LanguagePart, whole: Any, places: list[str]) -> str:
    if len(places) != 1:
        expected = f"one language model in {part.composite.class_name}"
        raise refusal("source.config", part.source.name, expected, quoted(places), UNCHECKED)
    return places[0]


def _missing_library(part: LanguagePart, error: ImportError) -> BundleError:
    expected = f"the libraries that {part.composite.class_name} needs"
    return refusal("backend.missing", None, expected, " ".join(str(error).split())[:300], UNCHECKED)
