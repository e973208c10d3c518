"""Check a checkpoint's configuration, let transformers parse it, and read the facts of the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from splitbundle.errors import BundleError, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.architecture.sizes import MAX_LAYERS
from splitbundle_converter.checkpoint import quantized
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.code_fields import IMPLEMENTATION, without_fields
from splitbundle_converter.errors import AGAIN, line, refusal
from splitbundle_converter.families.composites import COMPOSITES, TEXT, family_hint, text_type
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.evidence import Evidence, evidence
from splitbundle_converter.families.inert_fields import QUANTIZED, ROUTINE, is_inert, is_meaningful
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
UNREADABLE: Final = "Compare the file with the published one; transformers itself can't load this checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedConfiguration:
    """A configuration that can be converted, with the facts that it states."""

    family: Family
    architecture: Architecture
    values: dict[str, Any]
    """All fields, as transformers parses them and as the file has them."""
    not_used: dict[str, Any]
    """The fields of the file that neither the row nor transformers uses."""


def read_configuration(found: Configuration) -> JudgedConfiguration:
    """Return the family, the architecture and all fields of a configuration.

    Raises:
        BundleError: ``source.family``, ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    config = resolve(found)
    family, known = FAMILIES[config.model_type], evidence(config.model_type)
    values = all_values(found, config, known)
    reader = ConfigReader(values, known, found.file, found.pointer)
    architecture = family.facts(reader)
    reader.finish(architecture)
    return JudgedConfiguration(
        family=family,
        # The runtime's parser must accept the architecture. The same rules apply here, before any byte is written.
        architecture=parse_architecture(architecture.to_bytes()),
        values=values,
        not_used=unusual(reader.not_used, found),
    )


def all_values(found: Configuration, config: Any, known: Evidence) -> dict[str, Any]:
    """Return the fields of a parsed configuration, and those of the file that transformers did not get."""
    parsed: dict[str, Any] = config.to_dict()
    kept = {name: value for name, value in found.raw.items() if not _is_passed(name, value, known)}
    return parsed | {name: value for name, value in kept.items() if value is not None or name not in known.defaults}


def unusual(not_used: Mapping[str, Any], found: Configuration) -> dict[str, Any]:
    """Return those of the unused fields that the file has itself, without the fields of nearly every configuration.

    The name of a field of an inner object has a dot in it.
    """
    return {
        name: value for name, value in not_used.items() if name not in ROUTINE and (name in found.raw or "." in name)
    }


def resolve(found: Configuration, *, inert: bool = True) -> Any:
    """Return the configuration of a language model as transformers parses it. Remote code never runs.

    ``inert`` is as for ``build``.

    Raises:
        BundleError: ``source.family``, ``source.remote-code``, ``source.quantised``, ``source.config``.
    """
    # Only classes of the table are built: some others build a list whose length a field of the file determines.
    model_type = an_object(found).get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        refuse_unknown_code(found)
        if isinstance(model_type, str) and model_type in COMPOSITES:
            readable(found)  # its language part can be converted, unless it is quantized
        raise _field_refusal("source.family", found, "model_type", EXPECTED, family_hint(found.raw, FAMILIES))
    refuse_old_transformers(found)
    readable(found)
    check_counts(found)
    return build(found, inert=inert)


def an_object(found: Configuration) -> dict[str, Any]:
    """Return the fields of a configuration, or of a part of one.

    Raises:
        BundleError: ``source.config`` if it is no object.
    """
    if not isinstance(found.raw, dict):
        raise refusal("source.config", found.file, "an object", quoted(found.raw), AGAIN, found.pointer or None)
    fields: dict[str, Any] = found.raw
    return fields


def refuse_unknown_code(found: Configuration) -> None:
    """Refuse code of the checkpoint for a type that transformers does not compute itself.

    Raises:
        BundleError: ``source.remote-code``.
    """
    from transformers import CONFIG_MAPPING

    model_type = found.raw.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if is_meaningful(found.raw.get("auto_map")) and not known:
        hint = "splitbundle never runs code of a checkpoint, and transformers has no class for this model_type"
        raise _field_refusal("source.remote-code", found, "auto_map", "no auto_map", hint)


def refuse_old_transformers(found: Configuration) -> None:
    """Refuse a type of the table that the installed transformers does not have yet.

    Raises:
        BundleError: ``source.family``.
    """
    from transformers import CONFIG_MAPPING, __version__

    if found.raw["model_type"] not in CONFIG_MAPPING:
        expected, hint = "a type that transformers knows", f"pip install --upgrade transformers; this is {__version__}"
        raise _field_refusal("source.family", found, "model_type", expected, hint)


