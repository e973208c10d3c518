"""Several texts at once are the texts one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError, SharedPipeline
from splitbundle.records import replace
from splitbundle.stages.text_generation import Completion
from tests.support.paths import ROOT

PROMPTS = ["Licensed under the Apache License", "You may obtain", "limitations under", "a copy", "Unless required"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example in three shards with graphs."""
    output = tmp_path_factory.mktemp("batch") / "b.splitbundle"
    return splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=[2, 4], onnx=True)


@pytest.fixture(scope="module", params=["torch", "onnxruntime", "shared"])
def pipeline(request: pytest.FixtureRequest, bundle: splitbundle.Bundle) -> Any:
    """The example in each backend, and shared by many users."""
    if request.param != "shared":
        yield bundle.pipeline(backend=request.param)
        return
    with SharedPipeline(bundle.pipeline(), rows=2) as shared:
        yield shared


def computed(made: Sequence[Completion]) -> list[Completion]:
    """Return completions without what a shared pipeline had computed before."""
    return [replace(each, reused=0) for each in made]


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 30, "stop": ["License", "use thi"]},
        {"max_new_tokens": 12, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {44: 2.0}},
        {"max_new_tokens": 30, "stop_ids": [0, 11, 44]},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1},
    ],
)
def test_greedy_texts_are_those_of_one_after_another(pipeline: Any, options: dict[str, Any]) -> None:
    found = pipeline.complete_texts(PROMPTS, **options)
    assert computed(found) == computed([pipeline.complete_text(prompt, **options) for prompt in PROMPTS])


def test_log_probabilities(pipeline: Any) -> None:
    found = pipeline.complete_texts(PROMPTS[:3], max_new_tokens=5, logprobs=2)
    for made, prompt in zip(found, PROMPTS[:3], strict=True):
        alone = pipeline.complete_text(prompt, max_new_tokens=5, logprobs=2)
        assert made.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert [[token for token, _ in top] for top in made.top] == [[token for token, _ in top] for top in alone.top]


def test_rows_end_where_the_models_context_ends(pipeline: Any) -> None:
    long = [[44] * 254, [44] * 256, [44, 308, 68]]
    found = pipeline.complete_texts(long, stop_ids=[])
    assert computed(found) == computed([pipeline.complete_text(prompt, stop_ids=[]) for prompt in long])
    assert [(len(made.ids), made.finish_reason) for made in found] == [(3, "context"), (1, "context"), (254, "context")]


def test_draws(pipeline: Any) -> None:
    drawn = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3}
    one, other = (computed(pipeline.complete_texts(PROMPTS[:1] * 3, **drawn)) for _ in range(2))
    assert one == other
    assert one[:1] == computed([pipeline.complete_text(PROMPTS[0], **drawn)])


def test_chats_ids_and_texts(pipeline: Any) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    expected = computed(pipeline.complete_texts(PROMPTS[:2], max_new_tokens=6))
    assert computed(pipeline.complete_texts(chats, max_new_tokens=6, chat_template=template)) == expected
    ids = [pipeline.tokenizer().encode(prompt) for prompt in PROMPTS[:2]]
    assert computed(pipeline.complete_texts(ids, max_new_tokens=6)) == expected
    assert pipeline.complete_texts([]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "argument"),
    [
        ("one", {}, "prompts"),
        (3, {}, "prompts"),
        (["a"], {"session": object()}, "session"),
        (["a"], {"prompt_lookup": 3}, "prompt_lookup"),
        (["a", ""], {}, "prompt"),
        (["a"], {"max_new_tokens": -1}, "max_new_tokens"),
        (["a"], {"temperature": -1}, "temperature"),
        (["a"], {"tools": []}, "tools"),
        (["a"], {"stop_ids": [640]}, "stop_ids"),
    ],
)
def test_wrong_values_are_named(pipeline: Any, prompts: Any, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(BundleError) as caught:
        pipeline.complete_texts(prompts, **options)
    assert caught.value.problems[0].argument == argument


def test_an_unknown_argument(pipeline: Any) -> None:
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'beams'"):
        pipeline.complete_texts(["a"], beams=3)
