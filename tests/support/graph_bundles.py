"""Bundles with graphs, and stages over them."""

from __future__ import annotations

from functools import cache

import splitbundle
import splitbundle_converter
from splitbundle import Bundle
from tests.support.models import LAYERS, checkpoint, once


def bundle(
    name: str, split: tuple[int, ...] = tuple(range(LAYERS + 1)), dtype: str = "float32", variant: str = "standard"
) -> Bundle:
    """Return the named model with one graph a shard.

    By default, each layer is a shard, and so are the embedding and the head.
    """
    return _bundle(name, split, dtype, variant)


@cache
def _bundle(name: str, split: tuple[int, ...], dtype: str, variant: str) -> Bundle:
    source = checkpoint(name, dtype)
    made = once(
        f"{name}-{'-'.join(map(str, split))}-{dtype}-{variant}.splitbundle",
        lambda path: splitbundle_converter.convert(source, path, split=split, check=False, onnx=variant),
    )
    return splitbundle.open(made)
