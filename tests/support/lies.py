"""Lies that a test server can tell, by name, and what a correct client does about each.

``LIES`` is for parametrization. A lie about content needs an answer that would have had content, and is told of the
true bytes. Any other lie takes the place of every answer, also to a request that sends something. ``LoopbackServer``
says how a lie is bound to requests. Each lie is told anew for each path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from tests.support import lies_of_answers, lies_of_content  # they fill LIES
from tests.support.http_server import LoopbackServer, Seen
from tests.support.lie import LIES, Lie
from tests.support.lies_of_content import PAGE

__all__ = ["LIES", "PAGE", "Lie", "after_first", "lies_of_answers", "lies_of_content", "names"]


def names(outcome: Literal["A", "R"] | None = None) -> list[str]:
    """Return the names of the lies with an outcome, or of all."""
    return [name for name, lie in LIES.items() if outcome in (None, lie.outcome)]


def after_first(server: LoopbackServer, fits: Callable[[Seen], bool], change: Callable[[], Any]) -> None:
    """Change a server between the first request that fits and the second: a tag that moves, a replaced file."""
    came = 0

    def hook(seen: Seen) -> None:
        nonlocal came
        came += fits(seen)
        if came == 2 and fits(seen):
            came += 1
            change()

    server.before.append(hook)
