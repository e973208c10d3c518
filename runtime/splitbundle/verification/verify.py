"""Verify a bundle: check that every file is as the manifest and SHA256SUMS say."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

from splitbundle import processors
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import genai, names, strict_json
from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.manifest import document
from splitbundle.records import record, replace
from splitbundle.storage import files
from splitbundle.storage.counting import counter
from splitbundle.storage.documents import is_of_another_manifest
from splitbundle.storage.files import THREAD_BYTES, Progress
from splitbundle.storage.scales import check_scales
from splitbundle.storage.signature_files import signature_files
from splitbundle.verification import genai_rules, onnx_rules, text_rules, tokenizer_rules

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader


REMOVE: Final = "Remove it if you don't know it"


@record(frozen=True, slots=True, kw_only=True)
class Verification:
    """The verified files and their total size, and the files in the directory that the manifest doesn't list."""

    files: tuple[str, ...]
    bytes: int
    unlisted: tuple[str, ...]
    absent: tuple[str, ...] = ()
    """The listed files that a partial bundle lacks, if all of it was verified."""


def verify(
    bundle: BundleReader, shard: str | None, *, exact: bool, whole: bool = False, progress: Progress | None
) -> Verification:
    """See ``Bundle.verify``."""
    absent = bundle.absent() if shard is None and not whole and is_sound_part(bundle) else ()
    listed = [path for path in _listed(bundle, shard) if path not in set(absent)]
    total = sum(bundle.manifest.files[path].size for path in listed)
    count = counter("verifying", total, progress)
    # The manifest and a shard's own files are enough to verify the shard: a partial bundle may lack SHA256SUMS.
    needs_sums = (shard is None and not absent) or files.is_there(bundle.path, names.SUMS)
    problems = _check_sums(bundle) if needs_sums else []
    for found in _each(listed, bundle, lambda path: _check_digest(bundle, path, count)):
        problems += found
    good = set(listed) - {problem.file for problem in problems}
    for paths, judge in _judges(bundle, shard):
        if good.issuperset(paths):
            try:
                judge()
            except BundleError as error:
                problems += error.problems
                good.difference_update(paths)
    unlisted: list[str] = []
    try:
        signatures = signature_files(bundle.path)  # known by their names and sizes, and not opened here
        unlisted = files.unlisted(bundle.path, {*bundle.manifest.files, document.FILE, names.SUMS, *signatures})
        unlisted = [path for path in unlisted if path != f"{names.SIGNATURES}/"]
    except BundleError as error:
        problems += error.problems
    if exact:
        problems += [
            Problem(
                code="file.unlisted", file=path, expected="only what the manifest lists", got="this one", hint=REMOVE
            )
            for path in unlisted
        ]
    if problems:
        raise BundleError(_explain_partial(bundle, problems) if shard is None else problems)
    return Verification(files=tuple(listed), bytes=total, unlisted=tuple(unlisted), absent=tuple(absent))


def is_sound_part(bundle: BundleReader) -> bool:
    """Return whether a partial bundle is one on purpose, as ``extract`` makes it, by the files that are there.

    Some shards are whole, others aren't, and no weight file or graph is there that only another shard needs. A file
    that was lost leaves the others of its shard behind.
    """
    absent, whole = set(bundle.absent()), bundle.whole_shards()
    if not whole or len(whole) == len(bundle.shards):
        return False
    needed = {path for name in whole for path in bundle.files_of(bundle.shard(name))}
    there = {path for shard in bundle.shards for path in bundle.files_of(shard)} - absent
    return there <= needed


def check_digests(bundle: BundleReader, paths: Sequence[str], progress: Progress | None) -> None:
    """Check the size and the digest of some listed files.

    Raises:
        BundleError: ``file.*``, every problem of every file.
    """
    listed = list(paths)
    count = counter("verifying", sum(bundle.manifest.files[path].size for path in listed), progress)
    problems = [
        each for found in _each(listed, bundle, lambda path: _check_digest(bundle, path, count)) for each in found
    ]
    if problems:
        raise BundleError(problems)


