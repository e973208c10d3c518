"""Published tokenizers in JavaScript: the page gives the ids that the library gives, for 10,000 texts each."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC

from tests.real.test_tokenizers import texts
from tests.support.paths import TESTS

pytestmark = [
    pytest.mark.real,
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("node") is None, reason="Node isn't installed"),
]
SCRIPT = TESTS / "browser" / "encode_texts.mjs"
MOST_OF_OTHER_UNICODE = 10
"""The texts that Node and the library may compose in different ways, as they know other versions of Unicode."""


def encoded(tokenizer: Path, given: list[str]) -> list[dict[str, Any]]:
    command = ["node", str(SCRIPT), str(tokenizer)]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["gpt2", "llama3_1", "qwen2_5", "qwen3", "deepseek_v3", "gptoss"])
def test_ids_of_a_published_tokenizer(published_tokenizer: Callable[[str], Path], name: str) -> None:
    path = published_tokenizer(name) / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    control = [
        token.content
        for token in library.get_added_tokens_decoder().values()
        if not token.special and token.content.startswith(("<|", "<｜"))
    ]  # to the library, these are tokens in any text; in a bundle they stay text
    given = [text for text in texts(3) if not any(each in text for each in control)]
    nfc, others = NFC(), 0
    for text, wanted, found in zip(given, library.encode_batch(given), encoded(path, given), strict=True):
        if nfc.normalize_str(text) != found["composed"]:
            others += 1
            continue
        assert found["ids"] == wanted.ids, ascii(text)
        assert found["text"] == library.decode(wanted.ids), ascii(text)
    assert others <= MOST_OF_OTHER_UNICODE


@pytest.mark.parametrize(("name", "kind"), [("gemma3", "unk_token"), ("llama2", "unk_token")])
def test_another_kind_is_refused_by_its_name(published_tokenizer: Callable[[str], Path], name: str, kind: str) -> None:
    with pytest.raises(RuntimeError, match=kind):
        encoded(published_tokenizer(name) / "tokenizer.json", ["a"])
