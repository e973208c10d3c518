"""The commands that need no converter."""

from __future__ import annotations

from typing import Final

from splitbundle.cli import generate, inspect, verify

COMMANDS: Final = (inspect.COMMAND, verify.COMMAND, generate.COMMAND)
