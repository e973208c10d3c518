"""Read ``text.json`` after checking its digest: ``spec/v1/bundle.md``, section "Text document"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitbundle.format.text_document import FILE, MAX_BYTES, TextDocument, parse_text
from splitbundle.storage import files

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader


def read(bundle: BundleReader) -> TextDocument | None:
    """Return what a bundle's ``text.json`` says, or None for a bundle without one.

    Raises:
        BundleError: ``file.*`` if it isn't the listed file; ``json.*``, ``field.*`` and ``text.version``.
    """
    if bundle.manifest.model.text_file is None:
        return None
    data = files.read_listed(bundle.path, FILE, bundle.manifest.files[FILE], MAX_BYTES)
    return parse_text(data, bundle.architecture.vocab_size)
