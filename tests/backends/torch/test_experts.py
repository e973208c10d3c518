"""Mixtures of experts: which experts are chosen, and what a token reads of them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle.backends.torch.experts import Router
from tests.support.expert_models import MATRICES, STATUS, mapped, write_experts
from tests.support.models import bundle, token_rows
from tests.support.tiers import FEW_EXPERTS, WITH_EXPERTS, thinned

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS, CHOSEN = 64, 4


@pytest.mark.parametrize("name", thinned(WITH_EXPERTS, FEW_EXPERTS))
def test_tokens_choose_different_experts(name: str) -> None:
    """Else parity would say little: a router of wrong numbers would choose the same experts."""
    pipeline = bundle(name).pipeline()
    chosen: dict[Router, set[int]] = {}

    def note(router: Router, args: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        chosen.setdefault(router, set()).update(output[1].flatten().tolist())

    routers = [module for stage in pipeline.stages for module in stage.modules() if isinstance(module, Router)]
    for router in routers:
        router.register_forward_hook(note)
    pipeline(torch.tensor(token_rows(*[16] * 8, seed=4)))
    assert routers
    counts = {len(router.weight) for router in routers}
    assert len(set.union(*chosen.values())) >= 0.75 * counts.pop()
    assert not counts


@pytest.mark.skipif(not STATUS.exists(), reason="RssFile is Linux's")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_reads_its_own_experts(tmp_path: Path, dtype: str) -> None:
    """A layer has 64 experts of 1 MiB in float32, and a token uses 4 of them."""
    write_experts(tmp_path / "source", EXPERTS, CHOSEN)
    warm = bundle("olmoe-one").pipeline()
    warm(torch.tensor([[1]]), session=warm.session(1, 8))  # the code of the library is in memory then
    whole = splitbundle_converter.convert(tmp_path / "source", tmp_path / "b", dtype=dtype, check=False)
    chosen = CHOSEN * MATRICES * (4 if dtype == "float32" else 2)
    before = mapped()
    pipeline = whole.pipeline(dtype=dtype)
    session = pipeline.session(1, 8)
    loaded = mapped() - before
    pipeline(torch.tensor([[1]]), session=session)
    grown = mapped() - before - loaded
    print(f"{dtype}: loading {loaded / 2**20:.1f} MiB, a token {grown / 2**20:.1f} of {chosen / 2**20:.1f} MiB")
    assert loaded < chosen * EXPERTS / CHOSEN / 8
    assert 0.9 * chosen <= grown <= 3 * chosen


@pytest.mark.long
def test_the_time_of_a_token_does_not_grow_with_the_experts(tmp_path: Path) -> None:
    """With 32 times as many experts, a token takes about as long. The same tokens are warm in both."""
    fastest = {}
    for count in (8, 256):
        write_experts(tmp_path / f"source-{count}", count, CHOSEN)
        splitbundle_converter.convert(tmp_path / f"source-{count}", tmp_path / f"{count}", check=False)
        fastest[count] = float("inf")
    pipelines = {count: splitbundle.open(tmp_path / f"{count}").pipeline() for count in fastest}
    for _ in range(60):
        for count, pipeline in pipelines.items():
            session = pipeline.session(1, 4)
            start = time.perf_counter()
            pipeline(torch.tensor([[1]]), session=session)
            fastest[count] = min(fastest[count], time.perf_counter() - start)
    print(f"a token with 8 experts: {fastest[8] * 1000:.2f} ms, with 256: {fastest[256] * 1000:.2f} ms")
    assert fastest[256] <= 2 * fastest[8]
