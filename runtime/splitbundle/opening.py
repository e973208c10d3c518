"""Opening a bundle: its two documents, read and judged; no weights."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final, Literal

from splitbundle import architecture as architectures
from splitbundle import architecture_parser, files, manifest, manifest_parser, manifest_rules, strict_json
from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.manifest import Manifest
from splitbundle.replacing import mend

REPLACED: Final = 8
"""How often a bundle may be replaced while it is opened. Nobody is to be kept busy for ever."""


def open_bundle(
    path: str | os.PathLike[str],
    *,
    verify: Literal["never", "always"] = "never",
    id: str | None = None,  # noqa: A002
) -> Bundle:
    """Opens a bundle: reads its manifest and architecture, and no weights.

    Args:
        path: the bundle's directory.
        verify: ``"never"`` maps weights when they are needed, once their sizes and headers are known to be those that
            are listed; their digests are checked by ``Bundle.verify``. ``"always"`` reads each file that is needed into
            private memory, once, hashes it there, and computes on just those bytes: whatever happens to the file
            afterwards changes no number and ends no process. It takes memory for the weights, and time to hash them.
        id: the bundle id that it must have, ``sha256:`` and 64 digits; checked before anything is parsed.

    Raises:
        BundleError: what is wrong with either file; ``file.missing`` where there is no bundle; ``file.digest`` where it
            isn't the one with that id.
    """
    if verify not in ("never", "always"):
        expected = "never or always"
        raise BundleError(Problem(code="input.value", argument="verify", expected=expected, got=quoted(verify)))
    root = Path(os.path.abspath(path))  # so that it stays where it is when the process changes its directory
    there = ""
    try:
        mend(root)
        if not (root / manifest.FILE).exists():
            there = "a directory without it" if root.is_dir() else "a file" if root.exists() else "nothing there"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise BundleError(files.unreadable(str(path), error)) from error
        there = f"{error.strerror}"
    if there:
        raise BundleError(
            Problem(
                code="file.missing",
                file=str(path),
                expected=f"a bundle, a directory with a {manifest.FILE}",
                got=there,
                hint="splitbundle convert SOURCE -o NAME.splitbundle makes one",
            )
        )
    data, parsed, document = _documents(root, id)
    architecture = architecture_parser.parse(document)
    manifest_rules.check_against(parsed, architecture)
    return Bundle(root, parsed, architecture, manifest.identity(data), strict=verify == "always")


def _documents(root: Path, wanted: str | None) -> tuple[bytes, Manifest, bytes]:
    """Manifest and architecture, of one bundle: where it was replaced between the two looks, of the new one."""
    data = _manifest(root, wanted)
    for more in reversed(range(REPLACED)):
        parsed = manifest_parser.parse(data)
        try:
            listed = parsed.files[architectures.FILE]
            return data, parsed, files.read_listed(root, architectures.FILE, listed, strict_json.MAX_BYTES)
        except BundleError as error:
            now = _manifest(root, wanted)
            if now == data or not more:
                from splitbundle import verification

                raise BundleError([*error.problems, *verification.blame_manifest(root, data)]) from error
            data = now
    raise AssertionError  # the last round returns or raises


def _manifest(root: Path, wanted: str | None) -> bytes:
    data = files.read_file(root, manifest.FILE, strict_json.MAX_BYTES)
    identity = manifest.identity(data)
    if wanted not in (None, identity):
        expected, hint = f"the bundle id {quoted(wanted)}", "It is another bundle, or a changed one"
        raise BundleError(Problem(code="file.digest", file=manifest.FILE, expected=expected, got=identity, hint=hint))
    return data
