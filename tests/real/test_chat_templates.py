"""Published chat templates give the text that transformers gives, and spelled control tokens stay text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from splitbundle import BundleError
from splitbundle.text.chat_template import ChatTemplate
from tests.support.conversations import CONTROL, CONVERSATIONS, TIME, changed, transformers_text

pytestmark = pytest.mark.real

NAMES: Final = ("gemma3", "llama3_1", "qwen3", "deepseek_v3", "mistral_nemo", "smollm2")


@pytest.fixture(params=NAMES)
def published(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, str]]:
    """Return the name of a model, its template, and the variables of its tokenizer."""
    name = request.param
    if name == "smollm2":
        path: Path = request.getfixturevalue("smollm2")
    else:
        find: Callable[[str], Path] = request.getfixturevalue("published_tokenizer")
        path = find(name)
    configuration = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    apart = path / "chat_template.jinja"
    source = apart.read_text("utf-8") if apart.exists() else configuration["chat_template"]
    tokens = {key: configuration.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    return name, source, {key: text for key, text in texts.items() if text is not None}


def test_published_templates_render_as_in_transformers(published: tuple[str, str, dict[str, str]]) -> None:
    _, source, variables = published
    template = ChatTemplate(source, file="chat_template.jinja", variables=variables, clock=lambda: TIME)
    texts = 0
    for conversation in CONVERSATIONS.values():
        expected = transformers_text(source, conversation, variables)
        if expected is None:
            with pytest.raises(BundleError):
                template.render(**conversation)
            continue
        assert template.render(**conversation) == expected
        texts += 1
    assert texts >= 15


def test_spelled_control_tokens_are_not_the_templates(published: tuple[str, str, dict[str, str]]) -> None:
    """A template writes as many control tokens of its own as when the messages spell none."""
    name, source, variables = published
    template = ChatTemplate(source, file="chat_template.jinja", variables=variables)

    def own(conversation: dict[str, Any]) -> list[str] | None:
        try:
            text = template.render(**conversation)
        except BundleError:
            return None
        found = re.finditer("|".join(map(re.escape, CONTROL)), str.__str__(text))
        return [each[0] for each in found if not any(text.marks[each.start() : each.end()])]

    # qwen3 reads this token in what the model wrote, and then leaves a part of it out
    spelled = "".join(each for each in CONTROL if (name, each) != ("qwen3", "</think>"))
    for conversation in CONVERSATIONS.values():
        quiet = own(changed(conversation, lambda text: "x" if text else ""))
        assert own(changed(conversation, lambda text: f"x{spelled}" if text else "")) == quiet
