"""Open a bundle: read and check its two documents, and no weights. Fetch it first if it is on another machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from splitbundle import logs
from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.records import replace
from splitbundle.storage.documents import find_bundle, read_documents
from splitbundle.storage.files import Progress

if TYPE_CHECKING:
    from splitbundle.sharing.network import Patience
    from splitbundle.sharing.pulling import Pulled, PullHow, Wanted
    from splitbundle.sharing.pushing import Pushed


def open_bundle(
    path: str | os.PathLike[str],
    *,
    verify: Literal["never", "always"] = "never",
    id: str | None = None,  # noqa: A002
    shard: str | Sequence[str] | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Open a bundle: read its manifest and architecture, and no weights.

    Args:
        path: the bundle's directory, or a reference such as ``"oci://HOST/NAME:TAG"`` (``docs/guides/share.md``). What
            a reference names is pulled into the cache first, if it isn't there.
        verify: ``"never"`` maps weights when they are needed, after a check of their sizes and headers;
            ``Bundle.verify`` checks their digests. ``"always"`` reads each needed file into private memory, once,
            hashes it there, and computes on these bytes. A later change of the file can't change a result or end the
            process. This takes memory for the weights, and time to hash them.
        id: the expected bundle id, ``sha256:`` and 64 digits. It is checked before anything is parsed.
        shard: the shard, or the shards, that have to be there. Of a reference only these are pulled; an empty list
            pulls the documents alone. By default a reference is pulled whole.
        offline: whether to take a reference from the cache alone.
        progress: called with the name of the work, the bytes that are done, and the total in bytes.

    Raises:
        BundleError: every problem of either file; ``file.missing`` if there is no bundle; ``file.digest`` if the
            bundle has another id; ``network.*`` and ``usage.reference`` for a reference.
    """
    if verify not in ("never", "always"):
        expected = "never or always"
        raise BundleError(Problem(code="input.value", argument="verify", expected=expected, got=quoted(verify)))
    shards = None if shard is None else (shard,) if isinstance(shard, str) else tuple(shard)
    if _may_be_reference(path):
        from splitbundle.sharing.pulling import PullHow, Wanted

        wanted = Wanted(shards=shards)
        done = _pull(str(path), wanted, PullHow(progress=progress), id=id, output=None, offline=offline)
        bundle = Bundle(done.path, *done.documents, strict=verify == "always")
    else:
        root = find_bundle(path)
        bundle = Bundle(root, *read_documents(root, id), strict=verify == "always")
        if shards:
            bundle.require(*shards)
    logs.debug("opened %s, bundle id %s", bundle.path, bundle.id)
    return bundle


