"""Run the command in this process."""

from __future__ import annotations

import pytest

from splitbundle.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command in this process, and return its status, its stdout and its stderr."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as left:
        status = int(left.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err
