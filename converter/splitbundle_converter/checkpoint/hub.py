"""Find a checkpoint: a local directory, or an id of the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from splitbundle_converter.checkpoint.directory import CheckpointDirectory, local_name
from splitbundle_converter.checkpoint.file_names import CARD, CONFIG, GENERATION, TEMPLATES, TEXT_FILES
from splitbundle_converter.checkpoint.quantized import MODELOPT
from splitbundle_converter.checkpoint.source import has_weights, pickled
from splitbundle_converter.checkpoint.weight_files import SAFETENSORS
from splitbundle_converter.errors import line, refusal

HUB_PICKLES: Final = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""The files to fetch if the hub has a model only as pickles. They exclude optimizer states and training arguments."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_checkpoint(
    source: str | os.PathLike[str], revision: str | None, *, allow_pickle: bool = False
) -> CheckpointDirectory:
    """Return the directory of a checkpoint. Fetch it first if ``source`` is a hub id.

    Fetching honors HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.

    Args:
        source: The directory, or the hub id.
        revision: The branch, tag or commit of a hub id.
        allow_pickle: Whether to fetch pickles if the model has no safetensors on the hub.

    Raises:
        BundleError: ``source.missing``, ``source.pickle``, ``network``.
    """
    path = Path(source)
    if path.is_dir():
        name, commit = local_name(path)
        return CheckpointDirectory(path=path, name=name, revision=commit)
    if path.exists():
        raise refusal("source.missing", str(source), "a checkpoint directory or a hub id", "a file")
    identifier = str(source)
    # An id has the form of a relative path. In a directory that exists, a path is meant.
    if not _HUB_ID.fullmatch(identifier) or ("/" in identifier and path.parent.is_dir()):
        raise refusal("source.missing", identifier, "a checkpoint directory or a hub id", "neither")
    texts = [*TEXT_FILES, GENERATION, f"{TEMPLATES}/*.jinja"]
    directory = _fetch(identifier, revision, [CONFIG, MODELOPT, "*.safetensors", SAFETENSORS.index, CARD, *texts])
    # The hub's cache names a snapshot by its commit.
    commit = directory.name if re.fullmatch(r"[0-9a-f]{40}", directory.name) else revision
    if not has_weights(directory, SAFETENSORS):
        if allow_pickle:
            _fetch(identifier, commit, HUB_PICKLES)
        else:
            _refuse_hub_pickles(identifier, commit)
    return CheckpointDirectory(path=directory, name=identifier, revision=commit)


def _fetch(identifier: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(identifier, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        hint = "Accept its terms on the hub and set HF_TOKEN"
        raise refusal("network", identifier, "access to the model", line(error), hint) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        hint = "Check the path, or the id and the revision; a private model needs HF_TOKEN"
        expected = "a directory here, or a model on the hub"
        raise refusal("source.missing", identifier, expected, f"neither: {line(error)}", hint) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        hint = "There is no such directory here, and the hub can't be reached"
        raise refusal("network", identifier, "the model from the hub", line(error), hint) from error


def _refuse_hub_pickles(identifier: str, revision: str | None) -> None:
    """Raise ``source.pickle`` if the hub has pickles of a model without safetensors. Do nothing if it is offline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi().list_repo_files(identifier, revision=revision)
    except (HfHubHTTPError, OSError, ValueError):
        return
    for file in sorted(files):
        if any(fnmatch.fnmatchcase(file, pattern) for pattern in HUB_PICKLES):
            raise pickled(file)
