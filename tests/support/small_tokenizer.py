"""The tokenizer of the trained example with room for tokens of a test."""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from tests.support.paths import ROOT


def tokenizer_with_room(number: int = 10) -> Tokenizer:
    """Return it without its last tokens: the model has as many ids as its vocabulary, and new tokens need some."""
    document = json.loads((ROOT / "examples/license-gpt2/tokenizer.json").read_text("utf-8"))
    model = document["model"]
    kept = len(model["vocab"]) - number
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < kept}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return Tokenizer.from_str(json.dumps(document))
