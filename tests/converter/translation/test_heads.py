"""Base models without a head, and heads for other tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.checkpoints import MISSING, WEIGHTS, accepted, change_config, change_tensors, refused, without
from tests.support.models import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def save_as(auto: str, name: str, path: Path) -> Path:
    """Save the base of a named model in a class of ``auto``. A head of that class is new."""
    config = make_model(name, pad_token_id=0, num_labels=3).config
    getattr(transformers, auto).from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "head", "saved"),
    [
        ("llama", "'lm_head.weight'", "LlamaModel"),
        ("gpt_neox", "'embed_out.weight'", "GPTNeoXModel"),
        ("phi", "'lm_head.weight', 'lm_head.bias'", "PhiModel"),
        ("gptj-tied", "'lm_head.bias'", "GPTJModel"),
        ("gpt2-unscaled-untied", "'lm_head.weight'", "GPT2Model"),
    ],
)
def test_a_base_model_saved_without_its_head(output: Path, name: str, head: str, saved: str) -> None:
    path = save_as("AutoModel", name, output.parent.parent / "source")
    assert str(refused(path, output)) == (
        f"[source.tensor] source: expected the head of a causal language model: {head}, "
        f"got none, a base model that was saved without its head, {saved}. Only causal language models can be "
        "converted: save it with AutoModelForCausalLM, from a checkpoint that has the head"
    )


def test_a_prefix_of_a_wrapper_that_is_not_known(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_tensors(path, lambda tensors: {f"lm.{name}": value for name, value in tensors.items()})
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /lm.lm_head.weight: expected the names that the model's tensors have, got names "
        "with a prefix, as in 'lm.lm_head.weight'. Save the state dict of the model inside the wrapper, with the names "
        "that transformers gives"
    )


def test_a_tied_base_model_needs_no_head(output: Path) -> None:
    path = save_as("AutoModel", "gpt2", output.parent.parent / "source")
    accepted(path, output, split=(2,))


@pytest.mark.parametrize(
    ("auto", "name", "tensor", "saved"),
    [
        ("AutoModelForSequenceClassification", "llama", "score.weight", "LlamaForSequenceClassification"),
        ("AutoModelForSequenceClassification", "gpt2", "score.weight", "GPT2ForSequenceClassification"),
        ("AutoModelForTokenClassification", "gpt_neox", "classifier.weight", "GPTNeoXForTokenClassification"),
        # Here transformers puts another prefix before the base model.
        ("AutoModelForQuestionAnswering", "qwen2", "qa_outputs.weight", "Qwen2ForQuestionAnswering"),
    ],
)
def test_a_head_for_another_task(output: Path, auto: str, name: str, tensor: str, saved: str) -> None:
    """This holds for a family with a tied head too, which stores no tensor."""
    path = save_as(auto, name, output.parent.parent / "source")
    expected = (
        f"[source.tensor] {WEIGHTS} /{tensor}: expected the head of a causal language model, got a head for another "
        f"task, {saved}. Only causal language models can be converted: convert the one that this was trained from"
    )
    assert str(refused(path, output)) == expected
    for architectures in (None, [], ["A", "B"], [1], "A", ...):
        change_config(path, architectures=architectures)
        assert str(refused(path, output)) == expected.replace(f", {saved}", "")


def test_a_head_that_is_there_and_incomplete(source: Callable[[str], Path], output: Path) -> None:
    """The error names each tensor, as the head is not of another task."""
    path = source("phi")
    change_tensors(path, without("lm_head.bias"))
    missing = f"[source.tensor] source: expected a tensor 'lm_head.bias' of shape [61], got none. {MISSING}"
    assert str(refused(path, output)) == missing
    change_tensors(path, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 48)}))
    assert [problem.pointer for problem in refused(path, output).problems] == [None, "/score.weight"]
    change_tensors(path, without("lm_head.weight", "score.weight"))
    assert [problem.expected for problem in refused(path, output).problems] == [
        "a tensor 'lm_head.weight' of shape [61, 48]",
        "a tensor 'lm_head.bias' of shape [61]",
    ]
