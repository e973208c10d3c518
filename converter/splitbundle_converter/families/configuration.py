"""A checkpoint's configuration: what is refused before transformers sees it, what it makes of it, and the facts."""

from __future__ import annotations

import re
from typing import Any, Final

from splitbundle.errors import BundleError, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.architecture.sizes import MAX_LAYERS
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.errors import line, refusal
from splitbundle_converter.families.composites import family_hint
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.row import Family
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.families.unsupported import EXPECTED
from splitbundle_converter.quiet_transformers import quiet

_MAX_LABELS: Final = 100_000
"""Of a classifier's classes: several times those of the largest data sets."""
_COUNTS: Final = {
    "num_hidden_layers": (1, MAX_LAYERS),
    "n_layer": (1, MAX_LAYERS),
    "num_labels": (0, _MAX_LABELS),
    "_num_labels": (0, _MAX_LABELS),
}
"""Numbers of items that transformers makes, whatever else it is told, and which of them are let through."""
_IMPLEMENTATION: Final = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
"""Fields that choose the code that computes. transformers takes some names for code of the hub, which it fetches and
runs."""


def read_configuration(found: Configuration) -> tuple[Family, Architecture, dict[str, Any]]:
    """The family, the facts and all fields of a configuration.

    Raises:
        BundleError: ``source.family``, ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    config = resolve(found)
    values = config.to_dict()
    family = FAMILIES[config.model_type]
    reader = ConfigReader(values, type(config)().to_dict(), found.file, found.pointer)
    architecture = family.facts(reader)
    reader.finish()
    # What is written must be what a reader takes: the same rules, before a byte is written.
    return family, parse_architecture(architecture.to_bytes()), values


def resolve(found: Configuration) -> Any:
    """The configuration of a language model as transformers reads it. Remote code never runs.

    Raises:
        BundleError: ``source.family``, ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    raw = readable(found)
    # Other classes than those of the table aren't even built: some make a list of as many items as a field says.
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _field_refusal("source.family", found, "model_type", EXPECTED, family_hint(raw, FAMILIES))
    check_counts(found)
    return build(found)


def readable(found: Configuration) -> dict[str, Any]:
    """The fields, of a configuration or a part of one that asks for no code of its own and no quantised weights.

    Raises:
        BundleError: ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    raw = found.raw
    if not isinstance(raw, dict):
        raise refusal("source.config", found.file, "an object", quoted(raw), pointer=found.pointer or None)
    if "auto_map" in raw:
        hint, model_type = "splitbundle never runs code of a checkpoint", raw.get("model_type")
        if isinstance(model_type, str) and model_type in FAMILIES:
            hint += f". transformers computes {model_type} itself: if these are its weights, remove auto_map"
        raise _field_refusal("source.remote-code", found, "auto_map", "no auto_map", hint)
    if raw.get("quantization_config") is not None:
        hint = "Convert the checkpoint that was quantised"
        raise _field_refusal("source.quantised", found, "quantization_config", "weights that aren't quantised", hint)
    return raw


def check_counts(found: Configuration) -> None:
    """Refuses numbers of layers and labels that nothing has: some classes make as many items as such a field says.

    Raises:
        BundleError: ``source.config``.
    """
    for field, (least, most) in _COUNTS.items():
        count = found.raw.get(field)
        if type(count) is int and not least <= count <= most:
            raise _field_refusal("source.config", found, field, f"an integer from {least} to {most}")
    if _repeated(found.raw.get("attention_types")) > MAX_LAYERS:
        expected = f"lists of kinds that are repeated to at most {MAX_LAYERS} layers"
        raise _field_refusal("source.config", found, "attention_types", expected)


def _repeated(types: object) -> int:
    """How many layers GPT-Neo's pairs of a list and a number of repetitions make; what is no pair, it refuses."""
    pairs = [item for item in types if isinstance(item, list) and len(item) > 1] if isinstance(types, list) else []
    # An empty list, too, is repeated as often as it says.
    return sum(
        max(1, len(kinds) if isinstance(kinds, list | str | dict) else 0) * times
        for kinds, times, *_ in pairs
        if type(times) is int and times > 0
    )


def build(found: Configuration) -> Any:
    """The configuration as transformers reads it. Only for types that are known to be safe to build.

    No field says by which code it is to be computed, at any depth.

    Raises:
        BundleError: ``source.config``.
    """
    from transformers import CONFIG_MAPPING

    expected = "a configuration that transformers reads"
    try:
        with quiet():
            return CONFIG_MAPPING[found.raw["model_type"]].from_dict(_without_implementations(found.raw))
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError, AttributeError) as error:
        raise refusal("source.config", found.file, expected, line(error), pointer=found.pointer or None) from error
    except Exception as error:  # huggingface_hub's validation errors derive from Exception alone
        if not type(error).__module__.startswith("huggingface_hub"):
            raise
        raise refusal("source.config", found.file, expected, line(error), pointer=found.pointer or None) from error


def _without_implementations(value: Any) -> Any:
    """A copy, as what reads it may change it."""
    if isinstance(value, dict):
        return {
            name: _without_implementations(inner)
            for name, inner in value.items()
            if not _IMPLEMENTATION.fullmatch(name)
        }
    return [_without_implementations(inner) for inner in value] if isinstance(value, list) else value


def _field_refusal(code: str, found: Configuration, field: str, expected: str, hint: str | None = None) -> BundleError:
    return refusal(code, found.file, expected, quoted(found.raw.get(field)), hint, f"{found.pointer}/{field}")
