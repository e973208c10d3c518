"""Bugs that a reader can have, to be planted in a copy of one: the conformance kit must find each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A change of one place in the source, and the cases of the kit that are asked."""

    name: str
    file: str
    good: str
    """The text that is changed. It occurs once in the file."""
    bad: str
    cases: tuple[str, ...]
    """Parts of the names of cases, of which at least one must find the bug."""

    def plant(self, copy: Path) -> None:
        """Change the place in a copy of the checkout's sources."""
        place = copy / self.file
        text = place.read_text("utf-8")
        if text.count(self.good) != 1:
            raise ValueError(f"{self.file} has {self.good!r} {text.count(self.good)} times")
        place.write_text(text.replace(self.good, self.bad), "utf-8")


def bug(name: str, file: str, good: str, bad: str, *cases: str) -> Bug:
    """Return a bug."""
    return Bug(name=name, file=file, good=good, bad=bad, cases=cases)
