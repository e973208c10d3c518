"""The files that some shards of a bundle need, from the documents alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from splitbundle.errors import quoted, wrong_argument
from splitbundle.format import names
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE
from splitbundle.format.genai import GENAI
from splitbundle.format.manifest.document import SOURCE, TOKENIZER
from splitbundle.format.text_document import FILE as TEXT
from splitbundle.storage.reader import BundleReader

UNLISTED: Final = (names.MANIFEST, names.SUMS)
"""The files that every bundle has and that no manifest lists."""


def listed_files(bundle: BundleReader, shards: Sequence[str], *, vectors: bool, text: bool) -> list[str]:
    """Return the paths in ``files`` of the manifest that some shards need, each once.

    These are the documents, with the source's configuration, and the weight files and the graphs of the shards.

    Args:
        bundle: the bundle. It may be partial.
        shards: the names of the shards.
        vectors: whether to include the golden vectors, which ``run_vectors`` needs.
        text: whether to include the tokenizer with ``text.json``, and the files of onnxruntime-genai, which turn text
            into ids and back.

    Raises:
        BundleError: ``stage.name``; ``input.value`` without a name.
    """
    if isinstance(shards, str) or not shards:
        raise wrong_argument("shards", "names of shards, as a list", quoted(shards))
    listed = bundle.manifest.files
    found = [path for path in listed if path in (ARCHITECTURE, names.CARD) or path.startswith(SOURCE)]
    for name in shards:
        found += bundle.files_of(bundle.shard(name))
    if vectors and bundle.manifest.vectors is not None:
        found += bundle.manifest.vectors.files
    if text:
        found += [path for path in listed if path.startswith(TOKENIZER) or path in GENAI or path == TEXT]
    return list(dict.fromkeys(found))
