"""Graphs over quantized weights of every family, cut at every layer, agree with torch."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

import splitbundle_converter
from splitbundle.backends.onnxruntime.pipeline import Pipeline
from splitbundle.backends.onnxruntime.stage import load_stages
from tests.support import models, tiers, widened

pytestmark = pytest.mark.usefixtures("one_thread")
KEPT = frozenset({"gpt2-by-layer", "gemma2-capped-biased", "qwen2_moe"})
FLOATS = 2e-3
"""The largest difference as a share of the largest logit, if no product rounds to 8 bits."""
TIES = frozenset({"granitemoeshared", "laguna-channels"})
"""Models with a token for which two experts score nearer than 13 bits can tell. Later tokens attend to it."""
TIED = 0.5
"""The largest share of tokens that such a tie may change."""


@pytest.mark.parametrize("name", tiers.thinned(widened.NAMES, KEPT))
def test_backends_agree(name: str, tmp_path: Path) -> None:
    plain = widened.bundle(name, tmp_path)
    rows = numpy.array(models.token_rows(12, 12))
    mask = numpy.array([[0] * 3 + [1] * 9, [1] * 12])
    for to in ("int8", "int4"):
        small = plain.quantize(tmp_path / f"{to}.splitbundle", to, method="rtn", vectors=False)
        made = splitbundle_converter.add_onnx(small, check=False, force=True)
        selections = [made.select(shard.name) for shard in made.shards]
        graphs = Pipeline(load_stages(made, selections, threads=1, exact=True))
        with torch.no_grad():
            given = torch.from_numpy(rows), torch.from_numpy(mask)
            stages = made.pipeline(dtype="float32", kernels="torch")
            expected = stages(given[0], attention_mask=given[1]).numpy()
        session, pieces = graphs.session(2, 12), []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            pieces.append(graphs(rows[:, start:stop], attention_mask=mask[:, start:stop], session=session))
        off = numpy.abs(numpy.concatenate(pieces, axis=1) - expected).max(axis=-1) / numpy.abs(expected).max()
        assert (off >= FLOATS).mean() <= (TIED if name in TIES else 0), to
