"""Stages of one's own in a pipeline: with the checks of ``splitbundle.extending``, and their codes."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.backends.onnxruntime.pipeline import Pipeline as NumpyPipeline
from splitbundle.backends.torch.pipeline import Pipeline
from splitbundle.extending import ArrayStage, CacheState, TensorStage
from tests.support.models import checkpoint, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bottom [0, 1), trunk [1, 3), top [3, 4)."""
    output = tmp_path_factory.mktemp("own") / "llama.splitbundle"
    return splitbundle_converter.convert(checkpoint("llama"), output, split=(1, 3), check=False)


class _Elsewhere:
    """A trunk whose keys and values are in a cache of another stage."""

    def __init__(self, bundle: Bundle, there: Any) -> None:
        self.describe(bundle, bundle.select("trunk"))  # type: ignore[attr-defined]
        self.there, self.theirs = there, there.cache(2, 16)

    def __call__(self, inputs: Any, *, positions: Any, cache: Any = None, logits: Any = "all") -> Any:
        own = None if cache is None else self.theirs
        result = self.there(inputs, past=positions.past, count=positions.count, cache=own)
        if cache is not None:
            cache.advance(positions)
        return result


class _Tensors(_Elsewhere, TensorStage):
    device, dtype = torch.device("cpu"), torch.float32


class _Arrays(_Elsewhere, ArrayStage):
    pass


@pytest.mark.parametrize("kind", ["tensors", "arrays"])
def test_a_stage_of_ones_own_gives_the_results_of_the_stage_behind_it(bundle: Bundle, kind: str) -> None:
    bottom, trunk, top = (bundle.stage(shard.name) for shard in bundle.shards)
    rows = token_rows(5, 5)
    if kind == "tensors":
        own: Any = _Tensors(bundle, trunk)
        made: Any = Pipeline([bottom, own, top])
        ids: Any = torch.tensor(rows)
    else:
        own = _Arrays(bundle, trunk.over_numpy())
        made = NumpyPipeline([bottom, own, top])
        ids = numpy.array(rows)
    local = bundle.pipeline()
    with torch.no_grad():
        session, theirs = made.session(2, 16), local.session(2, 16)
        for _ in range(2):
            expected = local(torch.tensor(rows), session=theirs)
            assert torch.equal(torch.as_tensor(made(ids, session=session)), expected)
            session.rollback([2, 0])
            theirs.rollback([2, 0])
    assert session.past == [6, 10]
    assert isinstance(session.caches[1], CacheState)


def test_it_refuses_what_every_stage_refuses(bundle: Bundle) -> None:
    trunk = bundle.stage("trunk")
    own: Any = _Tensors(bundle, trunk)
    hidden = torch.zeros(1, 2, trunk.architecture.hidden_size)
    for given, code in (
        ({"cache": bundle.stage("bottom").cache(1, 4)}, "input.cache"),
        ({"cache": object()}, "input.cache"),
        ({"cache": own.cache(1, 1)}, "session.capacity"),
        ({"past": [1], "cache": own.cache(1, 4)}, "input.position"),
        ({"past": [1]}, "input.position"),
    ):
        with pytest.raises(BundleError) as caught:
            own.check(hidden, **given)
        assert caught.value.codes == (code,)
    with pytest.raises(BundleError, match=r"\[input.shape\]"):
        own.check(hidden[..., :-1])
    with pytest.raises(BundleError, match=r"\[input.dtype\]"):
        own.check(hidden.double())


def test_an_object_that_lacks_something_is_refused(bundle: Bundle) -> None:
    class Lacking:
        name = "trunk"

    with pytest.raises(BundleError, match=r"\[pipeline.stage\] .*Lacking, without fingerprint, .*cache, check_call"):
        Pipeline([bundle.stage("bottom"), Lacking(), bundle.stage("top")])  # type: ignore[list-item]


def test_the_module_has_no_other_names() -> None:
    assert {"ArrayStage", "CacheState", "Call", "StageContract", "TensorStage"} <= set(dir(splitbundle.extending))
    with pytest.raises(AttributeError, match="no attribute 'Stage'"):
        splitbundle.extending.Stage  # noqa: B018
