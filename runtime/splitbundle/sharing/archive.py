"""Pack a bundle into one tar archive, and unpack it again. Every file is hashed on its way."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from tarfile import BLOCKSIZE
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem, VerificationError, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE
from splitbundle.format.manifest.document import FILE, File, Manifest, checksums, identity
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.records import record
from splitbundle.sharing.tar_members import MAX_MEMBERS, REPACK, Member, read_members, refuse
from splitbundle.storage import archive_kind, signature_files
from splitbundle.storage.counting import counter
from splitbundle.storage.documents import Documents, read_documents
from splitbundle.storage.files import (
    CHUNK,
    FETCH,
    Progress,
    check_digest,
    closed_at_last,
    open_file,
    read_file,
    read_fully,
    unreadable,
)
from splitbundle.storage.reader import BundleReader
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.atomic_file import atomic_file
from splitbundle.writing.copying import check_outside, refuse_missing, unchanged

RECORD: Final = 20 * BLOCKSIZE
"""tar reads and writes this many bytes at once. The archive is filled with zeros up to a multiple of it."""
MAX_PROBLEMS: Final = 100


@record(frozen=True, slots=True, kw_only=True)
class Archive:
    """An archive that was written."""

    path: Path
    bytes: int
    """The size of the archive."""
    files: tuple[str, ...]
    """The paths in the bundle of the files that are in it, in their order."""


def pack(
    bundle: BundleReader, output: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None
) -> Archive:
    """Write a bundle into a tar archive. See ``Bundle.pack``."""
    target = Path(os.path.abspath(output))
    check_outside(bundle, target)
    refuse_missing(bundle, [ARCHITECTURE])
    absent = set(bundle.absent())
    listed = {path: file for path, file in bundle.manifest.files.items() if path not in absent}
    signatures = signature_files.signature_files(bundle.path)
    if 2 * (len(listed) + len(signatures) + 2) > MAX_MEMBERS:  # a long name takes a header of its own
        expected, got = f"at most {MAX_MEMBERS // 2} files", f"{len(listed)} files"
        raise BundleError(Problem(code="archive.member", file=str(bundle.path), expected=expected, got=got))
    top = names.directory_name(bundle.manifest.model.name)
    count = counter("packing", sum(file.size for file in listed.values()), progress)
    with atomic_file(target, force=force, ours=_is_archive) as out, unchanged(bundle):
        data = read_file(bundle.path, FILE, strict_json.MAX_BYTES)
        digest = bundle.id.removeprefix("sha256:")
        check_digest(FILE, File(size=len(data), sha256=digest), identity(data).removeprefix("sha256:"))
        _add(out, f"{top}/{FILE}", data)
        _add(out, f"{top}/{names.SUMS}", checksums(bundle.manifest.files, digest))
        for path, file in listed.items():
            out.write(_header(f"{top}/{path}", file.size))
            with closed_at_last(open_file(bundle.path, path, file)) as source:
                check_digest(path, file, _copy(source, out, path, file.size, count))
            _pad(out, file.size, BLOCKSIZE)
        for path in signatures:
            _add(out, f"{top}/{path}", signature_files.read_signature(bundle.path, path))
        out.write(bytes(2 * BLOCKSIZE))
        _pad(out, out.tell(), RECORD)
        size = out.tell()
    return Archive(path=target, bytes=size, files=(FILE, names.SUMS, *listed, *signatures))


def unpack(
    archive: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    id: str | None = None,  # noqa: A002
    force: bool = False,
    progress: Progress | None = None,
) -> Documents:
    """Write the bundle in a tar archive to a directory. See ``splitbundle.unpack``."""
    said = str(archive)
    with _open_archive(Path(archive)) as file:
        try:
            members = read_members(file, os.fstat(file.fileno()).st_size, said)
            inside = _inside(members, said)
            data = _manifest(file, inside[FILE], said, id)
            manifest = parse_manifest(data)
            _check_members(inside, manifest, said)
        except OSError as error:
            raise BundleError(unreadable(said, error)) from error
        return _write(file, inside, manifest, data, output, force, said, progress)


def _write(
    file: BinaryIO,
    inside: dict[str, Member],
    manifest: Manifest,
    data: bytes,
    output: str | os.PathLike[str],
    force: bool,
    archive: str,
    progress: Progress | None,
) -> Documents:
    listed = {path: manifest.files[path] for path in inside if path in manifest.files}
    sums = checksums(manifest.files, identity(data).removeprefix("sha256:"))
    count = counter("unpacking", sum(each.size for each in listed.values()), progress)
    with atomic_directory(output, force=force) as root:
        (root / FILE).write_bytes(data)
        (root / names.SUMS).write_bytes(sums)
        if names.SUMS in inside and _data(file, inside[names.SUMS], len(sums) + 1, archive) != sums:
            expected, got = "the digests of the manifest", "other lines"
            raise BundleError(Problem(code="sums.mismatch", file=names.SUMS, expected=expected, got=got))
        # The architecture comes first: a bundle that can't be opened isn't worth hours of copying.
        for path in (ARCHITECTURE, *(path for path in listed if path != ARCHITECTURE)):
            _extract(file, inside[path], root, path, listed[path], count)
            if path == ARCHITECTURE:
                documents = read_documents(root)
        for path in inside:
            if names.is_signature(path):
                (root / names.SIGNATURES).mkdir(exist_ok=True)
                (root / path).write_bytes(_data(file, inside[path], signature_files.MAX_BYTES, archive))
    return documents


def _extract(file: BinaryIO, member: Member, root: Path, path: str, listed: File, count: Callable[[int], None]) -> None:
    place = root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.seek(member.start)
    except OSError as error:
        raise BundleError(unreadable(path, error)) from error
    with place.open("xb") as target:
        check_digest(path, listed, _copy(file, target, path, listed.size, count))


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[BinaryIO]:
    """Open an archive. A pipe or a device has no length to check the members against, so only files are opened.

    Raises:
        BundleError: ``archive.kind``, ``file.missing``, ``file.unreadable``.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        problem = Problem(code="file.missing", file=str(path), expected="a tar archive", got="nothing there")
        raise BundleError(problem) from None
    except (OSError, ValueError) as error:  # ValueError for a NUL in the path
        os_error = error if isinstance(error, OSError) else OSError(0, str(error))
        raise BundleError(unreadable(str(path), os_error)) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        expected, got = "a tar archive, a regular file", "something else"
        hint = "Save the archive as a file first. A bundle's directory needs no unpacking"
        raise BundleError(Problem(code="archive.kind", file=str(path), expected=expected, got=got, hint=hint))
    with closed_at_last(os.fdopen(handle, "rb", buffering=0)) as file:
        kind = archive_kind.kind_of(read_fully(file, BLOCKSIZE))
        if kind not in (None, archive_kind.TAR):
            hint = archive_kind.next_step(str(path), kind)
            expected, got = "a tar archive without compression", f"a {kind} archive"
            raise BundleError(Problem(code="archive.kind", file=str(path), expected=expected, got=got, hint=hint))
        yield file


