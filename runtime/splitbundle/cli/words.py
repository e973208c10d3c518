"""Say problems in the words of the command: hints name commands and options, as hints in Python name calls."""

from __future__ import annotations

import argparse
import re
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.records import replace

COMMANDS: Final = {
    'splitbundle_converter.convert(SOURCE, "NAME.splitbundle")': "splitbundle convert SOURCE -o NAME.splitbundle",
    "splitbundle_converter.add_onnx": "splitbundle add-onnx",
    "splitbundle_converter.resplit": "splitbundle resplit",
    "help(splitbundle_converter.convert)": "splitbundle convert --help",
    "help(splitbundle_converter.export)": "splitbundle export --help",
    "Bundle.pack": "splitbundle pack",
    "config=": "--config",
    "allow_pickle=True": "--allow-pickle",
    "check=False": "--no-check",
    'check="layers"': "--check layers",
    'Bundle.run_vectors(backend="onnxruntime")': "splitbundle verify --run --backend onnxruntime",
    "force=True": "--force",
    "insecure=True": "--insecure",
    "same_weights=False": "--other-weights",
    "tls=": "--tls",
    "offline=True": "--offline",
    "output=": "--output",
    "genai=True": "--genai",
    "tokenizer=False": "--no-tokenizer",
    "vectors=False": "--no-vectors",
    'part="language"': "--part language",
    "part=": "--part",
    'variant="standard"': "--variant standard",
    "variant=": "--variant",
    'verify="always"': "--strict",
    'backend="torch"': "--backend torch",
    "another output": "another --output",
    "the revision": "--revision",
}
"""What hints say for Python -> what they say in the command."""
_WRONG_VALUES: Final = ("input.value", "input.device", "input.dtype", "input.position", "stage.backend")


_SHARD: Final = re.compile(r"shard='([a-z0-9_-]+)'")


def in_command(problem: Problem) -> Problem:
    """Return a problem with the hint for users of the command."""
    hint = problem.hint
    if hint is None or hint.startswith("Any other part: stage("):  # no command computes any part
        return replace(problem, hint=None)
    return replace(problem, hint=in_words(hint))


def in_words(text: str) -> str:
    """Return a hint or a note with the words of the command in place of Python's."""
    for python, command in COMMANDS.items():
        text = text.replace(python, command)
    return _SHARD.sub(r"--shard \1", text)


def as_usage(error: BundleError, parser: argparse.ArgumentParser) -> BundleError:
    """Return ``usage.arguments`` that names the option, if every problem is the value of an option of the command."""
    flags = {action.dest: max(action.option_strings, key=len) for action in parser._actions if action.option_strings}
    if all(problem.code.startswith("usage.") and problem.argument in flags for problem in error.problems):
        return BundleError(replace(problem, argument=flags[str(problem.argument)]) for problem in error.problems)
    if not all(problem.code in _WRONG_VALUES and problem.argument in flags for problem in error.problems):
        return error
    return BundleError(
        replace(problem, code="usage.arguments", argument=flags[str(problem.argument)]) for problem in error.problems
    )
