"""Which cases of a sweep run in ``make test``, and which have the marker ``long`` and wait for ``make test-long``.

The rules:

1. Parity runs for each family in two configurations: the first in its table, which is its default shape, and the one
   with the most ways to go wrong (``ONE_PER_FAMILY``). The other configurations are long. The
   scenarios of batches and caches, which take longest, run for ``ONE_PER_FAMILY`` alone, each at another cut.
   They run at every cut for ``FEW``.
2. What depends on the facts of an architecture and not on its family (graphs, gradients, computing in bfloat16) runs
   for ``EVERY_FACT``. What its facts hardly change (another dtype, a second seed, the wrong facts that must show, any
   cuts of any depth) runs for ``FEW``: configurations that together have most parts of a decoder. The other families
   are long.
3. Of combinations (pairs of cuts, dtypes times dtypes, faults times system calls) one line through all values is short,
   and the rest is long.
4. Families with experts differ little beside their router. Their parity at one cut runs for ``ONE_PER_FAMILY``; the
   rest of them is long, but for ``FEW_EXPERTS``, which together have every option of a router and of gates.
5. A case of more than about five seconds is long, unless it is the only one that tests something.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import pytest

from tests.support import models_experts, models_gated_attention, models_renamed_experts
from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY

WITH_EXPERTS: Final = (
    models_experts.CONFIGURATIONS | models_renamed_experts.CONFIGURATIONS | models_gated_attention.CONFIGURATIONS
)
"""The configurations of families with experts."""
FEW_EXPERTS: Final = frozenset(
    {
        "qwen2_moe",
        "gpt_oss",
        "glm4_moe",
        "phimoe",
        "kolibri1",
        "granitemoeshared",
        "ernie4_5_moe-steps",
        "dbrx-clipped",
        "laguna-heads",
        "beam-tied",
        "mimo_v2_flash-groups",
    }
)
"""Softmax, sigmoid and sparsemixer; groups, corrections, caps; shared blocks; biases and clamps; fused and transposed
sources; gates, narrow values, scaled sums."""
USUAL: Final = tuple(name for name in ONE_PER_FAMILY if name not in WITH_EXPERTS or name in FEW_EXPERTS)
"""The hardest configuration of each dense family, and of a few families with experts."""
DEFAULT_SHAPES: Final = tuple(
    name
    for name in {family: name for name, (family, _) in reversed(CONFIGURATIONS.items())}.values()
    if name not in WITH_EXPERTS
)
"""The first configuration of each dense family."""
TWO_PER_FAMILY: Final = frozenset({*DEFAULT_SHAPES, *ONE_PER_FAMILY})
FEW: Final = frozenset(
    {
        "gpt2-by-layer",
        "llama-llama3",
        "qwen2-mixed",
        "gemma2-capped-biased",
        "bloom-nine-heads-untied",
        "granite_swa-bases-biased",
        "llama4_text-tuned-biased",
        "apertus-biased",
        "cohere2-biased-untied",
        "falcon-new",
        "qwen2_moe",
    }
)
"""Both norms, all placements, caps, offsets, ALiBi, sinks, windows, chunks, temperatures, xIELU, fused projections, and
experts."""
EVERY_FACT: Final = FEW | frozenset(
    {
        "beam-tied",
        "gemma3_text-linear-biased",
        "gpt_neo-mixed-untied",
        "gpt_oss",
        "internlm3-biased",
        "kolibri1",
        "laguna-heads",
        "mimo_v2_flash-groups",
        "ministral3-window",
        "mpt-six-heads-clipped",
        "nanochat-biased",
        "olmo2-biased",
        "opt-post-narrow",
        "phi-linear-tied",
        "phimoe",
        "stablelm-parallel-biased",
        "xglm-odd-unscaled",
    }
)
"""Configurations that together have every fact that any of ``USUAL`` has; ``project/test_tiers.py`` compares them."""


def thinned(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return the parameters of a sweep: those that aren't in ``kept`` are long. Ids stay the same."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.long) for value in values]


def crossed(*axes: Iterable[Any], kept: Callable[..., bool]) -> list[Any]:
    """Return the parameters of several sweeps at once: every combination that ``kept`` is false of is long.

    The ids are those of stacked ``parametrize`` marks whose lowest has the first of the axes.
    """
    return [
        pytest.param(*values, marks=() if kept(*values) else pytest.mark.long) for values in itertools.product(*axes)
    ]
