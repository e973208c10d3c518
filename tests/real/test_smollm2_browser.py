"""A real model whose ends run in a browser, and whose middle runs on a server that never sees text or ids."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from tests.support import chromium
from tests.support.chromium import Chromium
from tests.support.gateway_users import GatewayProcess, greedy, load, make_text
from tests.support.onnxruntime_web import find_onnxruntime_web
from tests.support.recording_proxy import RecordingProxy, found_in
from tests.support.stage_servers import StageProcess

pytestmark = [
    pytest.mark.real,
    pytest.mark.long,
    pytest.mark.skipif(chromium.PATH is None, reason="chromium isn't installed"),
]
QUESTIONS = ("What is the capital of France?", "Tell me about lighthouses — in two sentences, please 🙂.")


@pytest.fixture(scope="module")
def bundle(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    place = tmp_path_factory.mktemp("smollm2") / "smollm2.splitbundle"
    return splitbundle_converter.convert(smollm2, place, split=[2, 28], onnx=True)


@pytest.mark.usefixtures("one_thread")
def test_the_text_is_the_local_pipelines_and_none_of_it_leaves(bundle: splitbundle.Bundle, tmp_path: Path) -> None:
    tokenizer = bundle.tokenizer()
    local = bundle.pipeline(dtype="float32")
    messages: list[dict[str, str]] = []
    secrets: list[tuple[str, list[int]]] = []
    with (
        StageProcess(bundle.path, "trunk", "--dtype", "float32") as stage,
        GatewayProcess(
            bundle.path, "--remote", f"trunk={stage.url}", "--onnxruntime-web", find_onnxruntime_web()
        ) as gateway,
        RecordingProxy(gateway.url) as proxy,
        Chromium() as browser,
        browser.page("about:blank") as page,
    ):
        page.call("Network.enable")
        page.go(proxy.url)
        page.wait("document.querySelectorAll('.shards tbody').length === 3")
        began = time.monotonic()
        load(page)
        print(f"loaded in {time.monotonic() - began:.1f} s: {page.text('#loaded')}")
        before = proxy.sent
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            new = greedy(local, prompt, 64, bundle.manifest.text.stop_ids)
            answer = make_text(page, question, 64)
            print(f"{answer!r}: {page.text('.numbers')}")
            assert answer == tokenizer.decode(new)
            messages.append({"role": "assistant", "content": answer})
            secrets += [(question, tokenizer.encode(question)), (answer, new), (question, prompt)]
        page.screenshot(tmp_path / "smollm2.png", whole=True)
        memory = page.run("performance.memory?.usedJSHeapSize")
        print(page.text("#sent"), f"heap {memory / 1e6:.0f} MB")
        assert "Paris" in messages[1]["content"]
        sent = proxy.sent
        assert sum(each.count(b"SBW1") for each in sent) > 20
        for text, ids in secrets:
            assert found_in(sent, text, ids, before) == []
        assert found_in([*sent, QUESTIONS[0].encode()], QUESTIONS[0], secrets[0][1], before) == ["utf-8"]
        outside = [url for url in page.requested if not url.startswith((proxy.url, "data:", "about:"))]
        assert outside == []
        assert page.problems == []
