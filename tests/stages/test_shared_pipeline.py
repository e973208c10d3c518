"""A pipeline that many threads share: each text is that of the user alone."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError, SharedPipeline
from splitbundle.stages import shared_rows
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "license-gpt2"
PROMPTS = (
    "Licensed under the Apache License",
    "You may",
    "limitations",
    "Unless required by applicable law or agreed to",
)
TEXT = (ROOT / "LICENSE").read_text("utf-8")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example in three shards with graphs."""
    output = tmp_path_factory.mktemp("shared") / "b.splitbundle"
    return splitbundle_converter.convert(EXAMPLE, output, split=[2, 4], onnx=True)


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def pipeline(request: pytest.FixtureRequest, bundle: splitbundle.Bundle) -> Any:
    """The example in each backend."""
    return bundle.pipeline(backend=request.param)


@pytest.fixture
def shared(pipeline: Any) -> Iterator[SharedPipeline]:
    with SharedPipeline(pipeline, rows=4, piece=16) as made:
        yield made


def requests(number: int) -> list[dict[str, Any]]:
    """Requests of different lengths and ways to draw."""
    draw = random.Random(7)
    made: list[dict[str, Any]] = []
    for i in range(number):
        start = draw.randrange(len(TEXT) - 600)
        request: dict[str, Any] = {
            "prompt": TEXT[start : start + draw.choice((12, 60, 300))],
            "max_new_tokens": draw.choice((1, 7, 20, 40)),
        }
        if i % 3 == 1:
            request |= {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if i % 3 == 2:
            request |= {"stop": ["the", "License"], "repetition_penalty": 1.2, "presence_penalty": 0.1}
        if i % 4 == 3:
            request |= {"logprobs": 3}
        made.append(request)
    return made


def test_twelve_texts_over_four_rows_are_those_of_each_alone(pipeline: Any, shared: SharedPipeline) -> None:
    asked = requests(12)
    alone = [pipeline.complete_text(**request) for request in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda request: shared.complete_text(**request), asked))
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.ids, one.finish_reason, one.stopped_by) == (
            other.text,
            other.ids,
            other.finish_reason,
            other.stopped_by,
        )
        if one.logprobs is not None:
            assert other.logprobs == pytest.approx(one.logprobs, abs=2e-5)
            assert [[token for token, _ in top] for top in one.top] == [
                [token for token, _ in top] for top in other.top
            ]
    state = shared.state
    assert state["texts"] == 12
    assert state["active"] == state["waiting"] == 0
    assert state["call_rows"] > 1.5 * state["calls"]  # rows were computed together


def test_the_next_turn_of_a_chat_computes_what_is_new(pipeline: Any, shared: SharedPipeline) -> None:
    histories = list(PROMPTS)
    for turn in range(3):
        for i, history in enumerate(histories):
            found = shared.complete_text(history, max_new_tokens=6)
            assert found.text == pipeline.complete_text(history, max_new_tokens=6).text
            if turn:  # all but what was added, the last token, and where two tokens join to one
                assert found.reused >= len(found.prompt_ids) - 6
            histories[i] = history + found.text + " and"


def test_a_longer_text_makes_the_rows_grow(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_rows, "FIRST_SLOTS", 32)
    with SharedPipeline(pipeline, rows=4, piece=16) as shared, ThreadPoolExecutor(4) as pool:
        short = [pool.submit(shared.complete_text, prompt, max_new_tokens=60) for prompt in PROMPTS[:3]]
        long = pool.submit(shared.complete_text, TEXT[:600], max_new_tokens=5)
        assert long.result().text == pipeline.complete_text(TEXT[:600], max_new_tokens=5).text
        for prompt, found in zip(PROMPTS[:3], short, strict=True):
            assert found.result().text == pipeline.complete_text(prompt, max_new_tokens=60).text


def test_a_text_that_is_closed_frees_its_row(shared: SharedPipeline) -> None:
    running = [shared.stream_text(prompt, max_new_tokens=200, stop_ids=()) for prompt in PROMPTS]
    waiting = shared.stream_text("Licensed", max_new_tokens=2)
    for generation in running:
        next(generation)
    assert waiting.finish_reason is None
    running[1].close()
    assert running[1].finish_reason == "cancelled"
    assert waiting.completion().finish_reason in ("length", "stop")
    for generation in running:
        generation.close()
    for _ in range(1000):
        if not shared.state["active"]:
            break
        time.sleep(0.01)
    assert shared.state["active"] == 0


