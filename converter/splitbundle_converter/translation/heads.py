"""Check the head of a checkpoint: it may be a causal language model's head, another task's head, or missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from splitbundle.errors import Problem, quoted
from splitbundle_converter.checkpoint.source import Checkpoint
from splitbundle_converter.errors import problem

_OTHER_TASKS: Final = ("score", "classifier", "qa_outputs")
"""The modules of transformers' heads for classifying texts and tokens, and for answering questions."""
_WRAPPED: Final = "Save the state dict of the model inside the wrapper, with the names that transformers gives"
_HINT: Final = "Only causal language models can be converted: "


def wrong_head(source: Checkpoint, head: Mapping[str, bool], *, base_alone: bool) -> Problem | None:
    """Return the problem of a checkpoint that lacks the head of a causal language model. Otherwise, return None.

    Args:
        source: The checkpoint.
        head: The name of each tensor of the family's head -> whether this model needs it.
        base_alone: Whether the base model was saved alone, without a prefix in its names.
    """
    if any(name in source.tensors for name in head):
        return None  # other problems are reported for each tensor
    for module in _OTHER_TASKS:
        other = sorted(name for name in source.tensors if name.startswith(f"{module}."))
        if other:
            file, expected = source.tensors[other[-1]].file, "the head of a causal language model"
            hint = f"{_HINT}convert the one that this was trained from"
            got = f"a head for another task{_of(source)}"
            return problem("source.tensor", file, expected, got, hint, f"/{other[-1]}")
    inside = next((name for name in source.tensors for own in head if name.endswith(f".{own}")), None)
    if inside is not None:
        expected, got = "the names that the model's tensors have", f"names with a prefix, as in {quoted(inside)}"
        return problem("source.tensor", source.tensors[inside].file, expected, got, _WRAPPED, f"/{inside}")
    needed = [name for name, needs in head.items() if needs]
    if needed and base_alone:
        expected = f"the head of a causal language model: {', '.join(map(quoted, needed))}"
        got = f"none, a base model that was saved without its head{_of(source)}"
        hint = f"{_HINT}save it with AutoModelForCausalLM, from a checkpoint that has the head"
        return problem("source.tensor", source.name, expected, got, hint)
    return None


def _of(source: Checkpoint) -> str:
    """Return the class that the configuration names, as the end of a sentence, or an empty string."""
    config = source.configuration().raw
    classes = config.get("architectures") if isinstance(config, dict) else None
    named = isinstance(classes, list) and len(classes) == 1 and isinstance(classes[0], str)
    return f", {classes[0][:100]}" if named and classes else ""
