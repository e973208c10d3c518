"""Sessions and numbers under onnxruntime, at home in any process: copies, ids of every width, scalars of numpy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy
import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from tests.support.paths import ROOT

IDS = numpy.array([[44, 308, 68, 455, 270]])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    output: Path = tmp_path_factory.mktemp("numpy") / "license.splitbundle"
    return splitbundle_converter.convert(
        ROOT / "examples" / "license-gpt2", output, split=[2, 4], check=False, onnx=True
    )


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("backend", ["onnxruntime", {"trunk": "onnxruntime"}])
def test_a_session_can_be_copied(bundle: splitbundle.Bundle, backend: object, how: str) -> None:
    pipeline = bundle.pipeline(backend=backend)  # type: ignore[call-overload]
    session = pipeline.session(1, 200)
    pipeline(IDS[:, :3], session=session)
    other = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda session: pickle.loads(pickle.dumps(session)),
    }[how](session)
    one = pipeline(IDS[:, 3:], session=session)
    pipeline(numpy.full((1, 100), 9), session=session)  # the copy must not see this
    assert numpy.array_equal(pipeline(IDS[:, 3:], session=other), one)
    assert (session.past, other.past) == ([105], [5])


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_every_width(bundle: splitbundle.Bundle, backend: str, dtype: str) -> None:
    pipeline = bundle.pipeline(backend={"bottom": "onnxruntime"} if backend == "torch" else backend)
    ids = numpy.array([[44, 30, 68, 45, 27]])
    assert numpy.array_equal(pipeline(ids.astype(dtype)), pipeline(ids))
    stage = bundle.stage("bottom", backend="onnxruntime")
    assert numpy.array_equal(stage(ids.astype(dtype), count=numpy.array([3], dtype)), stage(ids, count=[3]))


@pytest.mark.parametrize("wrong", [2**63, 2**64 - 1, 640])
def test_wide_ids_that_are_too_large(bundle: splitbundle.Bundle, wrong: int) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] stage bottom, token ids: expected ids from 0 to 639"):
        bundle.stage("bottom", backend="onnxruntime")(numpy.array([[1, wrong]], "uint64"))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_scalars_of_numpy(bundle: splitbundle.Bundle, backend: str) -> None:
    pipeline = bundle.pipeline(backend=backend, threads=numpy.int32(1))
    ids = pipeline.token_ids(IDS.tolist())
    drawn = pipeline.generate(
        ids,
        max_new_tokens=numpy.uint8(3),
        temperature=numpy.float32(0.5),
        top_k=numpy.int64(3),
        top_p=numpy.float64(0.75),
        seed=numpy.uint32(7),
        stop_ids=numpy.array([1], "int16"),
        session=pipeline.session(numpy.int16(1), numpy.uint16(16)),
    )
    plain = pipeline.generate(ids, max_new_tokens=3, temperature=0.5, top_k=3, top_p=0.75, seed=7, stop_ids=[1])
    assert [token.tolist() for token in drawn] == [token.tolist() for token in plain]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", numpy.float32(-1)),
        ("temperature", numpy.array([1.0, 2.0])),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", numpy.float32(2.5)),
        ("top_p", numpy.float64("nan")),
        ("seed", 1.5),
    ],
)
def test_numbers_that_are_none(bundle: splitbundle.Bundle, name: str, value: object) -> None:
    pipeline = bundle.pipeline(backend="onnxruntime")
    with pytest.raises(BundleError, match=rf"\[input.value\] {name}: "):
        pipeline.generate(IDS, **{name: value})
