"""How a client treats the servers of a stage."""

from __future__ import annotations

import math
from typing import Any, Final

from splitbundle.errors import quoted, wrong_argument
from splitbundle.integers import as_number
from splitbundle.records import record
from splitbundle.wire.encodings import ENCODINGS

REPLAYS: Final = ("exact", "merged")


@record(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """How a client treats the servers of a stage. ``Bundle.stage`` explains each."""

    tls: str | None = None
    token: str | None = None
    wire: str | None = None
    replay: str = "exact"
    timeout: float = 30.0
    step_timeout: float = 300.0
    insecure: bool = False
    same_weights: bool = True

    @classmethod
    def of(cls, **given: Any) -> RemoteOptions:
        """Return the options of a call. None stands for the default.

        Raises:
            BundleError: ``input.value``.
        """
        options = cls(**{name: value for name, value in given.items() if value is not None})
        if options.wire is not None and options.wire not in ENCODINGS:
            raise wrong_argument("wire", f"one of {', '.join(ENCODINGS)}", quoted(options.wire))
        if options.replay not in REPLAYS:
            raise wrong_argument("replay", " or ".join(REPLAYS), quoted(options.replay))
        token = options.token
        if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
            raise wrong_argument("token", "a token of printable ASCII without spaces", "other characters")
        for name in ("timeout", "step_timeout"):
            number = as_number(getattr(options, name))
            if number is None or not 0 < number <= 86400 or not math.isfinite(number):
                raise wrong_argument(name, "seconds, above 0", quoted(getattr(options, name)))
        return options
