"""Texts and chats through a pipeline: pieces, stop strings, reasons of the end, reuse, cancellation, threads."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.backends.torch.pipeline import Pipeline
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "license-gpt2"
PROMPT = "Licensed under the Apache License"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example in three shards with graphs."""
    output = tmp_path_factory.mktemp("text") / "b.splitbundle"
    return splitbundle_converter.convert(EXAMPLE, output, split=[2, 4], onnx=True)


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def pipeline(request: pytest.FixtureRequest, bundle: splitbundle.Bundle) -> Any:
    """The example in each backend."""
    return bundle.pipeline(backend=request.param)


def test_the_text_is_that_of_transformers(pipeline: Any) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EXAMPLE), AutoTokenizer.from_pretrained(EXAMPLE)
    for prompt in (PROMPT, "You may obtain", "limitations under"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for stop in (None, ["License"], ["use thi", "with"]):
            made = model.generate(ids, max_new_tokens=40, do_sample=False, stop_strings=stop, tokenizer=tokenizer)
            theirs = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            ends = [theirs.index(each) for each in stop or () if each in theirs]
            found = pipeline.complete_text(prompt, max_new_tokens=40, stop=stop or ())
            assert found.text == (theirs[: min(ends)] if ends else theirs)
            assert found.finish_reason == ("stop" if ends or len(found.ids) < 40 else "length")
            assert found.prompt_ids == tuple(ids[0].tolist())


def test_pieces_make_the_text_and_hold_no_part_of_a_stop_string(pipeline: Any) -> None:
    generation = pipeline.stream_text(PROMPT, max_new_tokens=60, stop='"License')
    pieces = list(generation)
    assert "".join(pieces) == generation.text == ", Version 2.0 (the "
    assert all(pieces)
    assert (generation.finish_reason, generation.stopped_by) == ("stop", '"License')
    assert generation.tokens_per_second > 0


def test_the_reasons_of_the_end(pipeline: Any) -> None:
    assert pipeline.complete_text(PROMPT, max_new_tokens=3).finish_reason == "length"
    assert pipeline.complete_text(PROMPT, max_new_tokens=0).text == ""
    comma = pipeline.complete_text(PROMPT, max_new_tokens=9, stop_ids=[221])
    assert (comma.text, comma.finish_reason, comma.stopped_by, comma.ids) == (",", "stop", 221, (12,))
    full = pipeline.complete_text([44] * 250, stop_ids=[])
    assert (full.finish_reason, len(full.ids)) == ("context", 7)  # the last token needs no position
    end = pipeline.complete_text("limitations under the License.", max_new_tokens=60)
    assert (end.finish_reason, end.stopped_by) == ("stop", 0)
    with pytest.raises(
        BundleError, match=r"\[input.position\] prompt: expected at most 256 tokens, the model's context"
    ):
        pipeline.complete_text([44] * 257)


def test_what_a_session_holds_is_not_computed_again(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    forward = type(pipeline).forward

    def counted(self: Any, token_ids: Any, **named: Any) -> Any:
        computed.append(token_ids.shape[1])
        return forward(self, token_ids, **named)

    monkeypatch.setattr(type(pipeline), "forward", counted)
    session = pipeline.session(capacity=8, grows=True)
    first = pipeline.complete_text(PROMPT, max_new_tokens=12, session=session)
    assert computed == [7, *[1] * 11]
    computed.clear()
    again = PROMPT + first.text + " and so on"
    second = pipeline.complete_text(again, max_new_tokens=4, session=session)
    assert second.reused >= 7
    assert computed == [len(second.prompt_ids) - second.reused, 1, 1, 1]
    assert second.text == pipeline.complete_text(again, max_new_tokens=4).text
    # Another question, and the same one again: its last token is needed for its logits.
    other = pipeline.complete_text("You may", max_new_tokens=4, session=session)
    assert (other.reused, other.text) == (0, pipeline.complete_text("You may", max_new_tokens=4).text)
    same = pipeline.complete_text("You may", max_new_tokens=4, session=session)
    assert (same.reused, same.text) == (len(same.prompt_ids) - 1, other.text)
    assert session.tokens == [[*same.prompt_ids, *same.ids[:-1]]]


def test_a_session_that_grows_computes_the_same(pipeline: Any) -> None:
    ids = pipeline.token_ids([[44, 308, 68, 455, 270, 618, 325]])
    large, small = pipeline.session(capacity=100), pipeline.session(capacity=2, grows=True)
    for _ in range(6):
        one, two = pipeline(ids, session=large), pipeline(ids, session=small)
        assert (one == two).all()
    assert small.capacity >= 42
    assert small.tokens == large.tokens
    copied = copy.copy(small)
    small.rollback(40)
    assert (len(small.tokens[0]), len(copied.tokens[0])) == (2, 42)
    fixed = pipeline.session(capacity=2)
    with pytest.raises(BundleError, match=r"\[session.capacity\]"):
        pipeline(ids, session=fixed)
    with pytest.raises(BundleError, match=r"\[session.capacity\]|\[input.position\]"):
        pipeline(pipeline.token_ids([[1] * 257]), session=pipeline.session(capacity=2, grows=True))


def test_closing_frees_the_session(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    real = type(pipeline).session

    def recorded(self: Any, *given: Any, **named: Any) -> Any:
        session = real(self, *given, **named)
        made.append(weakref.ref(session))
        return session

    monkeypatch.setattr(type(pipeline), "session", recorded)
    closed = pipeline.stream_text(PROMPT, max_new_tokens=50)
    assert next(closed) == ","
    closed.close()
    ended = pipeline.stream_text(PROMPT, max_new_tokens=2)
    list(ended)
    with pipeline.stream_text(PROMPT, max_new_tokens=50) as left:
        next(left)
    cancelled = pipeline.stream_text(PROMPT, max_new_tokens=50)
    next(cancelled)
    cancelled.cancel()
    assert list(cancelled) == []
    tokens = pipeline.generate(pipeline.token_ids([[44, 308]]), max_new_tokens=9)
    next(tokens)
    tokens.close()
    gc.collect()
    assert [session() for session in made] == [None] * 5
    assert [each.finish_reason for each in (closed, ended, left, cancelled)] == [
        "cancelled",
        "length",
        "cancelled",
        "cancelled",
    ]


def test_another_thread_closes_while_a_token_is_made(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that is being made is the last one, wherever in it the other thread closes."""
    for step in ("piece", "_draw"):
        generation = pipeline.stream_text(PROMPT, max_new_tokens=50)
        owner = generation._stream if step == "piece" else pipeline
        real = getattr(owner, step)

        def closing(*args: Any, generation: Any = generation, real: Any = real) -> Any:
            with ThreadPoolExecutor(1) as other:
                other.submit(generation.close).result()
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, closing)
            pieces = list(generation)
        assert pieces == ([","] if step == "piece" else [])
        assert generation.text == "".join(pieces)
        assert generation.finish_reason == "cancelled"
        assert generation.completion().finish_reason == "cancelled"

    generation = pipeline.stream_text(PROMPT, max_new_tokens=50)
    real = generation._stream.piece
    with monkeypatch.context() as patch:
        patch.setattr(generation._stream, "piece", lambda token: (generation.cancel(), real(token))[1])
        assert next(generation) == ","
    assert generation.finish_reason == "cancelled"  # also if the caller doesn't ask for a further piece


def test_messages_for_a_log_hold_no_text(pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "splitbundle"):
        pipeline.complete_text(PROMPT, max_new_tokens=3)
    assert "a text ended (length): 7 tokens of prompt, 0 of them reused, 3 new" in caplog.messages
    assert not any("Licensed" in message or "Version" in message for message in caplog.messages)


def test_log_probabilities(pipeline: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE)
    made = pipeline.complete_text(PROMPT, max_new_tokens=5, logprobs=3, temperature=0.7, top_k=5, seed=1)
    with torch.no_grad():
        logits = model(torch.tensor([[*made.prompt_ids, *made.ids]])).logits[0, len(made.prompt_ids) - 1 : -1]
    wanted = torch.log_softmax(logits, dim=-1)
    for place, (token, logprob, top) in enumerate(zip(made.ids, made.logprobs, made.top, strict=True)):
        assert logprob == pytest.approx(float(wanted[place, token]), abs=1e-4)
        values, ids = wanted[place].topk(3)
        assert [each for each, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
    ids = torch.tensor([[*made.prompt_ids, *made.ids]])
    (scores,) = pipeline.log_probabilities(pipeline.token_ids(ids.tolist()))
    with torch.no_grad():
        every = torch.log_softmax(model(ids).logits[0, :-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    assert scores == pytest.approx(every.tolist(), abs=1e-4)
    (last,) = pipeline.log_probabilities(pipeline.token_ids(ids.tolist()), last=2)
    assert last == pytest.approx(scores[-2:], abs=1e-6)


def test_a_seed_draws_the_same_in_both_backends(bundle: splitbundle.Bundle) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.1}
    texts = [
        [bundle.pipeline(backend=backend).complete_text(PROMPT, seed=seed, **options).text for seed in range(4)]
        for backend in ("torch", "onnxruntime")
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_threads_share_a_pipeline(pipeline: Any) -> None:
    """Each thread has a session of its own."""
    prompts = [PROMPT, "You may obtain", "limitations under", "the License", "WITHOUT", "a copy of", "software", "dist"]
    one_by_one = [pipeline.complete_text(prompt, max_new_tokens=25).text for prompt in prompts]
    with ThreadPoolExecutor(max_workers=8) as pool:
        at_once = list(pool.map(lambda prompt: pipeline.complete_text(prompt, max_new_tokens=25).text, prompts))
    assert at_once == one_by_one


def test_wrong_arguments_are_refused(pipeline: Any, bundle: splitbundle.Bundle) -> None:
    for options, said in (
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": {640: 1.0}}, "logit_bias"),
        ({"session": pipeline.session(2)}, "session"),
        ({"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(BundleError, match=rf"\[input.value\] {said}: expected"):
            pipeline.complete_text(PROMPT, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        pipeline.complete_text(PROMPT, temprature=1.0)
    with pytest.raises(BundleError, match=r"\[input.value\] prompt: expected at least one token"):
        pipeline.complete_text([])
    alone = Pipeline([bundle.stage(name, backend="torch") for name in ("bottom", "trunk", "top")])
    with pytest.raises(BundleError, match=r"\[text.none\] tokenizer: expected a pipeline of a bundle"):
        alone.complete_text(PROMPT)
    assert alone.complete_text(PROMPT, max_new_tokens=2, tokenizer=bundle.tokenizer()).text == ", "


def test_a_pipeline_with_its_tokenizer_can_be_copied(bundle: splitbundle.Bundle) -> None:
    pipeline = bundle.pipeline(backend="torch")
    text = pipeline.complete_text(PROMPT, max_new_tokens=5).text
    assert copy.deepcopy(pipeline).complete_text(PROMPT, max_new_tokens=5).text == text


def test_the_defaults_of_the_makers(tmp_path: Path) -> None:
    """What generation_config.json says holds for what a caller doesn't give."""
    import json
    import shutil

    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    config = json.loads((source / "generation_config.json").read_text())
    told = {"do_sample": True, "temperature": 3.0, "top_k": 30, "top_p": 0.98, "repetition_penalty": 1.05}
    (source / "generation_config.json").write_text(json.dumps(config | told))
    pipeline = splitbundle_converter.convert(source, tmp_path / "b", check=False).pipeline()
    named = {name: value for name, value in told.items() if name != "do_sample"}

    def text(**options: Any) -> str:
        return str(pipeline.complete_text(PROMPT, max_new_tokens=30, **options).text)

    assert text(seed=1) == text(seed=1, defaults=False, **named) != text(defaults=False)
    greedy = text(temperature=0)
    assert greedy == text(defaults=False, repetition_penalty=1.05)
    assert text(seed=1, top_k=1) == text(seed=1, defaults=False, **{**named, "top_k": 1})


def test_prompts_that_are_none(pipeline: Any) -> None:
    for wrong in (None, 3, b"hi", [-1], [10**9]):
        with pytest.raises(BundleError, match=r"\[input.value\] prompt: expected"):
            pipeline.stream_text(wrong)
    for named in ({"tools": []}, {"chat_template": "default"}, {"template_variables": {}}):
        with pytest.raises(BundleError, match="expected None for a prompt that isn't a list of messages"):
            pipeline.stream_text(PROMPT, **named)
    assert pipeline.complete_text(PROMPT, max_new_tokens=2, stop=None).text == ", "


def test_a_filter_without_a_temperature_draws(pipeline: Any) -> None:
    named: dict[str, Any] = {"max_new_tokens": 8, "seed": 3, "logit_bias": {12: 9.0}}
    ids = pipeline.token_ids([pipeline.tokenizer().encode(PROMPT)])
    for name, value in (("top_k", 300), ("top_p", 0.99), ("min_p", 1e-9), ("typical_p", 0.99)):
        drawn = [each.tolist() for each in pipeline.generate(ids, temperature=1.0, **named, **{name: value})]
        assert [each.tolist() for each in pipeline.generate(ids, **named, **{name: value})] == drawn
        one = pipeline.complete_text(PROMPT, **named, **{name: value})
        assert one == pipeline.complete_text(PROMPT, temperature=1.0, **named, **{name: value})
