"""The commands that need no converter."""

from __future__ import annotations

from typing import Final

from splitbundle.cli import completion, diff, generate, inspect, kernels, plan, verify

COMMANDS: Final = (
    inspect.COMMAND,
    verify.COMMAND,
    plan.COMMAND,
    diff.COMMAND,
    generate.COMMAND,
    kernels.COMMAND,
    completion.COMMAND,
)
