"""Guessing tokens from the text gives the same tokens in fewer calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.stages.prompt_lookup import guess
from tests.support.models import bundle as random_bundle
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = (ROOT / "LICENSE").read_text("utf-8")[:300]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example with graphs."""
    output = tmp_path_factory.mktemp("lookup") / "b.splitbundle"
    return splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=[3], onnx=True, check=False)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 8))
def test_a_guess_followed_the_same_ending_before(tokens: list[int], most: int) -> None:
    guessed = guess(tokens, most)
    assert len(guessed) <= most
    if guessed:
        places = range(2, len(tokens))
        assert any(tokens[at - 2 : at] == tokens[-2:] and tokens[at : at + len(guessed)] == guessed for at in places)
    else:
        assert all(tokens[at - 2 : at] != tokens[-2:] for at in range(2, len(tokens)))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.2, "top_p": 0.9, "seed": 3},
        {"repetition_penalty": 1.05, "frequency_penalty": 0.1},
        {"logprobs": 2},
        {"stop_ids": [199]},
    ],
    ids=str,
)
def test_the_tokens_are_the_same(
    bundle: splitbundle.Bundle, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = bundle.pipeline(backend=backend)
    calls: list[int] = []
    forward = type(pipeline).forward

    def counted(self: Any, token_ids: Any, **named: Any) -> Any:
        calls.append(token_ids.shape[1])
        return forward(self, token_ids, **named)

    monkeypatch.setattr(type(pipeline), "forward", counted)
    prompt = bundle.tokenizer().encode(TEXT + "\n\n" + TEXT[:40])
    ids = pipeline.token_ids([prompt])
    sessions = [pipeline.session(capacity=256), pipeline.session(capacity=256)]
    plain = list(pipeline.steps(ids, max_new_tokens=40, session=sessions[0], **options))
    ordinary = len(calls)
    calls.clear()
    guessed = list(pipeline.steps(ids, max_new_tokens=40, session=sessions[1], prompt_lookup=6, **options))
    assert [step.ids for step in guessed] == [step.ids for step in plain]
    assert sessions[0].tokens == sessions[1].tokens
    if "logprobs" in options:
        for one, other in zip(guessed, plain, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    if not options:
        assert len(calls) < 0.7 * ordinary
    assert max(calls[1:], default=1) <= 7


def test_what_depends_on_the_length_of_a_call_is_not_guessed() -> None:
    """Above a length, such rotary positions depend on the number of tokens of a call."""
    pipeline: Any = random_bundle("llama-dynamic").pipeline()
    ids = pipeline.token_ids([[5, 6, 7, 5, 6, 7, 5, 6]])
    plain = [step.ids for step in pipeline.steps(ids, max_new_tokens=30)]
    assert [step.ids for step in pipeline.steps(ids, max_new_tokens=30, prompt_lookup=8)] == plain


def test_only_one_row_is_guessed(bundle: splitbundle.Bundle) -> None:
    pipeline = bundle.pipeline(backend="torch")
    for ids, number in (([[1, 2], [3, 4]], 2), ([[1, 2]], -1), ([[1, 2]], 65)):
        with pytest.raises(BundleError, match=r"\[input.value\] prompt_lookup: expected"):
            pipeline.steps(pipeline.token_ids(ids), prompt_lookup=number)
