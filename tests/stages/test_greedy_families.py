"""Greedy text of one random model for each family, batched and single, in both backends: that of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import graph_bundles
from tests.support.models import ONE_PER_FAMILY, WITHOUT_CACHE, bundle, original, token_rows
from tests.support.pipelines import left_padded
from tests.support.tiers import USUAL, thinned

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]

TOKENS = 8


@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, USUAL))
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    rows = token_rows(5, 2, 7)
    model = original(name)
    known = []
    for row in rows:
        ids = torch.tensor([row])
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=TOKENS,
            pad_token_id=0,
            eos_token_id=-1,
            use_cache=name not in WITHOUT_CACHE,
        )
        known.append(made[0, len(row) :].tolist())
    batch, mask = left_padded(rows)
    for backend, made in (("torch", bundle(name)), ("onnxruntime", graph_bundles.bundle(name))):
        pipeline: Any = made.pipeline(backend=backend)
        taken = [list(pipeline.generate(pipeline.token_ids([row]), max_new_tokens=TOKENS)) for row in rows]
        assert [[int(step[0]) for step in row] for row in taken] == known, backend
        given: Any = (batch, mask) if backend == "torch" else (batch.numpy(), mask.numpy())
        steps = list(pipeline.generate(given[0], attention_mask=given[1], max_new_tokens=TOKENS))
        assert [[int(step[i]) for step in steps] for i in range(len(rows))] == known, backend
