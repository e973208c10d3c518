"""The names of a checkpoint's small files, as transformers gives them. Weight files are in ``weight_files``."""

from __future__ import annotations

import re
from typing import Final

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
TOKENIZER: Final = "tokenizer.json"
CARD: Final = "README.md"
ADAPTER: Final = "adapter_config.json"
TEXT_FILES: Final = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
TEMPLATES: Final = "additional_chat_templates"
"""The directory of a checkpoint's other chat templates."""
TEMPLATE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.jinja")
"""The name of a chat template in this directory."""