def test_a_text_that_waits_is_cancelled_by_another_thread(shared: SharedPipeline) -> None:
    running = [shared.stream_text(prompt, max_new_tokens=150, stop_ids=()) for prompt in PROMPTS]
    waiting = shared.stream_text("Licensed", max_new_tokens=2)
    reader = threading.Thread(target=waiting.completion)
    reader.start()
    waiting.cancel()
    reader.join(60)
    assert not reader.is_alive()
    assert waiting.finish_reason == "cancelled"
    assert [generation.finish_reason for generation in running] == [None] * 4
    for generation in running:
        generation.close()


def test_too_many_texts_are_refused(pipeline: Any) -> None:
    with SharedPipeline(pipeline, rows=1, waiting=1) as shared:
        first = shared.stream_text(PROMPTS[0], max_new_tokens=100, stop_ids=())
        next(first)
        second = shared.stream_text(PROMPTS[1], max_new_tokens=3)
        with pytest.raises(BundleError) as caught:
            shared.stream_text(PROMPTS[2], max_new_tokens=3)
        assert caught.value.codes == ("server.full",)
        first.close()
        assert second.completion().text


def test_one_client_does_not_keep_the_others_waiting(pipeline: Any) -> None:
    """With one row, the single text of the second client comes second, not after the four of the first one."""
    with SharedPipeline(pipeline, rows=1) as shared:
        blocker = shared.of("a").stream_text(PROMPTS[0], max_new_tokens=30, stop_ids=())
        order: list[tuple[float, str]] = []

        def ask(client: str, number: int) -> None:
            made = shared.of(client).stream_text(f"{PROMPTS[number % 4]} {number}", max_new_tokens=2)
            made.completion()
            order.append((made._steps.first, client))  # threads may come here in another order

        threads = []
        for number, client in enumerate("aaaab"):
            threads.append(threading.Thread(target=ask, args=(client, number)))
            threads[-1].start()
            while shared.state["waiting"] < number + 1:
                time.sleep(0.001)
        blocker.completion()
        for thread in threads:
            thread.join()
    assert "b" in [client for _, client in sorted(order)[:2]]


def test_a_failing_call_ends_its_texts_and_no_others(pipeline: Any, shared: SharedPipeline) -> None:
    real, failing = pipeline.forward, True

    def forward(*args: Any, **given: Any) -> Any:
        if failing:
            raise RuntimeError("a stage is lost")
        return real(*args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "forward", forward)
        with pytest.raises(RuntimeError, match="a stage is lost"):
            shared.complete_text(PROMPTS[0], max_new_tokens=3)
        failing = False
        found = shared.complete_text(PROMPTS[0], max_new_tokens=3)
    assert found.text == pipeline.complete_text(PROMPTS[0], max_new_tokens=3).text
    assert shared.state["active"] == 0


def test_its_end(pipeline: Any) -> None:
    shared = SharedPipeline(pipeline, rows=2)
    running = shared.stream_text(PROMPTS[0], max_new_tokens=200, stop_ids=())
    next(running)
    shared.close()
    for ask in (running.completion, lambda: shared.complete_text("You"), lambda: shared.run(len)):
        with pytest.raises(BundleError) as caught:
            ask()
        assert caught.value.codes == ("server.draining",)
    shared.close()
    threads = threading.active_count()
    text = SharedPipeline(pipeline, rows=2).of("x").stream_text(PROMPTS[0], max_new_tokens=3)  # nobody else holds it
    gc.collect()
    assert text.completion().ids
    del text
    gc.collect()
    for _ in range(1000):
        if threading.active_count() == threads:
            break
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_scores_are_those_of_the_pipeline(pipeline: Any, shared: SharedPipeline) -> None:
    ids = pipeline.token_ids([shared.tokenizer().encode(PROMPTS[0])])
    assert shared.log_probabilities(ids) == pipeline.log_probabilities(ids)


