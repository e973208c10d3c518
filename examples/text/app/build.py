"""Build the app: a zip that a Python runs, or a folder that needs no Python.

    python examples/text/app/build.py zipapp app.pyz
    python examples/text/app/build.py pyinstaller dist

The zip has the app and splitbundle. A Python that runs it needs ``pip install onnxruntime tokenizers jinja2``. The
folder of PyInstaller has all of that, and Python: DIRECTORY/app/app starts the app.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipapp
from pathlib import Path

import splitbundle

APP = Path(__file__).with_name("__main__.py")
PACKAGE = Path(splitbundle.__file__).parent
LEFT_OUT = ("torch", "transformers", "onnx", "huggingface_hub", "sympy", "scipy", "pandas", "matplotlib", "yaml")
"""Libraries that PyInstaller finds behind an import that the app never reaches, where they are installed."""


def build_zip(target: Path) -> None:
    """Write the zip."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(PACKAGE, Path(directory, "splitbundle"), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(APP, directory)
        zipapp.create_archive(directory, target, interpreter="/usr/bin/env python3", compressed=True)


def build_folder(target: Path) -> None:
    """Write the folder ``app`` into a directory. No hidden import needs a name."""
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--onedir", "--name", "app", "--log-level", "ERROR"]
    command += [part for name in LEFT_OUT for part in ("--exclude-module", name)]
    with tempfile.TemporaryDirectory() as work:
        places = ["--distpath", str(target), "--workpath", work, "--specpath", work, "--paths", str(PACKAGE.parent)]
        subprocess.run([*command, *places, str(APP)], check=True)


def main() -> int:
    """Build, and print the size. Return the exit status."""
    builders = {"zipapp": build_zip, "pyinstaller": build_folder}
    if len(sys.argv) != 3 or sys.argv[1] not in builders:
        print("usage: build.py zipapp|pyinstaller OUTPUT", file=sys.stderr)
        return 2
    target = Path(sys.argv[2]).absolute()
    builders[sys.argv[1]](target)
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files if not path.is_symlink())
    print(f"{sys.argv[2]}: {size / 1e6:.1f} MB in {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
