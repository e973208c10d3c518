"""The configuration files of the source, which travel in the bundle. No reader computes with them."""

from __future__ import annotations

from typing import Final

from splitbundle.format import strict_json
from splitbundle.format.manifest.document import SOURCE, SourceConfiguration
from splitbundle_converter.checkpoint.file_names import CONFIG, GENERATION
from splitbundle_converter.open_checkpoint import OpenedCheckpoint

_FILE: Final = f"{SOURCE}{CONFIG}"
_PART: Final = f"{SOURCE}part/{CONFIG}"
_GENERATION: Final = f"{SOURCE}{GENERATION}"


def configuration_files(opened: OpenedCheckpoint, *, cast: bool) -> tuple[SourceConfiguration, dict[str, bytes]]:
    """Return the manifest's entry, and the content of each file by its path in the bundle.

    The files are those of the source, byte for byte. A configuration that the source keeps inside of another file (the
    metadata of parts) becomes a file of its own.

    Args:
        opened: The checkpoint.
        cast: Whether the weights will be stored in another dtype than in the source.

    Raises:
        BundleError: ``source.unreadable``, ``source.changed``.
    """
    checkpoint = opened.checkpoint
    found = checkpoint.configuration()
    plain = checkpoint.quantization is None  # else the file describes weights that aren't here
    own_file = plain and found.file == CONFIG and not found.pointer
    files = {_FILE: checkpoint.read(CONFIG) if own_file else strict_json.dump(found.raw)}
    if opened.part_configuration is not None:
        files[_PART] = strict_json.dump(opened.part_configuration)
    if checkpoint.directory.has(GENERATION):
        files[_GENERATION] = checkpoint.read(GENERATION)
    entry = SourceConfiguration(
        file=_FILE,
        part=_PART if _PART in files else None,
        generation=_GENERATION if _GENERATION in files else None,
        cast=cast,
    )
    return entry, files