def _inside(members: list[Member], archive: str) -> dict[str, Member]:
    """Return the members by their paths in the bundle, which is the archive's only top directory or the archive itself.

    Raises:
        BundleError: ``file.missing`` without a manifest; ``archive.name`` with several, or for a member outside.
    """
    files = {member.name: member for member in members if not member.is_directory}
    found = [name for name in files if name.count("/") == 1 and name.endswith(f"/{FILE}")]
    if FILE in files:
        prefix = ""
    elif len(found) == 1:
        prefix = found[0].removesuffix(FILE)
    elif found:
        at, expected = files[found[1]].at, "one bundle in an archive"
        refuse("archive.name", archive, at, expected, f"{quoted(found[0])} and {quoted(found[1])}")
    else:
        expected, got = f"a bundle in the archive, with a {FILE} at the top or in a directory there", "none"
        raise BundleError(Problem(code="file.missing", file=archive, expected=expected, got=got))
    inside: dict[str, Member] = {}
    for member in members:
        name = f"{member.name}/" if member.is_directory and member.name else member.name
        if not name.startswith(prefix):
            if member.is_directory and not name:  # the directory in which tar was started
                continue
            refuse("archive.name", archive, member.at, f"members in {quoted(prefix)}", quoted(member.name), REPACK)
        inside[name.removeprefix(prefix)] = member
    return inside


