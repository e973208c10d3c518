"""The example of stages over a network runs, and says the truth."""

from __future__ import annotations

import subprocess
import sys

import splitbundle
from tests.support.paths import ROOT

PROMPT = "Licensed under the Apache License"


def test_the_example_goes_on_with_a_second_server(every_cut: splitbundle.Bundle) -> None:
    program = ROOT / "examples" / "stages_over_a_network.py"
    done = subprocess.run(
        [sys.executable, program, every_cut.path, PROMPT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{PROMPT}, Version 2.0")
    assert "was killed after 20 pieces" in done.stdout
    assert done.stdout.endswith("The text is that of one machine.\n")
