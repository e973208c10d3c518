"""Open a bundle: read and check its two documents, and no weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from splitbundle import logs
from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.storage.documents import find_bundle, read_documents
from splitbundle.storage.files import Progress


def open_bundle(
    path: str | os.PathLike[str],
    *,
    verify: Literal["never", "always"] = "never",
    id: str | None = None,  # noqa: A002
) -> Bundle:
    """Open a bundle: read its manifest and architecture, and no weights.

    Args:
        path: the bundle's directory.
        verify: ``"never"`` maps weights when they are needed, after a check of their sizes and headers;
            ``Bundle.verify`` checks their digests. ``"always"`` reads each needed file into private memory, once,
            hashes it there, and computes on these bytes. A later change of the file can't change a result or end the
            process. This takes memory for the weights, and time to hash them.
        id: the expected bundle id, ``sha256:`` and 64 digits. It is checked before anything is parsed.

    Raises:
        BundleError: every problem of either file; ``file.missing`` if there is no bundle; ``file.digest`` if the
            bundle has another id.
    """
    if verify not in ("never", "always"):
        expected = "never or always"
        raise BundleError(Problem(code="input.value", argument="verify", expected=expected, got=quoted(verify)))
    root = find_bundle(path)
    bundle = Bundle(root, *read_documents(root, id), strict=verify == "always")
    logs.debug("opened %s, bundle id %s", root, bundle.id)
    return bundle


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