@pytest.mark.parametrize(
    ("given", "argument"),
    [({"rows": 0}, "rows"), ({"waiting": -1}, "waiting"), ({"capacity": 1}, "capacity"), ({"piece": "x"}, "piece")],
)
def test_wrong_arguments(pipeline: Any, given: dict[str, Any], argument: str) -> None:
    with pytest.raises(BundleError) as caught:
        SharedPipeline(pipeline, **given)
    assert caught.value.problems[0].argument == argument


def test_wrong_arguments_of_a_text(pipeline: Any, shared: SharedPipeline) -> None:
    for given, argument in (
        ({"session": pipeline.session()}, "session"),
        ({"logprobs": -1}, "logprobs"),
        ({"top_k": 0}, "top_k"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
    ):
        with pytest.raises(BundleError) as caught:
            shared.stream_text("You", **given)
        assert caught.value.problems[0].argument == argument
    with SharedPipeline(pipeline, rows=1, capacity=8) as small:
        with pytest.raises(BundleError) as caught:
            small.stream_text(PROMPTS[3])
        assert caught.value.codes == ("input.position",)
        assert small.complete_text("You may").finish_reason in ("context", "stop")


WAYS: dict[str, dict[str, Any]] = {
    "likeliest": {},
    "drawn": {"temperature": 0.9, "top_p": 0.95, "seed": 5},
    "with penalties": {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("way", WAYS)
def test_another_pipeline_goes_on_with_the_same_draws(shared: SharedPipeline, way: str) -> None:
    prompt = shared.tokenizer().encode(PROMPTS[0])
    whole = [step.ids[0] for step in shared.row_steps(prompt, max_new_tokens=24, **WAYS[way])]
    assert len(set(whole)) > 3
    for made in (1, 7, 23):
        rest = shared.row_steps([*prompt, *whole[:made]], max_new_tokens=24 - made, drawn=made, **WAYS[way])
        assert [step.ids[0] for step in rest] == whole[made:]


@pytest.mark.parametrize("drawn", [-1, 3, 4, 1.5])
def test_a_text_has_at_least_one_token_that_was_not_drawn(shared: SharedPipeline, drawn: Any) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] drawn: expected a number from 0"):
        shared.row_steps([1, 2, 3], drawn=drawn)


def test_clients_do_not_go_on_from_each_others_rows(pipeline: Any, shared: SharedPipeline) -> None:
    text = "Unless required by applicable law or agreed to in writing"
    first = shared.of("alice").complete_text(text, max_new_tokens=3)
    other = shared.of("bob").complete_text(text, max_new_tokens=3)
    again = shared.of("alice").complete_text(text, max_new_tokens=3)
    assert (first.reused, other.reused) == (0, 0)
    assert again.reused > 3
    assert first.text == other.text == again.text


def test_one_client_has_half_of_the_queue(pipeline: Any) -> None:
    with SharedPipeline(pipeline, rows=1, waiting=4) as shared:
        running = shared.of("a").stream_text(PROMPTS[0], max_new_tokens=150, stop_ids=())
        next(running)
        waiting = [shared.of("a").stream_text(PROMPTS[1], max_new_tokens=1) for _ in range(2)]
        with pytest.raises(BundleError):
            shared.of("a").stream_text(PROMPTS[1], max_new_tokens=1)
        other = shared.of("b").stream_text(PROMPTS[2], max_new_tokens=1)
        running.close()
        for text in (*waiting, other):
            assert text.completion().ids


def test_texts_that_nobody_reads_end(pipeline: Any, shared: SharedPipeline) -> None:
    for _ in range(6):
        shared.stream_text(PROMPTS[0], max_new_tokens=200, stop_ids=())
    gc.collect()
    for _ in range(1000):
        if not shared.state["active"] and not shared.state["waiting"]:
            break
        time.sleep(0.01)
    assert (shared.state["active"], shared.state["waiting"]) == (0, 0)


def test_a_call_from_within_is_refused(shared: SharedPipeline) -> None:
    for work in (lambda _: shared.run(len), lambda _: shared.complete_text("You", max_new_tokens=1)):
        with pytest.raises(BundleError, match="another thread"):
            shared.run(work)
