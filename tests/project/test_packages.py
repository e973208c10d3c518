"""The wheel, the sdist and an editable install work, and type checkers see the public names.

These tests build the distributions and make environments from nothing, so they run in ``make test-long``.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.long

GOLDEN = ROOT / "tests" / "golden" / "v1.0" / "gpt2.splitbundle"
SECONDS = 1200
"""A hang ends after this; nothing here is a bound on speed."""
CONSUMER = """
from pathlib import Path

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError, MissingExtra, ParityError, Problem, Selection, Verification


def use(path: Path, backend: str) -> tuple[Problem, ...]:
    bundle: Bundle = splitbundle.open(path, verify="always")
    selection: Selection = bundle.select("bottom")
    found: Verification = bundle.verify(exact=True)
    assert selection.units and found.files
    stage = bundle.stage("bottom", device="cpu", dtype="float32", trainable=True)
    other = bundle.stage(layers=(0, 2), backend="onnxruntime", threads=2, prepack=True)
    either = bundle.pipeline(backend=backend, dtype="float32", threads=1)
    remote = bundle.stage("trunk", remote="grpcs://a.example:7000", tls="keys", trainable=True)
    remote.step(learning_rate=1e-4)
    bundle.pipeline(remote={"trunk": ["grpcs://a.example:7000"]}, tls=path, wire="float16", threads=1)
    bundle.pipeline(backend=backend, remote={"trunk": "grpcs://a.example:7000"}, timeout=5.0)
    reveal_type(stage)
    reveal_type(other)
    reveal_type(remote)
    reveal_type(either)
    reveal_type(bundle.pipeline())
    reveal_type(splitbundle_converter.convert("gpt2", "gpt2.splitbundle", split=[2, 10]))
    try:
        bundle.run_vectors()
    except (ParityError, MissingExtra) as error:
        return error.problems
    except BundleError as error:
        return error.problems
    return ()
"""
REVEALED = (
    "splitbundle.backends.torch.stage.Stage",
    "splitbundle.backends.onnxruntime.stage.Stage",
    "splitbundle.backends.torch.remote.RemoteStage",
    "Any",
    "splitbundle.backends.torch.pipeline.Pipeline",
    "splitbundle.bundle.Bundle",
)
WRONG = """
import splitbundle

splitbundle.open("x").stage(2)
splitbundle.open("x").pipeline(providers=["CPUExecutionProvider"])
splitbundle.open(3)
"""


def run(*command: str | Path, cwd: Path, good: bool = True) -> str:
    """Run a command, and return what it printed."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert not good or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def python_of(environment: Path) -> Path:
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a build reads, as building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout") / "splitbundle"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", ".*_cache", "__pycache__", "tests", "docs")
    return Path(shutil.copytree(ROOT, copy, ignore=left_out))


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", place, checkout, cwd=place)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built by the hooks that the build backend has for it."""
    place = tmp_path_factory.mktemp("sdist")
    environment = place / "build"
    venv.create(environment, with_pip=True)
    constraints = ROOT / "constraints.txt"
    run(python_of(environment), "-m", "pip", "install", "--constraint", constraints, "hatchling", cwd=place)
    build = f"import hatchling.build; print(hatchling.build.build_sdist({str(place)!r}))"
    run(python_of(environment), "-c", build, cwd=checkout)
    return next(place.glob("*.tar.gz"))


def smoke(environment: Path, tmp_path: Path) -> None:
    """Use an installation that has no dependencies, as a new user would."""
    command = [python_of(environment), "-m", "splitbundle"]
    assert run(*command, "--version", cwd=tmp_path).startswith("splitbundle ")
    assert "golden-gpt2" in run(*command, "inspect", GOLDEN, cwd=tmp_path)
    assert "every size and digest as listed" in run(*command, "verify", GOLDEN, cwd=tmp_path)
    run(*command, "example", "license-gpt2", "-o", "copied", cwd=tmp_path)
    original = ROOT / "examples" / "license-gpt2"
    assert {path.name: path.read_bytes() for path in (tmp_path / "copied").iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }
    missing = run(*command, "convert", "copied", "-o", "x.splitbundle", cwd=tmp_path, good=False)
    assert 'pip install "splitbundle[convert]"' in missing


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_an_installation_works(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    source: list[str | Path] = ["--editable", ROOT] if kind == "editable" else [request.getfixturevalue(kind)]
    run(python_of(environment), "-m", "pip", "install", "--no-deps", *source, cwd=tmp_path)
    smoke(environment, tmp_path)


def test_the_wheel_has_the_page(wheel: Path) -> None:
    """The page isn't Python, so nothing imports it, and a build that leaves it out would work until it is served."""
    page = Path("splitbundle", "serving", "web", "page")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {(page / path.name).as_posix() for path in (ROOT / "runtime" / page).iterdir()}
    assert files
    assert files - names == set()


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    assert {item.filename: item.CRC for item in first.infolist()} == {
        item.filename: item.CRC for item in second.infolist()
    }


@pytest.fixture(scope="module")
def consumer(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, that sees the libraries of this one, and no checkout."""
    environment = tmp_path_factory.mktemp("consumer") / "environment"
    venv.create(environment, with_pip=True)
    run(python_of(environment), "-m", "pip", "install", "--no-deps", wheel, cwd=environment)
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python_of(environment), "-c", script, cwd=environment).strip())
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    return environment


def test_mypy_sees_the_public_names(consumer: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(CONSUMER, "utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, "utf-8")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python_of(consumer)]
    seen = run(*mypy, "use.py", cwd=tmp_path)
    assert [line.partition('"')[2].rstrip('"') for line in seen.splitlines() if "Revealed" in line] == list(REVEALED)
    refused = run(*mypy, "wrong.py", cwd=tmp_path, good=False)
    assert "Found 3 errors" in refused


def test_pyright_sees_the_public_names(consumer: Path, tmp_path: Path) -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright isn't installed")
    (tmp_path / "use.py").write_text(CONSUMER, "utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, "utf-8")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', "utf-8")
    seen = run(pyright, "--pythonpath", python_of(consumer), "use.py", cwd=tmp_path)
    assert "0 errors" in seen
    for name in ("Stage", "Pipeline", "Bundle"):
        assert f'is "{name}"' in seen
    refused = run(pyright, "--pythonpath", python_of(consumer), "wrong.py", cwd=tmp_path, good=False)
    assert "errors" in refused
    assert {f"wrong.py:{line}:" in refused for line in (4, 5, 6)} == {True}


def test_the_pages_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """README, tutorials and guides, in an environment made from nothing but the wheel and its libraries."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    pip = [python_of(environment), "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run(*pip, "torch", cwd=tmp_path)  # first: a loose requirement brings gigabytes of GPU packages
    run(*pip, f"{wheel}[onnx,share,network]", "peft", cwd=tmp_path)  # a guide hands an adapter to peft
    settings = os.environ | {"SPLITBUNDLE_DOCS_PYTHON": str(python_of(environment))}
    pages = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/project/test_readme.py"]
    done = subprocess.run(
        [*pages, "-k", "page and not genai"],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_importing_costs_little() -> None:
    """Importing splitbundle takes less than importing typing and dataclasses, which it avoids (medians of 20)."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
        return time.perf_counter() - start

    own = f"import sys; sys.path.insert(0, {str(ROOT / 'runtime')!r}); import splitbundle"
    pairs = [(seconds("pass"), seconds(own), seconds("import typing, dataclasses")) for _ in range(20)]
    nothing, ours, yardstick = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = (ours - nothing) / (yardstick - nothing)
    assert share < 1, f"{share:.2f} of what importing typing and dataclasses takes"
