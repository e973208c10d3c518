"""How a token is drawn, the same in every backend: one uniform number a row, and the inverse distribution."""

from __future__ import annotations

from typing import Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.integers import as_number
from splitbundle.records import record

NOT_FINITE: Final = Problem(
    code="input.value",
    argument="logits",
    expected="numbers",
    got="NaN or infinity",
    hint="Some weights are NaN or infinite, or the dtype is too narrow for this model: try another dtype",
)


@record(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest token, and the lowest id among equals."""

    temperature: float = 0.0
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float | None = None
    """Draw only among the likeliest tokens that reach this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    seed: int | None = None

    @classmethod
    def of(cls, **given: object) -> Sampling:
        """Return the sampling for the arguments of a caller, whose numbers may be of any library.

        Raises:
            BundleError: ``input.value``.
        """
        numbers = {name: as_number(value) for name, value in given.items()}
        return cls(**{name: value if numbers[name] is None else numbers[name] for name, value in given.items()})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        def is_number(value: object) -> bool:
            return type(value) in (int, float)

        for name, good, expected in (
            ("temperature", is_number(self.temperature) and 0 <= self.temperature < float("inf"), "a number from 0"),
            ("top_k", self.top_k is None or (type(self.top_k) is int and self.top_k >= 1), "a number from 1, or None"),
            (
                "top_p",
                self.top_p is None or (is_number(self.top_p) and 0 < self.top_p <= 1),
                "a number above 0, up to 1, or None",
            ),
            ("seed", self.seed is None or type(self.seed) is int, "a number, or None"),
        ):
            if not good:
                got = quoted(getattr(self, name))
                raise BundleError(Problem(code="input.value", argument=name, expected=expected, got=got))