def readable(found: Configuration) -> dict[str, Any]:
    """Return the fields of a configuration, or of a part of one. Refuse quantized weights.

    Raises:
        BundleError: ``source.quantised``, ``source.config``.
    """
    raw = an_object(found)
    for name, value in raw.items():
        if QUANTIZED.fullmatch(name) and is_meaningful(value):
            raise _field_refusal("source.quantised", found, name, "weights that aren't quantized", quantized.HINT)
    return raw


def refuse_unchecked_code(found: Configuration) -> None:
    """Refuse ``auto_map`` for a conversion that does not compare the results with those of transformers' own class.

    Raises:
        BundleError: ``source.remote-code``.
    """
    nested = found.raw.get(TEXT)
    if isinstance(nested, dict):
        refuse_unchecked_code(Configuration(raw=nested, file=found.file, pointer=f"/{TEXT}"))
    if is_meaningful(found.raw.get("auto_map")):
        hint = (
            f"The checkpoint has code of its own, which may compute something else than transformers' "
            f"{found.raw.get('model_type')}. Convert it with the check, which compares the results"
        )
        raise _field_refusal("source.remote-code", found, "auto_map", "no auto_map in a conversion without check", hint)


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


def build(found: Configuration, *, inert: bool = True) -> Any:
    """Return the configuration as transformers parses it. Call this only for types that are known to be safe.

    transformers gets only the fields that it declares or reads.

    Args:
        found: The configuration.
        inert: Whether to pass the fields that change no logits. Without them, transformers uses its defaults, and no
            padding token. If it can't read them, they are left out in any case.

    Raises:
        BundleError: ``source.config``.
    """
    known = evidence_of(found)
    raw = _passed(found.raw, known)
    text = text_type(raw) if isinstance(raw.get(TEXT), dict) else None
    if text in FAMILIES:
        raw[TEXT] = _passed(raw[TEXT], evidence(text))
    without_inert = {name: value for name, value in raw.items() if name == "model_type" or not is_inert(name)}
    if "pad_token_id" in known.defaults:
        without_inert["pad_token_id"] = None  # the default may be a token that a small vocabulary lacks
    first: Exception | None = None
    for fields in (raw, without_inert) if inert else (without_inert,):
        config, error = parse(fields)
        first = first or error
        if error is None:
            for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
                if part is not None:
                    part.return_dict = True  # the outputs of the original are found by their names
            return config
    expected, got = "a configuration that transformers reads", line(first or ValueError())
    culprit = next((name for name in raw if name != "model_type" and parse(_dropped(raw, name))[1] is None), None)
    pointer = f"{found.pointer}/{culprit}" if culprit is not None else found.pointer or None
    raise refusal("source.config", found.file, expected, got, UNREADABLE, pointer) from first


def evidence_of(found: Configuration) -> Evidence:
    """Return what transformers does with the fields of a configuration of a known type."""
    model_type = found.raw["model_type"]
    composite = COMPOSITES.get(model_type) if model_type not in FAMILIES else None
    return evidence(model_type, composite.class_name if composite is not None else None)


def _passed(raw: Mapping[str, Any], known: Evidence) -> dict[str, Any]:
    """Return the fields that transformers gets."""
    return {name: value for name, value in raw.items() if name == "model_type" or _is_passed(name, value, known)}


def _is_passed(name: str, value: object, known: Evidence) -> bool:
    # Null means a default that is null or false: transformers itself may refuse it.
    nothing = value is None and not known.defaults.get(name)
    return known.knows(name) and not QUANTIZED.fullmatch(name) and not nothing


def _dropped(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in raw.items() if other != name}


def parse(raw: dict[str, Any]) -> tuple[Any, Exception | None]:
    """Return the configuration that transformers makes of the fields, or the error that it raises.

    Call this only for types that are known to be safe. At any depth, the fields that select code are removed.
    """
    from transformers import CONFIG_MAPPING

    try:
        with quiet():
            return CONFIG_MAPPING[raw["model_type"]].from_dict(without_fields(raw, IMPLEMENTATION)), None
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError, AttributeError, NotImplementedError) as error:
        return None, error
    except Exception as error:  # huggingface_hub's validation errors derive from Exception alone
        if not type(error).__module__.startswith("huggingface_hub"):
            raise
        return None, error


def _field_refusal(code: str, found: Configuration, field: str, expected: str, hint: str | None = None) -> BundleError:
    return refusal(code, found.file, expected, quoted(found.raw.get(field)), hint, f"{found.pointer}/{field}")
