"""A real model over HTTP: OpenAI's client, and the page in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import splitbundle_converter
from tests.support import chromium
from tests.support.chromium import Chromium, Page
from tests.support.door_users import DoorProcess

pytestmark = [pytest.mark.real, pytest.mark.long]
QUESTION = "What is the capital of France?"
IDLE = "document.getElementById('stop').hidden"


@pytest.fixture(scope="module")
def door(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    place = tmp_path_factory.mktemp("smollm2") / "smollm2.splitbundle"
    splitbundle_converter.convert(smollm2, place, split=[10, 20])
    with DoorProcess(place, "--rows", "4") as made:
        yield made


def test_openai_client(door: DoorProcess) -> None:
    client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0)
    messages = [{"role": "user", "content": QUESTION}]
    made = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=40)  # type: ignore[arg-type]
    assert "Paris" in (made.choices[0].message.content or "")
    assert made.choices[0].finish_reason == "stop"
    messages += [{"role": "assistant", "content": made.choices[0].message.content or ""}]
    messages += [{"role": "user", "content": "And of Italy?"}]
    again = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=40)  # type: ignore[arg-type]
    assert "Rome" in (again.choices[0].message.content or "")
    details = again.usage.prompt_tokens_details if again.usage else None
    assert details is not None
    assert (details.cached_tokens or 0) > 30


def asked(page: Page, question: str) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(question)
    page.press("Enter")


@pytest.mark.skipif(chromium.PATH is None, reason="chromium isn't installed")
def test_the_page(door: DoorProcess, tmp_path: Path) -> None:
    with Chromium() as browser, browser.page(door.url) as page:
        page.wait("document.getElementById('model').disabled === false")
        asked(page, QUESTION)
        page.wait(f"document.querySelectorAll('.turn').length === 1 && {IDLE}")
        assert "Paris" in page.text(".answer")
        page.screenshot(tmp_path / "answer.png")
        asked(page, "Write a long story about a lighthouse keeper and the sea.")
        page.wait("[...document.querySelectorAll('.answer')].at(-1).innerText.length > 40")
        page.click("#stop")
        page.wait(IDLE)
        said = page.run("[...document.querySelectorAll('.answer')].at(-1).innerText")
        page.wait("fetch('api/status').then(a => a.json()).then(s => s.models.smollm2.active === 0)")
        assert page.run("[...document.querySelectorAll('.answer')].at(-1).innerText") == said
        page.screenshot(tmp_path / "stopped.png")
        page.run("location.hash = '#bundle'")
        page.click("nav a, nav button", "Bundle")
        page.wait("document.querySelectorAll('.shards tbody tr').length >= 3")
        text = page.run("document.body.innerText")
        assert all(name in text for name in ("bottom", "trunk", "top", "30"))
        page.screenshot(tmp_path / "bundle.png", whole=True)
        page.resize(360, 740)
        assert page.run("document.documentElement.scrollWidth <= 360")
        page.screenshot(tmp_path / "phone.png")
        assert page.problems == []
    print(json.dumps([str(path) for path in sorted(tmp_path.iterdir())]))
