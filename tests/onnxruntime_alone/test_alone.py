"""The onnxruntime backend's own suite. It needs only onnxruntime, its numpy, pytest and the golden bundles."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy
import pytest

import splitbundle
from splitbundle.stages.golden import TOLERANCE
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
ALL = sorted(path.name for path in GOLDEN.glob("*.splitbundle"))
NAMES = [name for name in ALL if name not in ("experts.splitbundle", "int4.splitbundle")]
"""The bundles of plain dense models, on which everything is tried."""
ABSENT = {"torch", "transformers", "safetensors", "jsonschema", "onnx", "huggingface_hub", "tokenizers"}
BAR = f"import sys; sys.modules.update(dict.fromkeys({sorted(ABSENT)!r}))"


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> splitbundle.Bundle:
    """Each golden bundle in turn."""
    return splitbundle.open(GOLDEN / request.param)


@pytest.mark.parametrize("name", sorted({*ALL} - {*NAMES}))
def test_golden_vectors_of_experts_and_of_quantized_weights(name: str) -> None:
    golden = splitbundle.open(GOLDEN / name)
    assert golden.run_vectors(backend="onnxruntime")  # it refuses what isn't within the tolerance


def test_golden_vectors(golden: splitbundle.Bundle) -> None:
    differences = golden.run_vectors(backend="onnxruntime")
    assert [d.where for d in differences] == [*(f"hidden.{cut}" for cut in golden.manifest.cuts), "logits"]
    assert all(d.relative < TOLERANCE for d in differences)
    for shard in golden.shards:
        assert golden.run_vectors(shard.name, backend="onnxruntime")


def test_pieces_padding_and_rollback_are_one_answer(golden: splitbundle.Bundle) -> None:
    pipeline = golden.pipeline(backend="onnxruntime", threads=1)
    ids = numpy.random.default_rng(0).integers(0, 80, (2, 14))
    whole = pipeline(ids)
    session = pipeline.session(2, 20)
    given = [pipeline(ids[:, :5], session=session), pipeline(ids[:, 5:9], session=session)]
    session.rollback(2)
    given[1] = given[1][:, :2]
    given += [pipeline(ids[:, i : i + 1], session=session) for i in range(7, 14)]
    assert numpy.abs(numpy.concatenate(given, axis=1) - whole).max() <= TOLERANCE * numpy.abs(whole).max()
    padded = pipeline(ids, attention_mask=numpy.array([[0] * 4 + [1] * 10, [1] * 14]))
    alone = pipeline(ids[:1, 4:])
    assert not padded[0, :4].any()
    assert numpy.abs(padded[0, 4:] - alone[0]).max() <= TOLERANCE * numpy.abs(alone).max()


def test_some_rows_are_computed_while_others_wait(golden: splitbundle.Bundle) -> None:
    pipeline = golden.pipeline(backend="onnxruntime", threads=1)
    ids = numpy.random.default_rng(0).integers(0, 80, (3, 6))
    session, whole = pipeline.session(5, 20), pipeline(ids)
    given = [pipeline(ids[row : row + 1, :4], session=session, rows=[place]) for row, place in enumerate((4, 0, 2))]
    last = pipeline(ids[::-1, 4:], session=session, rows=[2, 0, 4])[::-1]
    got = numpy.concatenate((numpy.concatenate(given), last), axis=1)
    assert numpy.abs(got - whole).max() <= TOLERANCE * numpy.abs(whole).max()
    assert session.past == [6, 0, 6, 0, 6]


def test_shards_chain_by_hand(golden: splitbundle.Bundle) -> None:
    ids = numpy.arange(9)[None]
    x = ids
    for shard in golden.shards:
        x = golden.stage(shard.name, backend="onnxruntime")(x)
    assert numpy.array_equal(x, golden.pipeline(backend="onnxruntime")(ids))


def test_generating_imports_nothing_else() -> None:
    code = (
        "import sys, splitbundle;"
        f"p = splitbundle.open({str(GOLDEN / 'gpt2.splitbundle')!r}).pipeline(backend='onnxruntime');"
        "list(p.generate(p.token_ids([[1, 2, 3]]), max_new_tokens=3)); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "onnxruntime" in found
    assert not found & ABSENT


@pytest.mark.parametrize(
    "command", [["inspect"], ["verify", "--run", "--exact"], ["generate", "--ids", "1,2,3", "--max-new-tokens", "4"]]
)
def test_commands_take_the_backend_that_is_there(command: list[str]) -> None:
    arguments = [command[0], str(GOLDEN / "gpt2.splitbundle"), *command[1:], "--json"]
    # A barred module has no spec either, as if it weren't installed.
    find = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)"
    run = f"{BAR}; {find}; from splitbundle.cli.main import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"]


def test_what_is_missing_says_how_to_get_it() -> None:
    code = f"{BAR}; import splitbundle; splitbundle.open({str(GOLDEN / NAMES[0])!r}).pipeline(backend='torch')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert 'pip install "splitbundle[torch]"' in done.stderr
