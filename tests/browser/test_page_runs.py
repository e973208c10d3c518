"""The page in a browser: it shows and verifies a bundle, and makes the text that the local pipeline makes."""

from __future__ import annotations

import json
import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitbundle
from splitbundle.cli.main import main as run_command
from tests.support import chromium
from tests.support.chromium import Chromium, Page
from tests.support.gateway_users import GatewayProcess, greedy, load, make_text
from tests.support.recording_proxy import RecordingProxy, found_in
from tests.support.stage_servers import StageProcess

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(chromium.PATH is None, reason="chromium isn't installed"),
]
PROMPT = "Licensed under the Apache License"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.fixture(scope="module")
def proxy(license_bundle: splitbundle.Bundle, onnxruntime_web: Path) -> Iterator[RecordingProxy]:
    """A proxy before a gateway whose trunk is a process."""
    with (
        StageProcess(license_bundle.path, "trunk", "--threads", "1") as stage,
        GatewayProcess(
            license_bundle.path, "--remote", f"trunk={stage.url}", "--onnxruntime-web", onnxruntime_web
        ) as gateway,
        RecordingProxy(gateway.url) as made,
    ):
        yield made


@pytest.fixture
def page(browser: Chromium, proxy: RecordingProxy) -> Iterator[Page]:
    with browser.page("about:blank") as made:
        made.call("Network.enable")
        made.go(proxy.url)
        made.wait("document.querySelectorAll('.shards tbody').length === 3")
        yield made
        assert made.problems == []
        outside = [url for url in made.requested if not url.startswith((proxy.url, "data:", "about:"))]
        assert outside == []


def test_it_shows_and_verifies_a_bundle(page: Page, license_bundle: splitbundle.Bundle, tmp_path: Path) -> None:
    shown = page.run("document.body.innerText")
    assert license_bundle.id in shown
    assert license_bundle.fingerprint in shown
    page.click("summary", "Tensors of top")
    page.wait("[...document.querySelectorAll('.file')].some((each) => each.textContent === 'head.norm.weight')")
    page.click("summary", "SHA-256")
    listed = license_bundle.manifest.files["head.safetensors"].sha256
    page.wait(f"document.body.innerText.includes({json.dumps(listed)})")
    page.click("summary", "Model card")
    page.wait("[...document.querySelectorAll('pre')].some((each) => each.textContent.includes('splitbundle'))")
    page.click("#verify")
    page.wait("document.querySelector('.verify .good, .verify .bad')")
    assert "Every file has the size and the digest" in page.text(".verify")
    page.screenshot(tmp_path / "bundle.png", whole=True)


def test_text_is_the_local_pipelines_and_none_of_it_leaves(
    page: Page, proxy: RecordingProxy, license_bundle: splitbundle.Bundle, tmp_path: Path
) -> None:
    tokenizer = license_bundle.tokenizer()
    prompt = tokenizer.encode(PROMPT)
    new = greedy(license_bundle.pipeline(threads=1), prompt, 48, license_bundle.manifest.text.stop_ids)
    load(page)
    before = proxy.sent
    text = make_text(page, PROMPT, 48)
    assert text == tokenizer.decode(new)
    assert "hidden states" in page.text("#sent")
    assert "Hidden states leave" in page.text("#sent-about")
    assert "onnxruntime-web" in page.text("#loaded")
    sent = proxy.sent
    assert sum(each.count(b"SBW1") for each in sent) > 48
    assert found_in(sent, f"{PROMPT}{text}", [*prompt, *new], before) == []
    assert found_in([*sent, PROMPT.encode()], PROMPT, prompt, before) == ["utf-8"]
    assert found_in([*sent, struct.pack(f"<{len(new)}q", *new)], PROMPT, new) == ["ids as <q"]
    page.screenshot(tmp_path / "text.png", whole=True)
    # The seed draws the same text again, and another one another text.
    for name, value in (("temperature", 1.5), ("seed", 7)):
        page.run(f"document.getElementById('{name}').value = {value}")
    drawn = [make_text(page, PROMPT, 24) for _ in range(2)]
    assert drawn[0] == drawn[1]
    page.run("document.getElementById('seed').value = 8")
    assert make_text(page, PROMPT, 24) != drawn[0]


def test_it_works_by_keyboard_on_a_phone_and_in_the_dark(
    browser: Chromium, proxy: RecordingProxy, tmp_path: Path
) -> None:
    with browser.page(proxy.url, width=360, height=740, dark=True) as page:
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.run("crossOriginIsolated")
        page.run("document.getElementById('open-panel').open = true")
        widest = (
            "Math.max(...[...document.querySelectorAll('#open-panel *')].map((e) => e.getBoundingClientRect().right))"
        )
        inside = "document.getElementById('open-panel').getBoundingClientRect().right"
        assert page.run(widest) <= page.run(inside)
        assert page.run("document.documentElement.scrollWidth") <= 360
        page.screenshot(tmp_path / "phone-bundle.png", whole=True)
        load(page)
        page.run("document.getElementById('temperature').value = 0")
        assert page.run("document.activeElement.id") == "prompt"
        page.type(PROMPT)
        page.press("Tab")
        assert page.run("document.activeElement.id") == "send"
        page.press("Enter")
        page.wait("document.querySelector('.answer')?.textContent.length > 5")
        page.press("Escape")
        page.wait("document.querySelector('.turn[data-ended]')")
        assert page.run("document.activeElement.id") == "prompt"
        assert page.run("document.documentElement.scrollWidth") <= 360
        unlabelled = page.run(
            "[...document.querySelectorAll('input, select, textarea')].filter((each) => !each.labels.length).length"
        )
        assert unlabelled == 0
        page.screenshot(tmp_path / "phone-text.png", whole=True)
        assert page.problems == []