def _explain_partial(bundle: BundleReader, problems: list[Problem]) -> list[Problem]:
    """Return the problems, the first missing file with the shards that are whole, as such a bundle may be meant so."""
    first = next((i for i, problem in enumerate(problems) if problem.code == "file.missing"), None)
    if first is None:
        return problems
    bad = {problem.file for problem in problems}
    whole = [shard.name for shard in bundle.shards if bad.isdisjoint(bundle.files_of(shard))]
    said = (
        f"These shards are whole: {', '.join(whole)}; shard={whole[0]!r} checks one" if whole else "No shard is whole"
    )
    hint = f"The bundle is partial. {said}. {problems[first].hint or ''}"
    return [*problems[:first], replace(problems[first], hint=hint), *problems[first + 1 :]]


def _judges(bundle: BundleReader, shard: str | None) -> Iterator[tuple[Sequence[str], Callable[[], object]]]:
    """Yield groups of files, each with a function that checks their contents.

    Call the function only if the digests of all files in the group are correct.
    """
    for group, paths in bundle.weight_groups().items():
        yield paths, partial(deque, bundle.open_weights(group), 0)
    for unit, paths in bundle.manifest.units.items():
        yield paths, partial(check_scales, bundle, unit)
    for each in bundle.shards if shard is None else (bundle.shard(shard),):
        if each.graph is not None:
            yield bundle.files_of(each), partial(onnx_rules.read, bundle, each, each.graph)
    tokenizer = bundle.manifest.text.tokenizer
    if tokenizer is not None:
        yield [tokenizer], partial(tokenizer_rules.read, bundle, tokenizer)
    if bundle.manifest.model.text_file is not None:
        yield [bundle.manifest.model.text_file], partial(text_rules.read, bundle)
    yield [path for path in genai.GENAI if path in bundle.manifest.files], partial(genai_rules.check, bundle)


def _each(paths: list[str], bundle: BundleReader, check: Callable[[str], list[Problem]]) -> Iterator[list[Problem]]:
    """Yield the problems that ``check`` finds in each file, in order.

    Large files are checked on all cores, because hashing releases the GIL. Small files are not, because starting a
    thread takes as long as hashing some hundred KB.
    """
    large = [path for path in paths if bundle.manifest.files[path].size >= THREAD_BYTES]
    workers = min(processors.usable(), len(large))
    if workers < 2:
        yield from map(check, paths)
        return
    with ThreadPoolExecutor(max_workers=workers) as pool:
        # Start with the largest file. Otherwise it could start last, and run alone long after the others.
        large.sort(key=lambda path: -bundle.manifest.files[path].size)
        running = {path: pool.submit(check, path) for path in large}
        for path in paths:
            yield running[path].result() if path in running else check(path)


def _listed(bundle: BundleReader, shard: str | None) -> list[str]:
    if shard is None:
        return list(bundle.manifest.files)
    vectors = bundle.manifest.vectors
    # A part may lack the golden vectors. If they are there, run_vectors computes with them.
    more = [] if vectors is None else [path for path in vectors.files if path not in bundle.absent()]
    return [architectures.FILE, *bundle.files_of(bundle.shard(shard)), *more]


def _check_sums(bundle: BundleReader) -> list[Problem]:
    digest = bundle.id.removeprefix("sha256:")
    try:
        data = files.read_file(bundle.path, names.SUMS, strict_json.MAX_BYTES)
    except BundleError as error:
        return list(error.problems)
    expected = document.checksums(bundle.manifest.files, digest).decode("ascii").splitlines(keepends=True)
    got = data.decode("utf-8", "replace").splitlines(keepends=True)
    if got == expected:
        return []
    off = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    end = f"the end of {names.SUMS}"
    return [
        Problem(
            code="sums.mismatch",
            file=document.FILE if is_of_another_manifest(got, digest) else names.SUMS,
            expected=quoted(expected[off], 160) if off < len(expected) else end,
            got=quoted(got[off], 160) if off < len(got) else end,
        )
    ]


def _check_digest(bundle: BundleReader, path: str, count: Callable[[int], None]) -> list[Problem]:
    listed = bundle.manifest.files[path]
    try:
        with files.open_file(bundle.path, path, listed) as file:
            files.check_digest(path, listed, files.sha256(file, count))
    except BundleError as error:
        return list(error.problems)
    except OSError as error:
        return [files.unreadable(path, error)]
    return []
