"""The example checkpoints of this package, and a function that copies one to a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.writing.atomic_directory import atomic_directory

DEFAULT: Final = "license-gpt2"
EXAMPLES: Final[Mapping[str, str]] = {
    DEFAULT: "a GPT-2 of 6 layers (3 MB) that knows the Apache License by heart",
}
"""The name of an example -> its description in the help."""

_PACKAGED: Final = Path(__file__).parent / "examples"
_CHECKOUT: Final = Path(__file__).parents[2] / "examples"


def copy_example(name: str, output: str | os.PathLike[str]) -> Path:
    """Copy an example checkpoint into a new directory. The directory appears complete or not at all.

    Args:
        name: One of ``EXAMPLES``.
        output: The new directory.

    Returns:
        The absolute path of the new directory.

    Raises:
        BundleError: ``usage.arguments`` for an unknown name; ``output.exists`` if ``output`` exists already;
            ``output.failed`` if the system refuses to write there; ``source.missing`` if the installation lacks the
            example's files.
    """
    if name not in EXAMPLES:
        expected = f"one of {', '.join(EXAMPLES)}"
        raise BundleError(Problem(code="usage.arguments", argument="NAME", expected=expected, got=quoted(name)))
    target = Path(os.path.abspath(output))
    if os.path.lexists(target):
        expected, got = "nothing there", "an existing file or directory"
        hint = "Choose another output, or remove it yourself"
        raise BundleError(Problem(code="output.exists", file=str(target), expected=expected, got=got, hint=hint))
    source = _directory(name)
    with atomic_directory(target, force=False) as staging:
        for path in sorted(source.iterdir()):
            (staging / path.name).write_bytes(path.read_bytes())
    return target


def _directory(name: str) -> Path:
    """Return the directory of an example: in the package, or in the checkout of an editable install."""
    for folder in (_PACKAGED, _CHECKOUT):
        if (folder / name / "config.json").is_file():
            return folder / name
    expected, got = "the example checkpoint that comes with splitbundle", "an installation without it"
    hint = "Install splitbundle again"
    raise BundleError(Problem(code="source.missing", file=name, expected=expected, got=got, hint=hint))