def test_a_bundle_that_is_not_right_is_refused(
    browser: Chromium, license_bundle: splitbundle.Bundle, onnxruntime_web: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(license_bundle.path, tmp_path / "some.splitbundle"))
    data = bytearray((place / "layer-004.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "layer-004.safetensors").write_bytes(data)
    with (
        StageProcess(license_bundle.path, "trunk", "--threads", "1") as stage,
        GatewayProcess(place, "--remote", f"trunk={stage.url}", "--onnxruntime-web", onnxruntime_web) as gateway,
        browser.page(gateway.url) as page,
    ):
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        page.click("#verify")
        page.wait("document.querySelector('.verify .good, .verify .bad')")
        assert "file.digest" in page.text(".verify")
        page.click("#to-text")
        page.wait("!document.getElementById('load').disabled")
        page.click("#load")
        page.wait("document.querySelector('#load-state .problems')")
        assert "file.digest" in page.text("#load-state")
        assert page.run("document.getElementById('composer-panel').hidden")


def test_without_onnxruntime_web_the_page_computes_by_itself(
    browser: Chromium, license_bundle: splitbundle.Bundle, tmp_path: Path
) -> None:
    tokenizer = license_bundle.tokenizer()
    new = greedy(license_bundle.pipeline(threads=1), tokenizer.encode(PROMPT), 150, ())
    with (
        StageProcess(license_bundle.path, "trunk", "--threads", "1") as stage,
        GatewayProcess(license_bundle.path, "--remote", f"trunk={stage.url}", cwd=tmp_path) as gateway,
        browser.page(gateway.url) as page,
    ):
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        load(page)
        assert "own decoder" in page.text("#loaded")
        assert make_text(page, PROMPT, 150) == tokenizer.decode(new)
        assert page.problems == []


def test_the_ends_alone_make_text_and_the_page_says_why_it_ended(
    browser: Chromium, license_bundle: splitbundle.Bundle, tmp_path: Path
) -> None:
    ends = tmp_path / "ends.splitbundle"
    selected = ("--shard", "bottom", "--shard", "top", "--text", "-o", str(ends))
    assert run_command(["extract", str(license_bundle.path), *selected]) == 0
    tokenizer = license_bundle.tokenizer()
    with (
        StageProcess(license_bundle.path, "trunk", "--threads", "1") as stage,
        GatewayProcess(ends, "--remote", f"trunk={stage.url}", cwd=tmp_path) as gateway,
        browser.page(gateway.url) as page,
    ):
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        load(page)
        new = greedy(license_bundle.pipeline(threads=1), tokenizer.encode(PROMPT), 8, ())
        assert make_text(page, PROMPT, 8) == tokenizer.decode(new)
        assert page.text(".turn:last-child .ended") == "The text has the most new tokens of the settings."
        long = "Apache License " * 60
        size = len(tokenizer.encode(long))
        assert size < 256
        make_text(page, long, 256)
        assert page.text(".turn:last-child .ended") == "The text has filled the model’s context of 256 tokens."
        assert make_text(page, long * 5, 256) == ""
        assert page.text(".turn:last-child .ended").startswith(
            "Nothing was written: the model’s context has 256 tokens, and this text "
        )
        stage.process.send_signal(signal.SIGSTOP)
        page.run("document.getElementById('most').value = 4")
        page.run("document.getElementById('prompt').focus()")
        page.type(PROMPT)
        page.click("#send")
        page.wait("document.querySelector('.turn:last-child .numbers').textContent === 'Waiting for stage trunk …'")
        stage.process.send_signal(signal.SIGCONT)
        page.wait("document.querySelector('.turn:last-child[data-ended]')")
        assert "4 tokens written" in page.text(".turn:last-child .numbers")
        assert page.problems == []


def test_a_url_that_the_policy_blocks_is_told_with_the_option(
    browser: Chromium, license_bundle: splitbundle.Bundle, tmp_path: Path
) -> None:
    with (
        StageProcess(license_bundle.path, "trunk", "--threads", "1") as stage,
        GatewayProcess(license_bundle.path, "--remote", f"trunk={stage.url}", cwd=tmp_path) as gateway,
        browser.page(gateway.url) as page,
    ):
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        page.run("document.getElementById('open-panel').open = true")
        page.run("document.getElementById('url').value = 'https://files.example/some.splitbundle'")
        page.run("document.getElementById('url-form').requestSubmit()")
        page.wait("!document.getElementById('notice').hidden")
        assert "--bundles-from https://files.example." in page.text("#notice")


def test_a_key_is_asked_for(
    browser: Chromium, license_bundle: splitbundle.Bundle, onnxruntime_web: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("alice sk-alice-0123456789\n")
    with (
        StageProcess(license_bundle.path, "trunk", "--threads", "1") as stage,
        GatewayProcess(
            license_bundle.path,
            *("--remote", f"trunk={stage.url}", "--onnxruntime-web", onnxruntime_web),
            *("--api-key-file", tmp_path / "keys"),
        ) as gateway,
        browser.page(gateway.url) as page,
    ):
        page.wait("!document.getElementById('key-form').hidden")
        assert page.run("document.activeElement.id") == "key"
        page.type("sk-nobody-0123456789")
        page.press("Enter")
        page.wait("document.getElementById('key-message').textContent.includes('doesn’t accept')")
        page.type("sk-alice-0123456789")
        page.press("Enter")
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        load(page)
        assert make_text(page, PROMPT, 8)
        assert page.problems == []
