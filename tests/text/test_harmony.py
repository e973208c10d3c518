"""A model that answers in harmony, gpt-oss' format: its pieces of text, ``serve`` and ``chat``."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import AddedToken

import splitbundle
import splitbundle_converter
from splitbundle.cli import main, text_options
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.opening import open_web_server
from splitbundle.stages.channels import MARKS
from tests.stages.test_channels import CALL, SUM, THOUGHT
from tests.support.paths import ROOT
from tests.support.scripted_pipeline import ScriptedPipeline
from tests.support.small_tokenizer import tokenizer_with_room

EXAMPLE = ROOT / "examples" / "license-gpt2"
TEMPLATE = """{%- for m in messages -%}
{%- if '<|channel|>' in m.content %}{{ raise_exception('content with channels') }}{% endif -%}
<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>
{%- endfor -%}{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example with harmony's control tokens. Its answers are written down."""
    place = tmp_path_factory.mktemp("harmony")
    source = Path(shutil.copytree(EXAMPLE, place / "source"))
    made = tokenizer_with_room()
    made.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    made.save(str(source / "tokenizer.json"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return splitbundle_converter.convert(source, place / "harmony.splitbundle", check=False)


class Scripted(ScriptedPipeline):
    def session(self, *_: object, **__: object) -> None:
        return None


def test_the_pieces_have_the_marks_of_messages(bundle: splitbundle.Bundle) -> None:
    tokenizer = bundle.tokenizer()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 2?"}], add_generation_prompt=True)
    answer = SUM.replace("4.", "4 🙂.")
    ids = tokenizer.encode(answer, control_tokens=True, add_special_tokens=False)
    stream = tokenizer.stream(prompt)
    assert "".join([*map(stream.piece, ids), stream.rest()]) == answer
    without = tokenizer.stream(tokenizer.encode("2 + 2?"))  # no chat: control tokens are left out, as ever
    assert "".join(map(without.piece, ids)) == tokenizer.decode(ids)


def test_a_character_that_a_mark_cuts(bundle: splitbundle.Bundle) -> None:
    tokenizer = bundle.tokenizer()
    begun = tokenizer.encode("🙂", add_special_tokens=False)[:1]
    (end,) = tokenizer.encode("<|end|>", control_tokens=True, add_special_tokens=False)
    stream = tokenizer.stream(tokenizer.encode("<|start|>assistant", control_tokens=True))
    pieces = [stream.piece(token) for token in (*begun, end, *tokenizer.encode("ok", add_special_tokens=False))]
    assert "".join([*pieces, stream.rest()]) == "\ufffd<|end|>ok"


def test_serve(bundle: splitbundle.Bundle) -> None:
    answers = {"weather": CALL}
    pipeline = bundle.pipeline(threads=1)
    scripted = Scripted(pipeline, lambda prompt: answers["weather"] if "weather" in prompt else SUM)
    with open_web_server(Models({"script": Model("script", bundle, lambda: scripted)})) as server:
        client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0)
        made = client.chat.completions.create(model="script", messages=[{"role": "user", "content": "2 + 2?"}])
        message: Any = made.choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, "2 + 2 = 4.")
        thought = text = ""
        for chunk in client.chat.completions.create(
            model="script", messages=[{"role": "user", "content": "2 + 2?"}], stream=True
        ):
            thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
            text += chunk.choices[0].delta.content or ""
        assert (thought, text) == (THOUGHT, "2 + 2 = 4.")
        made = client.chat.completions.create(
            model="script", messages=[{"role": "user", "content": "The weather?"}], tools=TOOLS
        )
        (choice,) = made.choices
        (call,) = choice.message.tool_calls or ()
        assert choice.finish_reason == "tool_calls"
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"location": "San Francisco"}


def test_chat(
    bundle: splitbundle.Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Scripted(bundle.pipeline(threads=1), lambda prompt: SUM)
    monkeypatch.setattr(text_options, "load_pipeline", lambda *_: pipeline)

    def talk(lines: str, *options: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
        assert main.main(["chat", str(bundle.path), *options]) == 0
        return capsys.readouterr().out

    saved = tmp_path / "chat.json"
    shown = f"[thinking]\n{THOUGHT}\n[answer]\n2 + 2 = 4.\n"
    assert talk(f"2 + 2?\nAnd again?\n/save {saved}\n") == shown * 2  # the first answer is in the second prompt
    answer = {"role": "assistant", "content": "2 + 2 = 4.", "thinking": THOUGHT}
    assert json.loads(saved.read_text())["messages"][1::2] == [answer] * 2
    assert talk("2 + 2?\n", "--thinking", "hide") == "2 + 2 = 4.\n"
    last = json.loads(talk("2 + 2?\n", "--json").splitlines()[-1])
    assert {name: last[name] for name in answer} == answer
