"""The logger: it takes part where the application logs. Nothing else is printed, and nothing warns."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

import splitbundle
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
GENERATE = f"""
import splitbundle
bundle = splitbundle.open({str(GOLDEN)!r})
pipeline = bundle.pipeline(backend="onnxruntime", threads=1)
list(pipeline.generate(pipeline.token_ids([[1, 2, 3]]), max_new_tokens=2))
"""


def run(code: str) -> tuple[str, str]:
    """Run code where each warning is an error, and return what it wrote to stdout and stderr."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_nothing_is_printed_and_nothing_warns() -> None:
    assert run("import splitbundle; splitbundle.Bundle, splitbundle.open, splitbundle.merge") == ("", "")
    assert run(GENERATE) == ("", "")
    assert run(f"import logging{GENERATE}") == ("", "")


def test_an_application_sees_the_messages() -> None:
    out, err = run(f"import logging; logging.basicConfig(level=logging.DEBUG){GENERATE}")
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("DEBUG:splitbundle:")]
    assert lines[0].startswith(f"DEBUG:splitbundle:opened {GOLDEN}, bundle id sha256:")
    assert "DEBUG:splitbundle:loaded a pipeline with onnxruntime" in lines


def test_the_logger_has_a_handler_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "splitbundle"):
        bundle = splitbundle.open(GOLDEN)
        stage = bundle.stage(layers=(0, 1), backend="torch")
    assert stage.layer_range == (0, 1)
    assert caplog.messages == [f"opened {GOLDEN}, bundle id {bundle.id}", "loaded layers [0, 1) with torch"]
    assert {record.filename for record in caplog.records} == {"opening.py", "bundle.py"}
    assert [type(handler) for handler in logging.getLogger("splitbundle").handlers] == [logging.NullHandler]
