"""Pipelines of the small models, padded batches, and their generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from splitbundle.backends.torch.pipeline import Pipeline
from tests.support.models import bundle


@cache
def pipeline(name: str) -> Pipeline:
    """Load the named model with one stage a layer."""
    return bundle(name).pipeline()


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[7] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def generated(name: str, rows: Sequence[Sequence[int]], **arguments: Any) -> list[list[int]]:
    """Return the generated tokens of the pipeline, row by row."""
    ids, mask = left_padded(rows)
    given = pipeline(name).generate(ids, attention_mask=mask, **arguments)
    return torch.stack(list(given), dim=1).tolist()