def _check_members(inside: dict[str, Member], manifest: Manifest, archive: str) -> None:
    """Check that every member is one of this bundle, with its listed size.

    Raises:
        BundleError: ``file.unlisted``, ``file.size``, ``file.missing``, ``archive.member``: every problem.
    """
    listed = manifest.files
    folders = {f"{parent.as_posix()}/" for path in listed for parent in PurePosixPath(path).parents}
    folders |= {"", f"{names.SIGNATURES}/"}
    problems: list[Problem] = []
    signatures = 0
    for path, member in inside.items():
        known = path in listed or path in (FILE, names.SUMS)
        if path in listed and member.size != listed[path].size:
            expected, got = f"{listed[path].size} bytes", f"{member.size} bytes"
            problems.append(Problem(code="file.size", file=path, expected=expected, got=got, hint=FETCH))
        elif names.is_signature(path) and not member.is_directory:
            signatures += 1
            if member.size > signature_files.MAX_BYTES or signatures > signature_files.MAX_NUMBER:
                most, size = signature_files.MAX_NUMBER, signature_files.MAX_BYTES
                expected, got = f"at most {most} signatures of {size} bytes", f"{signatures}, this one of {member.size}"
                problems.append(
                    Problem(code="archive.member", file=archive, offset=member.at, expected=expected, got=got)
                )
        elif not known and not (member.is_directory and path in folders):
            hint = "Take it out of the directory, and pack it again"
            expected, got = "only what the manifest lists", quoted(path)
            problems.append(
                Problem(code="file.unlisted", file=archive, offset=member.at, expected=expected, got=got, hint=hint)
            )
        if len(problems) >= MAX_PROBLEMS:
            break
    if ARCHITECTURE not in inside:
        expected, got = "a file that every bundle has", "none in the archive"
        problems.append(Problem(code="file.missing", file=ARCHITECTURE, expected=expected, got=got))
    if problems:
        raise BundleError(problems)


def _manifest(file: BinaryIO, member: Member, archive: str, wanted: str | None) -> bytes:
    """Return the manifest. Its id is checked before it is parsed.

    Raises:
        BundleError: ``file.digest``, ``json.size``.
    """
    if member.size > strict_json.MAX_BYTES:
        expected, got = f"at most {strict_json.MAX_BYTES} bytes", f"{member.size} bytes"
        raise BundleError(Problem(code="json.size", file=FILE, expected=expected, got=got))
    data = _data(file, member, strict_json.MAX_BYTES, archive)
    if wanted not in (None, identity(data)):
        expected, hint = f"the bundle id {quoted(wanted)}", "It is another bundle, or a changed one"
        problem = Problem(code="file.digest", file=FILE, expected=expected, got=identity(data), hint=hint)
        raise VerificationError(problem)
    return data


def _data(file: BinaryIO, member: Member, most: int, archive: str) -> bytes:
    """Return the data of a small member, or its first ``most`` bytes."""
    wanted = min(member.size, most)
    try:
        file.seek(member.start)
        data = read_fully(file, wanted)
    except OSError as error:
        raise BundleError(unreadable(archive, error)) from error
    if len(data) != wanted:
        refuse("archive.truncated", archive, member.at, f"{wanted} bytes", f"{len(data)}, while it was read")
    return data


def _copy(source: BinaryIO, target: BinaryIO, path: str, size: int, count: Callable[[int], None]) -> str:
    """Copy ``size`` bytes, and return their digest.

    Raises:
        BundleError: ``file.unreadable``, ``file.size``.
        OSError: the target can't be written.
    """
    digest, left = hashlib.sha256(), size
    buffer = memoryview(bytearray(min(CHUNK, size)))
    while left:
        try:
            read = source.readinto(buffer[: min(len(buffer), left)])  # type: ignore[attr-defined]
        except OSError as error:
            raise BundleError(unreadable(path, error)) from error
        if not read:
            expected, got = f"{size} bytes", f"{size - left}, while it was read"
            raise BundleError(Problem(code="file.size", file=path, expected=expected, got=got, hint=FETCH))
        digest.update(buffer[:read])
        target.write(buffer[:read])
        left -= read
        count(read)
    return digest.hexdigest()


def _header(name: str, size: int) -> bytes:
    """Return the header of a file: only its name and its size, so that equal bundles give equal archives."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o644
    return header.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _add(out: BinaryIO, name: str, data: bytes) -> None:
    out.write(_header(name, len(data)))
    out.write(data)
    _pad(out, len(data), BLOCKSIZE)


def _pad(out: BinaryIO, size: int, unit: int) -> None:
    out.write(bytes(-size % unit))


def _is_archive(path: Path) -> bool:
    """Return whether an existing file may be replaced: a tar archive, or an empty file."""
    return archive_kind.file_kind(path) == archive_kind.TAR or path.stat().st_size == 0
