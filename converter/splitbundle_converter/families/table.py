"""The families: for each, how its configuration becomes facts, and its tensors' names canonical ones.

A row is data and one function of the configuration. Nothing else in the converter, and nothing in the runtime, asks
what a model is called.
"""

from __future__ import annotations

from typing import Final

from splitbundle_converter.families.gemma import GEMMA_FAMILIES
from splitbundle_converter.families.gpt import GPT_FAMILIES
from splitbundle_converter.families.llama import LLAMA_FAMILIES
from splitbundle_converter.families.megatron import MEGATRON_FAMILIES
from splitbundle_converter.families.row import Family

FAMILIES: Final[dict[str, Family]] = {
    row.model_type: row for row in (*GPT_FAMILIES, *MEGATRON_FAMILIES, *LLAMA_FAMILIES, *GEMMA_FAMILIES)
}
