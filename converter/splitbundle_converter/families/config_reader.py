"""Read a configuration, and refuse each field that could change a number but was not read.

A row of the family table reads the fields that it knows. Every other field must be an ignored field or have its default
value. The reader refuses any other field, because it could change a number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted

IGNORED: Final = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_experts_implementation",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "do_sample",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_length",
        "min_length",
        "model_type",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
"""Fields of all configurations that change no number of a decoder in inference."""
TRAINING: Final = frozenset(
    [
        "activation_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "classifier_dropout",
        "dropout",
        "embd_pdrop",
        "embed_dropout",
        "embedding_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "init_std",
        "layerdrop",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ]
)
"""Fields for training, and for classification heads. They change no number of a language model in inference."""

UNSUPPORTED: Final = (
    "A model with this value can't be converted yet. Do not change the value: it would describe another model"
)


class ConfigReader:
    """A reader of typed fields of a configuration. It records which fields were read.

    A method that finds a problem notes it in ``problems`` and returns a valid substitute, so that one call of
    ``finish`` can report all problems.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], file: str, pointer: str = "") -> None:
        self._values, self._defaults, self._file, self._pointer = values, defaults, file, pointer
        self.read: set[str] = set()
        """The names of the fields that were read or are ignored."""
        self.problems: list[Problem] = []

    def inside(self, name: str) -> ConfigReader:
        """Return a reader of the object in a field. The caller adds its problems to the problems of this reader."""
        value = self.raw(name)
        return ConfigReader(value if isinstance(value, dict) else {}, {}, self._file, f"{self._pointer}/{name}")

    def unread(self) -> list[str]:
        """Return the names of the fields that were not read."""
        return [name for name in self._values if name not in self.read]

    def raw(self, name: str) -> Any:
        """Return the unchecked value of a field, or None if it is absent."""
        self.read.add(name)
        return self._values.get(name)

    def refuse(self, name: str, expected: str, got: object = None, hint: str | None = None) -> None:
        """Note that a field can't be converted. An equal problem is noted only once."""
        got = self._values.get(name) if got is None else got
        problem = Problem(
            code="source.config",
            file=self._file,
            pointer=f"{self._pointer}/{name}",
            expected=expected,
            got=quoted(got),
            hint=hint or UNSUPPORTED,
        )
        if problem not in self.problems:
            self.problems.append(problem)

    def integer(self, name: str, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """Return an integer field from ``minimum`` to ``maximum``."""
        value = self.raw(name)
        if type(value) is not int or not minimum <= value <= maximum:
            self.refuse(name, f"an integer from {minimum} to {maximum}")
            return minimum
        return value

    def number(self, name: str) -> float:
        """Return a finite number above zero."""
        value = self.raw(name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self.refuse(name, "a number above 0")
            return 1.0
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Return a finite number above zero, or None if the field is absent or null."""
        return None if self.raw(name) is None else self.number(name)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return an array of ``count`` finite numbers above zero."""
        values = self.raw(name)
        if not isinstance(values, list) or len(values) != count:
            self.refuse(name, f"{count} numbers")
        elif not all(type(value) in (int, float) and 0 < value < float("inf") for value in values):
            self.refuse(name, "numbers above 0")
        else:
            return tuple(float(value) for value in values)
        return (1.0,) * count

    def boolean(self, name: str) -> bool:
        """Return a boolean field."""
        value = self.raw(name)
        if type(value) is not bool:
            self.refuse(name, "true or false")
            return False
        return value

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """Return the item of ``choices`` for the value of a string field."""
        value = self.raw(name)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
            return next(iter(choices.values()))
        return choices[value]

    def allowed(self, name: str, *values: object) -> None:
        """Check that a field is absent or has one of ``values``, which change no number."""
        if name in self._values and self.raw(name) not in values:
            self.refuse(name, " or ".join(quoted(value) for value in values))

    def ignored(self, names: Collection[str]) -> None:
        """Mark fields as ignored: they change no number."""
        self.read.update(names)

    def finish(self) -> None:
        """Check that no problem was noted, and that each field was read, is ignored, or has its default value.

        Raises:
            BundleError: ``source.config``, with all problems.
        """
        for name, value in self._values.items():
            if name in self.read or name in IGNORED:
                continue
            if name not in self._defaults:
                self.refuse(
                    name,
                    "a field that is known for this family",
                    value,
                    "Remove it if it changes nothing",
                )
            elif value != self._defaults[name]:
                self.refuse(name, f"its default, {quoted(self._defaults[name])}", value)
        if self.problems:
            raise BundleError(self.problems)
