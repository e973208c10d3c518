"""Check a checkpoint's configuration, let transformers parse it, and read the facts of the architecture."""

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
"""The maximum number of classes of a classifier: several times as many as the largest data sets have."""
_COUNTS: Final = {
    "num_hidden_layers": (1, MAX_LAYERS),
    "n_layer": (1, MAX_LAYERS),
    "num_labels": (0, _MAX_LABELS),
    "_num_labels": (0, _MAX_LABELS),
}
"""A field for which transformers builds a list -> the minimum and maximum length that is accepted."""
_IMPLEMENTATION: Final = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
"""Fields that select the code of attention or experts. For some values, transformers fetches code from the hub and
runs it."""


def read_configuration(found: Configuration) -> tuple[Family, Architecture, dict[str, Any]]:
    """Return the family, the architecture and all fields of a configuration.

    Raises:
        BundleError: ``source.family``, ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    config = resolve(found)
    values = config.to_dict()
    family = FAMILIES[config.model_type]
    reader = ConfigReader(values, type(config)().to_dict(), found.file, found.pointer)
    architecture = family.facts(reader)
    reader.finish()
    # The runtime's parser must accept the architecture. The same rules apply here, before any byte is written.
    return family, parse_architecture(architecture.to_bytes()), values


def resolve(found: Configuration) -> Any:
    """Return the configuration of a language model as transformers parses it. Remote code never runs.

    Raises:
        BundleError: ``source.family``, ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    raw = readable(found)
    # Only classes of the table are built: some others build a list whose length a field of the file determines.
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _field_refusal("source.family", found, "model_type", EXPECTED, family_hint(raw, FAMILIES))
    check_counts(found)
    return build(found)


def readable(found: Configuration) -> dict[str, Any]:
    """Return the fields of a configuration, or of a part of one. Refuse remote code and quantized weights.

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
        hint = "Convert the checkpoint that was quantized"
        raise _field_refusal("source.quantised", found, "quantization_config", "weights that aren't quantized", hint)
    return raw


def check_counts(found: Configuration) -> None:
    """Check that the numbers of layers and labels are plausible: some classes build a list of this length.

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
    """Return the number of layers in GPT-Neo's pairs of a list and a count. Items that are no pair add none."""
    pairs = [item for item in types if isinstance(item, list) and len(item) > 1] if isinstance(types, list) else []
    # An empty list counts as one item: transformers also repeats it as often as its pair requires.
    return sum(
        max(1, len(kinds) if isinstance(kinds, list | str | dict) else 0) * times
        for kinds, times, *_ in pairs
        if type(times) is int and times > 0
    )


def build(found: Configuration) -> Any:
    """Return the configuration as transformers parses it. Call this only for types that are known to be safe.

    At any depth, the fields that select code are removed first.

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
    """Return a copy without the fields that select code. transformers may change the copy."""
    if isinstance(value, dict):
        return {
            name: _without_implementations(inner)
            for name, inner in value.items()
            if not _IMPLEMENTATION.fullmatch(name)
        }
    return [_without_implementations(inner) for inner in value] if isinstance(value, list) else value


def _field_refusal(code: str, found: Configuration, field: str, expected: str, hint: str | None = None) -> BundleError:
    return refusal(code, found.file, expected, quoted(found.raw.get(field)), hint, f"{found.pointer}/{field}")
