"""The grammar of the names of files and shards, and of digests.

A name must mean the same file on every file system, so it is lower-case ASCII and not a name that Windows reserves.
Tokenizer files keep the names that other tools expect. The grammar allows these names.
"""

from __future__ import annotations

import re
from typing import Final

MANIFEST: Final = "manifest.json"
SUMS: Final = "SHA256SUMS"
CARD: Final = "README.md"
SIGNATURES: Final = "signatures"
"""The directory of signatures. No manifest lists a file in it."""

_PART = re.compile(r"[a-z0-9_][a-z0-9._-]{0,99}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
_SHARD = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
SHARD_RULE: Final = "1 to 64 of a-z 0-9 _ -, not first _ or -, and no name that Windows reserves"
SHA256: Final = re.compile(r"[0-9a-f]{64}")
IDENTITY: Final = re.compile(r"sha256:[0-9a-f]{64}")
MAX_DEPTH: Final = 4
_SIGNATURE: Final = ".sigstore.json"
_DIRECTORY: Final = ".splitbundle"


def is_path(path: str) -> bool:
    """Return whether a manifest may list ``path``: relative, with ``/``, each component within the grammar."""
    if path == CARD:
        return True
    parts = path.split("/")
    return len(parts) <= MAX_DEPTH and all(is_part(part) for part in parts)


def is_own(path: str) -> bool:
    """Return whether ``path`` or its first directory would clash with one that the format has and no manifest lists."""
    return path.partition("/")[0].lower() in (MANIFEST, SUMS.lower(), SIGNATURES)


def is_shard(name: str) -> bool:
    """Return whether ``name`` may name a shard. Files are named after shards, too."""
    return bool(_SHARD.fullmatch(name)) and not _RESERVED.fullmatch(name)


def is_part(part: str) -> bool:
    """Return whether ``part`` may name a file or a directory."""
    return bool(_PART.fullmatch(part)) and not part.endswith(".") and not _RESERVED.fullmatch(part)


def is_signature(path: str) -> bool:
    """Return whether ``path`` is that of a signature: ``signatures/NAME.sigstore.json``."""
    directory, _, name = path.partition("/")
    return directory == SIGNATURES and is_part(name) and name.endswith(_SIGNATURE) and name != _SIGNATURE


def signature_path(name: str) -> str:
    """Return the path of a signature in a bundle. ``is_signature`` says whether the name is one that may be used."""
    return f"{SIGNATURES}/{name}{_SIGNATURE}"


def directory_name(model: str) -> str:
    """Return the name of a bundle's directory that follows from the model's name: a component within the grammar."""
    lower = re.sub("[A-Z]+", lambda found: found[0].lower(), model)  # of ASCII alone, as the specification has it
    name = re.sub(r"[^a-z0-9._-]+", "-", lower)[:80].strip("-.") or "model"
    return name + _DIRECTORY if is_part(name + _DIRECTORY) else f"model-{name}{_DIRECTORY}"


PATH_RULE: Final = (
    "a relative path of at most 4 components, each of a-z 0-9 . _ - (at most 100, not first . or -, not last .), "
    "and no name that Windows reserves"
)
