"""Quantized bundles of every family, cut at every layer: the original class gives the same with the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import splitbundle_converter
from tests.support import models, tiers, widened

KEPT = frozenset({"gpt2-by-layer", "llama-llama3", "gemma2-capped-biased", "falcon-new", "qwen2_moe", "gpt_oss"})
"""Both norms, transposed and fused sources, caps, a tied table, and experts with and without biases."""


@pytest.mark.parametrize("name", tiers.thinned(widened.NAMES, KEPT))
def test_the_original_class_computes_the_same(name: str, tmp_path: Path) -> None:
    plain = widened.bundle(name, tmp_path)
    for to in ("int8", "int4"):
        quantized = plain.quantize(tmp_path / f"{to}.splitbundle", to, method="rtn", vectors=False)
        found = Counter(quantized.manifest.storage.encodings.values())
        assert found["rows8"] if to == "int8" else found["blocks4_32"] > found["rows8"]
        path = splitbundle_converter.export(quantized, tmp_path / to, dequantize=True)
        original = models.load_original(path)
        rows = torch.tensor(models.token_rows(12, 12))
        expected = torch.stack([models.original_logits(original, row.tolist()) for row in rows])
        pipeline = quantized.pipeline(dtype="float32", kernels="torch")
        with torch.no_grad():
            assert models.relative(pipeline(rows), expected) < 1e-5
            session, pieces = pipeline.session(2, 12), []
            for start, stop in ((0, 5), (5, 6), (6, 12)):
                pieces.append(pipeline(rows[:, start:stop], session=session))
            assert models.relative(torch.cat(pieces, 1), expected) < 1e-5
