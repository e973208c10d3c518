"""How a token is drawn, the same in every backend: one uniform number a row, and the inverse distribution."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.integers import as_integer, as_number
from splitbundle.records import record

NOT_FINITE: Final = Problem(
    code="input.value",
    argument="logits",
    expected="numbers",
    got="NaN or infinity",
    hint="Some weights are NaN or infinite, or the dtype is too narrow for this model: try another dtype",
)
MAX_BIASES: Final = 2**16
FILTERS: Final = ("top_k", "top_p", "min_p", "typical_p")
"""The arguments that leave out unlikely tokens."""


@record(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest token, and the lowest id among equals.

    The steps come in this order: the bias, the penalties (also at temperature 0), the temperature, ``top_k``,
    ``top_p``, ``min_p``, ``typical_p``. Each works on what the one before left, as in transformers.
    """

    temperature: float = 0.0
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float | None = None
    """Draw only among the likeliest tokens that reach this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    min_p: float | None = None
    """Draw only among tokens of at least this share of the likeliest one's probability (arXiv:2407.01082)."""
    typical_p: float | None = None
    """Draw only among the tokens whose surprise is nearest to the entropy, as many as reach this probability (Meister
    et al. 2022, arXiv:2202.00666)."""
    repetition_penalty: float | None = None
    """Divide the positive logits of tokens of the prompt and of new tokens by this, and multiply negative ones (Keskar
    et al. 2019, arXiv:1909.05858)."""
    presence_penalty: float | None = None
    """Subtract this from the logit of each new token that was drawn before, as OpenAI's interface does."""
    frequency_penalty: float | None = None
    """Subtract this from the logit of each new token, times the number of times that it was drawn before."""
    logit_bias: Mapping[int, float] | None = None
    """Add these numbers to the logits of these ids."""
    seed: int | None = None

    @classmethod
    def of(cls, **given: object) -> Sampling:
        """Return the sampling for the arguments of a caller, whose numbers may be of any library.

        A filter without a temperature means temperature 1.

        Raises:
            BundleError: ``input.value``.
        """
        given = _drawing(given)
        numbers = {name: as_number(value) for name, value in given.items()}
        made: dict[str, Any] = {
            name: value if numbers[name] is None else numbers[name] for name, value in given.items()
        }
        if isinstance(made.get("logit_bias"), Mapping):
            made["logit_bias"] = {
                as_integer(token): as_number(value) for token, value in list(made["logit_bias"].items())
            }
        return cls(**made)

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> None:
            got = quoted(getattr(self, name))
            raise BundleError(Problem(code="input.value", argument=name, expected=expected, got=got))

        def within(name: str, least: float, most: float, expected: str, *, above: bool = False) -> None:
            value = getattr(self, name)
            if value is None:
                return
            if type(value) not in (int, float) or not least <= value <= most or (above and value == least):
                refuse(name, expected)

        if self.temperature is None:
            refuse("temperature", "a number from 0")
        within("temperature", 0, 1.7e308, "a number from 0")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            refuse("top_k", "a number from 1, or None")
        within("top_p", 0, 1, "a number above 0, up to 1, or None", above=True)
        within("min_p", 0, 1, "a number from 0 to 1, or None")
        within("typical_p", 0, 1, "a number above 0, up to 1, or None", above=True)
        within("repetition_penalty", 1e-30, 1e30, "a number from 1e-30 to 1e30, or None")  # logits stay finite
        within("presence_penalty", -1e30, 1e30, "a number, or None")
        within("frequency_penalty", -1e30, 1e30, "a number, or None")
        if self.seed is not None and type(self.seed) is not int:
            refuse("seed", "a number, or None")
        if self.logit_bias is not None and not _are_biases(self.logit_bias):
            refuse("logit_bias", f"up to {MAX_BIASES} token ids, each with a finite number, or None")

    @property
    def adjusts(self) -> bool:
        """Return whether logits are changed by a bias or a penalty."""
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty not in (None, 1)
        )

    @property
    def filters_least(self) -> bool:
        """Return whether ``min_p`` or ``typical_p`` leaves out tokens."""
        return bool(self.min_p) or self.typical_p not in (None, 1)


def _drawing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of sampling with temperature 1 if they have a filter and no temperature.

    A filter means nothing where the likeliest token is taken, so a caller who gives one wants draws.
    """
    filtered = "temperature" not in given and any(given.get(name) is not None for name in FILTERS)
    return {"temperature": 1.0, **given} if filtered else dict(given)


def with_defaults(given: Mapping[str, Any], document: Any) -> dict[str, Any]:
    """Return the arguments of sampling, those that aren't given from the defaults of the model's makers.

    Args:
        given: the arguments of the caller; None where it gave none.
        document: the bundle's text document, or None for no defaults.
    """
    found = {name: value for name, value in given.items() if value is not None}
    if document is None:
        return found
    defaults = document.defaults
    if defaults.repetition_penalty is not None:
        found.setdefault("repetition_penalty", defaults.repetition_penalty)
    if not defaults.sample or found.get("temperature") == 0:
        return found
    for name in FILTERS:
        if (value := getattr(defaults, name)) is not None:
            found.setdefault(name, value)
    found.setdefault("temperature", 1.0 if defaults.temperature is None else defaults.temperature)
    return found


def _are_biases(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MAX_BIASES
        and all(type(token) is int and token >= 0 for token in value)
        and all(type(bias) in (int, float) and abs(bias) <= 1e30 for bias in value.values())
    )


class History:
    """The tokens of each row that penalties count: all that the model has seen, and the new ones with their numbers."""

    def __init__(self, rows: Sequence[Sequence[int]], drawn: int = 0) -> None:
        """Begin with the tokens of each row, of which the last ``drawn`` are new ones."""
        self.seen = [set(row) for row in rows]
        self.new: list[Counter[int]] = [Counter(row[len(row) - drawn :]) for row in rows]

    def add(self, tokens: Sequence[int]) -> None:
        """Count a new token of each row, or none where it is negative."""
        for row, token in enumerate(tokens):
            if token >= 0:
                self.seen[row].add(token)
                self.new[row][token] += 1


class Generator(Protocol):
    """What gives uniform numbers: ``random.Random``, or ``RowGenerators``."""

    def random(self) -> float:
        """Return a number from [0, 1)."""


class RowGenerators:
    """A random generator for each row, so that the draws of a row don't depend on the other rows.

    Row 0 draws as ``random.Random(seed)`` does, and row i as ``random.Random(f"{seed}/{i}")``.
    """

    def __init__(self, seed: int | None, rows: int) -> None:
        self._rows = [random.Random(seed if not i or seed is None else f"{seed}/{i}") for i in range(rows)]
        self._next = 0

    def skip(self, draws: int) -> None:
        """Leave out some draws of each row, which were made before."""
        for generator in self._rows:
            for _ in range(draws):
                generator.random()

    def random(self) -> float:
        """Return a number from [0, 1) of the next row. After the last row comes the first."""
        generator = self._rows[self._next]
        self._next = (self._next + 1) % len(self._rows)
        return generator.random()
