"""onnxruntime-web for tests: the npm package, fetched to ``build/real`` at the first run."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

import pytest

from splitbundle.serving.gateway.page_files import ONNXRUNTIME
from tests.support.paths import ROOT

VERSION: Final = "1.30.0"
PLACE: Final = ROOT / "build" / "real" / "onnxruntime-web"


def find_onnxruntime_web() -> Path:
    """Return a directory with the files that the page needs. The test is skipped where they can't be had."""
    if not PLACE.exists():
        PLACE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PLACE.parent) as private:
            made = Path(private) / "made"
            made.mkdir()
            try:
                command = ["npm", "pack", "--silent", f"onnxruntime-web@{VERSION}"]
                subprocess.run(command, cwd=private, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("npm can't fetch onnxruntime-web")
            with tarfile.open(next(Path(private).glob("*.tgz"))) as package:
                for name in ONNXRUNTIME:
                    opened = package.extractfile(f"package/dist/{name}")
                    assert opened is not None
                    (made / name).write_bytes(opened.read())
            made.rename(PLACE)
    return PLACE
