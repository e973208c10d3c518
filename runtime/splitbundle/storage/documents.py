"""Read the two documents of a bundle, and check that they fit each other."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from splitbundle.errors import BundleError, Problem, VerificationError, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.manifest import document, rules
from splitbundle.format.manifest.document import Manifest
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.storage import files
from splitbundle.storage.archive_kind import file_kind, next_step
from splitbundle.storage.drafts import telling_of_draft
from splitbundle.storage.recovery import recover

MAX_REPLACEMENTS: Final = 8
"""How often a bundle may be replaced while it is opened. The limit ends a loop that a busy writer could keep going."""


class Documents(NamedTuple):
    """The manifest, the architecture and the id of a bundle."""

    manifest: Manifest
    architecture: Architecture
    id: str
    """``sha256:`` of manifest.json."""


def find_bundle(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a bundle's directory. Undo a replacement that was interrupted.

    Raises:
        BundleError: ``file.missing`` if there is no bundle; ``file.unreadable``.
    """
    root = Path(os.path.abspath(path))  # so that the path stays right if the process changes its directory
    there, archive = "", None
    try:
        recover(root)
        if not _has_manifest(root):
            archive = None if root.is_dir() else file_kind(root)
            file = "a file" if archive is None else f"a {archive} archive"
            there = "a directory without it" if root.is_dir() else file if root.exists() else "nothing there"
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise BundleError(files.unreadable(str(path), error)) from error
        there = f"{error.strerror}"
    if there:
        hint = 'splitbundle_converter.convert(SOURCE, "NAME.splitbundle") makes one'
        raise BundleError(
            Problem(
                code="file.missing",
                file=str(path),
                expected=f"a bundle, a directory with a {document.FILE}",
                got=there,
                hint=hint if archive is None else next_step(str(path), archive),
            )
        )
    return root


def _has_manifest(root: Path) -> bool:
    """Return whether something has the manifest's name. A link that leads nowhere is refused when it is read."""
    try:
        os.lstat(root / document.FILE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_documents(root: Path, id: str | None = None) -> Documents:  # noqa: A002
    """Read ``manifest.json`` and ``architecture.json``. Check each, and that they fit each other.

    Args:
        root: the bundle's directory.
        id: the expected bundle id. It is checked before anything is parsed.

    Raises:
        BundleError: every problem of either file; ``file.digest`` if the bundle has another id.
    """
    with telling_of_draft(root):
        data, parsed, architecture_data = _read_both(root, id)
        architecture = parse_architecture(architecture_data)
        rules.check_against(parsed, architecture)
        return Documents(parsed, architecture, document.identity(data))


def _read_both(root: Path, wanted: str | None) -> tuple[bytes, Manifest, bytes]:
    """Return both files of one bundle. If the bundle is replaced between the two reads, read both again."""
    data = _manifest(root, wanted)
    for more in reversed(range(MAX_REPLACEMENTS)):
        parsed = parse_manifest(data)
        try:
            listed = parsed.files[architectures.FILE]
            return data, parsed, files.read_listed(root, architectures.FILE, listed, strict_json.MAX_BYTES)
        except BundleError as error:
            now = _manifest(root, wanted)
            if now == data or not more:
                raise BundleError([*error.problems, *explain_mismatch(root, data)]) from error
            data = now
    raise AssertionError  # the last round returns or raises


def _manifest(root: Path, wanted: str | None) -> bytes:
    data = files.read_file(root, document.FILE, strict_json.MAX_BYTES)
    identity = document.identity(data)
    if wanted not in (None, identity):
        expected, hint = f"the bundle id {quoted(wanted)}", "It is another bundle, or a changed one"
        raise BundleError(Problem(code="file.digest", file=document.FILE, expected=expected, got=identity, hint=hint))
    return data


@contextmanager
def telling_of_replacement(root: Path, id: str) -> Iterator[None]:  # noqa: A002
    """If the block fails on a bundle that isn't the opened one any more, say that in place of what follows from it.

    Raises:
        BundleError: ``file.digest`` or ``file.missing`` for manifest.json; else the block's own errors.
    """
    try:
        yield
    except BundleError as error:
        if any(code.startswith("output.") for code in error.codes):
            raise  # the bundle may be another one because this very block replaced it
        now = None
        try:
            now = document.identity(files.read_file(root, document.FILE, strict_json.MAX_BYTES))
        except BundleError as other:
            if other.codes != ("file.missing",):
                raise error from None  # nothing is known
        if now == id or type(error) not in (BundleError, VerificationError):
            raise
        problem = Problem(
            code="file.missing" if now is None else "file.digest",
            file=document.FILE,
            expected=f"the bundle id {quoted(id)}, as when it was opened",
            got=now or "none",
            hint="The bundle was replaced or removed since it was opened: open it again",
        )
        raise type(error)(problem) from error


def explain_mismatch(root: Path, data: bytes) -> list[Problem]:
    """Return a problem if SHA256SUMS was written for another manifest. It explains why a file differs from its entry.

    Without such a problem, the list is empty.
    """
    try:
        got = files.read_file(root, names.SUMS, strict_json.MAX_BYTES).decode("utf-8", "replace")
    except BundleError:
        return []
    digest = document.identity(data).removeprefix("sha256:")
    if not is_of_another_manifest(got.splitlines(keepends=True), digest):
        return []
    expected = f"the manifest that {names.SUMS} lists"
    return [Problem(code="sums.mismatch", file=document.FILE, expected=expected, got=f"one with sha256 {digest}")]


def is_of_another_manifest(got: list[str], digest: str) -> bool:
    """Return whether SHA256SUMS was written for another manifest, which explains why its other lines differ too.

    Another manifest has a completely different digest. If most digits agree, the line itself is damaged.
    """
    suffix = f"  {document.FILE}\n"
    theirs = next((line.removesuffix(suffix) for line in got if line.endswith(suffix)), "")
    return bool(names.SHA256.fullmatch(theirs)) and sum(a != b for a, b in zip(theirs, digest, strict=True)) > 32
