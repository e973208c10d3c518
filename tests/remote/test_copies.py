"""Copies of remote stages and of pipelines with them: they work, or are refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.serving.stage_server import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = torch.tensor([[44, 308, 68, 455, 270]])
COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_copy_computes_like_the_stage_with_sessions_of_its_own(
    every_cut: splitbundle.Bundle, copied: Callable[[Any], Any], backend: str
) -> None:
    with StageServer(every_cut, "trunk-2", backend=backend) as server, torch.no_grad():
        far = every_cut.stage("trunk-2", backend=backend, remote=server.url)  # type: ignore[call-overload]
        hidden: Any = torch.randn(1, 3, 96)
        hidden = hidden if backend == "torch" else hidden.numpy()
        own = copied(far)
        assert own is not far
        caches = far.cache(1, 8), own.cache(1, 8)
        first, second = (stage(hidden, cache=cache) for stage, cache in zip((far, own), caches, strict=True))
        assert (first == second).all()
        assert len(server.service.sessions) == 2
        del far
        again = own(hidden, past=[3], cache=caches[1])
        assert again.shape == (1, 3, 96)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_a_pipeline_computes_like_the_pipeline(
    every_cut: splitbundle.Bundle, copied: Callable[[Any], Any]
) -> None:
    with StageServer(every_cut, "trunk-2") as server:
        pipeline = every_cut.pipeline(remote={"trunk-2": server.url}, kernels="torch")
        assert torch.equal(copied(pipeline)(PROMPT), pipeline(PROMPT))


def test_a_pickle_of_a_remote_stage_is_refused(every_cut: splitbundle.Bundle) -> None:
    """It would hold a token, or a path to a private key."""
    with StageServer(every_cut, "trunk-2") as server:
        for stage in (
            every_cut.stage("trunk-2", remote=server.url, token="0123456789abcdef"),
            every_cut.stage("trunk-2", backend="onnxruntime", remote=server.url),
            every_cut.pipeline(remote={"trunk-2": server.url}),
        ):
            with pytest.raises(BundleError, match=r"\[stage.copy\] stage trunk-2: expected a stage that stays in its"):
                pickle.dumps(stage)


def test_a_deep_copy_of_a_stage_that_is_trained_on_a_server_is_refused(every_cut: splitbundle.Bundle) -> None:
    """A deep copy of a stage of this machine has weights of its own. The server has one set."""
    with StageServer(every_cut, "trunk-2", trainer=Trainer()) as server:
        far = every_cut.stage("trunk-2", remote=server.url, trainable=True)
        with pytest.raises(BundleError, match=r"\[stage.copy\] stage trunk-2: expected a stage that only computes"):
            copy.deepcopy(far)
        with pytest.raises(BundleError, match=r"\[stage.copy\]"):
            pickle.dumps(far)
        assert copy.copy(far).training_link is far.training_link
