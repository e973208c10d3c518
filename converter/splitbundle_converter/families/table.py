"""The table of families. A row maps the fields of a configuration to facts, and tensor names to canonical names.

A row is data and one function of the configuration. No other code of the converter, and no code of the runtime, depends
on the name of a model.
"""

from __future__ import annotations

from typing import Final

from splitbundle_converter.families.gated_attention import GATED_ATTENTION_FAMILIES
from splitbundle_converter.families.gemma import GEMMA_FAMILIES
from splitbundle_converter.families.gpt import GPT_FAMILIES
from splitbundle_converter.families.llama import LLAMA_FAMILIES
from splitbundle_converter.families.llama_experts import EXPERT_FAMILIES
from splitbundle_converter.families.llama_layer_norm import LAYER_NORM_FAMILIES
from splitbundle_converter.families.megatron import MEGATRON_FAMILIES
from splitbundle_converter.families.renamed_experts import RENAMED_EXPERT_FAMILIES
from splitbundle_converter.families.row import Family

FAMILIES: Final[dict[str, Family]] = {
    row.model_type: row
    for row in (
        *GPT_FAMILIES,
        *MEGATRON_FAMILIES,
        *LLAMA_FAMILIES,
        *LAYER_NORM_FAMILIES,
        *EXPERT_FAMILIES,
        *RENAMED_EXPERT_FAMILIES,
        *GATED_ATTENTION_FAMILIES,
        *GEMMA_FAMILIES,
    )
}
