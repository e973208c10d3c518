"""The commands that need no converter."""

from __future__ import annotations

from typing import Final

from splitbundle.cli import (
    archives,
    cast,
    chat,
    completion,
    diff,
    generate,
    inspect,
    kernels,
    parts,
    perplexity,
    plan,
    sign,
    verify,
)

COMMANDS: Final = (
    inspect.COMMAND,
    verify.COMMAND,
    plan.COMMAND,
    diff.COMMAND,
    parts.FILES,
    parts.EXTRACT,
    parts.MERGE,
    archives.PACK,
    archives.UNPACK,
    sign.COMMAND,
    cast.COMMAND,
    generate.COMMAND,
    chat.COMMAND,
    perplexity.COMMAND,
    kernels.COMMAND,
    completion.COMMAND,
)
