"""The commands that need no converter."""

from __future__ import annotations

from typing import Final

from splitbundle.cli import (
    archives,
    cache,
    cast,
    chat,
    completion,
    diff,
    generate,
    inspect,
    kernels,
    keys,
    parts,
    peers,
    perplexity,
    plan,
    quantize,
    serve_files,
    serve_stage,
    share,
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
    share.PUSH,
    share.PULL,
    share.TAG,
    share.UNTAG,
    share.LIST,
    cache.COMMAND,
    serve_files.COMMAND,
    serve_stage.COMMAND,
    peers.COMMAND,
    keys.COMMAND,
    archives.PACK,
    archives.UNPACK,
    sign.COMMAND,
    cast.COMMAND,
    quantize.COMMAND,
    generate.COMMAND,
    chat.COMMAND,
    perplexity.COMMAND,
    kernels.COMMAND,
    completion.COMMAND,
)