def pull_bundle(
    reference: str,
    output: str | os.PathLike[str] | None = None,
    *,
    shards: Sequence[str] | None = None,
    vectors: bool = True,
    text: bool = False,
    id: str | None = None,  # noqa: A002
    force: bool = False,
    offline: bool = False,
    jobs: int | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    notes: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Pull a bundle from another machine, whole or some shards of it. It needs neither torch nor onnxruntime.

    Each file's digest is checked before the file is visible. A pull that was interrupted goes on where it stopped.
    Files that are on this machine already are not pulled.

    Args:
        reference: where the bundle is (``docs/guides/share.md`` has the grammar). With ``@sha256:`` and the bundle id
            at its end, no other bundle is accepted.
        output: the directory of the bundle. By default it goes into the cache.
        shards: the names of the shards; by default all, with the tokenizer.
        vectors: with ``shards``: whether to pull the golden vectors, which ``run_vectors`` needs.
        text: with ``shards``: whether to pull the tokenizer.
        id: the expected bundle id.
        force: whether to replace another bundle at ``output``.
        offline: whether to take it from the cache alone.
        jobs: how many files are moved at once; by default 4.
        timeout: seconds until a connection without progress has failed; by default ``SPLITBUNDLE_TIMEOUT`` or 30.
        retries: how often to try again without any progress; by default ``SPLITBUNDLE_RETRIES`` or 5.
        notes: called with a sentence that the user should know, such as that a tag has moved meanwhile.
        progress: called with the name of the work, the bytes that are done, and the total in bytes.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: ``usage.reference``; ``network.*``; ``file.*`` for wrong bytes; ``output.*``.
        MissingExtra: a library for this kind of reference isn't installed.
    """
    from splitbundle.sharing.pulling import PullHow, Wanted

    if isinstance(shards, str):
        raise wrong_argument("shards", "names of shards, as a list", quoted(shards))
    wanted = Wanted(shards=None if shards is None else tuple(shards), vectors=vectors, text=text)
    how = PullHow(patience=_patience(timeout, retries), force=force, signatures=True, progress=progress)
    how = how if jobs is None else replace(how, jobs=_positive("jobs", jobs))
    done = _pull(reference, wanted, how, id=id, output=output, offline=offline)
    if done.note is not None and notes is not None:
        notes(done.note)
    return Bundle(done.path, *done.documents)


def push_bundle(
    bundle: str | os.PathLike[str] | Bundle,
    reference: str,
    *,
    force: bool = False,
    jobs: int | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Push a whole bundle to another machine. Its files are verified first. Files that are there already aren't sent.

    The bundle appears there with all its files: its manifest, or its tag, is written last.

    Args:
        bundle: the bundle, or its directory.
        reference: where it goes: ``oci://``, ``hf://``, ``s3://`` … (``docs/guides/share.md``).
        force: whether to replace another bundle where the place keeps no older revisions.
        jobs: how many files are moved at once; by default 4.
        timeout: as for ``pull``.
        retries: as for ``pull``.
        progress: called with the name of the work, the bytes that are done, and the total in bytes.

    Returns:
        What was sent, and the revision.

    Raises:
        BundleError: ``usage.reference``; ``network.*``; ``output.exists``; ``file.*`` for a bundle that isn't whole.
        MissingExtra: a library for this kind of reference isn't installed.
    """
    from splitbundle.sharing.pushing import PushHow, push
    from splitbundle.sharing.reference import parse_reference

    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    how = PushHow(patience=_patience(timeout, retries), force=force, progress=progress)
    how = how if jobs is None else replace(how, jobs=_positive("jobs", jobs))
    return push(opened, parse_reference(reference), how)


def merge_bundles(
    bundles: Sequence[str | os.PathLike[str] | Bundle],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Merge partial bundles of one id into a fuller one. Each copied file is verified.

    Args:
        bundles: the bundles, or their directories. A file that several have is taken from the first of them.
        output: the directory of the new bundle. It appears complete, or not at all.
        force: whether to replace an existing bundle. It may be one of those to merge.
        progress: called with the name of the work, the amount that is done, and the total amount.

    Returns:
        The new bundle, opened. ``whole_shards`` names the shards that are whole now.

    Raises:
        BundleError: ``input.value`` for bundles of different ids; ``file.*``; ``output.*``.
    """
    # Imported here, as most users of this module only open bundles.
    from splitbundle.partial.merging import merge

    if isinstance(bundles, str | os.PathLike):
        raise wrong_argument("bundles", "a list of at least one bundle", quoted(bundles))
    opened = [bundle if isinstance(bundle, Bundle) else open_bundle(bundle) for bundle in bundles]
    return merge(opened, output, force=force, progress=progress)


def unpack_archive(
    archive: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    id: str | None = None,  # noqa: A002
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Unpack a tar archive with a bundle: one of ``Bundle.pack``, or a plain one that tar made of a bundle's directory.

    Only the files that the manifest lists are written, with their listed sizes, and each is hashed on its way.

    Args:
        archive: the archive, a file without compression.
        output: the directory of the new bundle. It appears complete, or not at all.
        id: the expected bundle id. It is checked before anything is parsed.
        force: whether to replace an existing bundle.
        progress: called with the name of the work, the bytes that are done, and the total in bytes.

    Returns:
        The new bundle, opened. It is partial if the archive is one of a partial bundle.

    Raises:
        BundleError: ``archive.*`` for an archive that has something else, or that isn't whole; ``file.*``; the errors
            of ``splitbundle.open``; ``output.*``.
    """
    # Imported here, as most users of this module only open bundles.
    from splitbundle.sharing.archive import unpack

    documents = unpack(archive, output, id=id, force=force, progress=progress)
    return Bundle(Path(os.path.abspath(output)), *documents)


def relocated(made: Bundle, target: Path) -> Bundle:
    """Return a bundle with its final path. It is not opened again, because this could fail after the rename."""
    return Bundle(target, made.manifest, made.architecture, made.id)


def _may_be_reference(path: str | os.PathLike[str]) -> bool:
    """Return whether to load the modules that know. Most paths aren't references, and loading takes time."""
    return isinstance(path, str) and ("://" in path or "@sha256:" in path)


def _positive(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
        raise wrong_argument(argument, "an integer from 1 to 64", quoted(value))
    return value


def _patience(timeout: float | None, retries: int | None) -> Patience:
    from splitbundle.sharing.network import patience

    return patience(timeout, retries)


def _pull(
    text: str,
    wanted: Wanted,
    how: PullHow,
    *,
    id: str | None,  # noqa: A002
    output: str | os.PathLike[str] | None,
    offline: bool,
) -> Pulled:
    """Pull what a reference names, of the expected id.

    Raises:
        BundleError: ``file.digest`` for another bundle; the errors of ``pull_bundle``.
    """
    from splitbundle.sharing.pulling import pull
    from splitbundle.sharing.reference import parse_reference
    from splitbundle.sharing.transport import another_bundle

    reference = parse_reference(text)
    if id is not None and reference.pin is None:
        reference = replace(reference, pin=id)
    if not reference.scheme and output is None:
        root = find_bundle(reference.path)
        from splitbundle.sharing.pulling import Pulled

        return Pulled(path=root, documents=read_documents(root, reference.pin))
    done = pull(reference, wanted, how, output=output, offline=offline)
    if id not in (None, done.documents.id):
        raise another_bundle(str(id), done.documents.id, str(reference))
    return done
