"""Drive splitbundle with torch."""

from __future__ import annotations

from typing import Any

import torch

import splitbundle
from splitbundle import giving_way
from splitbundle.backends.torch import pipeline as _loaded_with_the_import  # noqa: F401  (as the peers' classes are)


class Driver:
    """A pipeline and its session."""

    def __init__(self, task: dict[str, Any]) -> None:
        torch.set_num_threads(task["threads"])
        if task["options"].get("gives_way"):
            giving_way.give_way()
        self.capacity = task["capacity"]
        self.pipeline = splitbundle.open(task["path"]).pipeline()
        self.session: Any = None
        self.last: Any = None

    def feed(self, rows: list[list[int]], anew: bool) -> None:
        """Compute the logits of the last position. The tokens follow the earlier ones, or start ``anew``."""
        if anew:
            self.session = self.pipeline.session(len(rows), self.capacity)
        with torch.no_grad():
            self.last = self.pipeline(torch.tensor(rows), session=self.session, logits="last")

    def logits(self) -> list[float]:
        """Return the logits of the first row. *Length:* vocabulary."""
        found: list[float] = self.last[0, -1].float().tolist()
        return found
