"""The filters and penalties give the probabilities of transformers' logits processors, in both backends."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import logits_process as theirs

from splitbundle import BundleError
from splitbundle.backends.onnxruntime import sampling as by_numpy
from splitbundle.backends.torch import sampling as by_torch
from splitbundle.stages.sampling import History, RowGenerators, Sampling

VOCABULARY = 200
PROMPT = [[3, 5, 5, 7, 11, 199], [0, 1, 2, 3, 4, 5]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 1},
    {"top_k": 17},
    {"top_k": 5000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"min_p": 0.5},
    {"typical_p": 0.2},
    {"typical_p": 0.95},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"logit_bias": {5: 4.0, 7: -100.0, 150: 0.5}},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.7, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 60, "typical_p": 0.6},
    {
        "temperature": 0.7,
        "top_k": 90,
        "top_p": 0.97,
        "min_p": 0.01,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "logit_bias": {9: 1.0},
    },
]


def expected(logits: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """What transformers' processors leave, in the order of its ``generate``."""
    processors: list[Any] = []
    if "logit_bias" in options:
        processors.append(theirs.SequenceBiasLogitsProcessor({(k,): v for k, v in options["logit_bias"].items()}))
    if "repetition_penalty" in options:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        processors.append(theirs.TemperatureLogitsWarper(options["temperature"]))
    for name, cls in (
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
        ("typical_p", theirs.TypicalLogitsWarper),
    ):
        if name in options:
            processors.append(cls(options[name]))
    scores = logits.double()
    for processor in processors:
        scores = processor(torch.tensor(PROMPT), scores)
    return torch.softmax(scores, dim=-1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_probabilities_are_those_of_transformers(options: dict[str, Any], seed: int) -> None:
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    wanted = expected(logits, options)
    sampling = Sampling.of(**({"temperature": 1.0} | options))
    found = by_torch.probabilities(logits, sampling, History(PROMPT))
    also = by_numpy.probabilities(logits.numpy(), sampling, History(PROMPT))
    assert torch.equal(found > 0, wanted > 0)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
    assert numpy.array_equal(also > 0, found.numpy() > 0)
    assert numpy.allclose(also, found.numpy(), rtol=0, atol=1e-6)


def test_the_order_is_that_of_generate() -> None:
    """The test above puts the processors together by hand, in the order in which ``generate`` does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=VOCABULARY))
    config = GenerationConfig(
        do_sample=True, sequence_bias=[[[5], 1.0]], repetition_penalty=1.2, temperature=0.7, top_k=9, top_p=0.9,
        min_p=0.1, typical_p=0.9, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model.generation_config = config
    made = model._get_logits_processor(config, input_ids_seq_length=6, device="cpu")
    assert [type(each).__name__ for each in made] == [
        "SequenceBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
    ]


def test_presence_and_frequency_penalties_count_the_new_tokens() -> None:
    """OpenAI's formula: the logit less the count times the one, and less the other where the count isn't 0."""
    logits = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(3))
    history = History(PROMPT)
    for tokens in ([9, 4], [9, 5], [8, -1]):
        history.add(tokens)
    sampling = Sampling.of(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    scores = logits.clone()
    scores[0, 9] -= 0.5 + 2 * 0.25
    scores[0, 8] -= 0.5 + 0.25
    scores[1, [4, 5]] -= 0.5 + 0.25
    wanted = torch.softmax(scores.double(), dim=-1)
    assert torch.allclose(by_torch.probabilities(logits, sampling, history), wanted, rtol=0, atol=1e-6)
    assert numpy.allclose(by_numpy.probabilities(logits.numpy(), sampling, history), wanted.numpy(), rtol=0, atol=1e-6)


def test_penalties_and_biases_hold_for_the_likeliest_token_too() -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5], logits[:, 50] = 2.0, 1.5
    greedy = Sampling.of(repetition_penalty=2.0)
    assert by_torch.draw(logits, greedy, random.Random(0), History(PROMPT)).tolist() == [50, 50]
    assert by_numpy.draw(logits.numpy(), greedy, random.Random(0), History(PROMPT)).tolist() == [50, 50]
    biased = Sampling.of(logit_bias={50: 1.0})
    assert by_torch.draw(logits, biased, random.Random(0)).tolist() == [50, 50]
    assert by_numpy.draw(logits.numpy(), biased, random.Random(0)).tolist() == [50, 50]


def test_a_filtered_token_is_never_drawn_and_both_backends_draw_the_same() -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2
    for options in OPTIONS:
        sampling = Sampling.of(**({"temperature": 1.0} | options))
        possible = by_torch.probabilities(logits, sampling, History(PROMPT[:1]))[0] > 0
        for seed in range(100):
            drawn = by_torch.draw(logits, sampling, random.Random(seed), History(PROMPT[:1]))
            assert (
                drawn.tolist()
                == by_numpy.draw(logits.numpy(), sampling, random.Random(seed), History(PROMPT[:1])).tolist()
            )
            assert possible[drawn[0]]


def test_each_row_has_draws_of_its_own() -> None:
    alone, both, plain = RowGenerators(7, 1), RowGenerators(7, 2), random.Random(7)
    one = [alone.random() for _ in range(5)]
    two = [both.random() for _ in range(10)]
    assert one == two[::2] == [plain.random() for _ in range(5)]
    assert not set(two[1::2]) & set(one)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("min_p", v) for v in (-0.1, 1.5, "x", True)),
        *(("typical_p", v) for v in (0, 1.1, float("nan"))),
        *(("repetition_penalty", v) for v in (0, -1, float("inf"))),
        *(("presence_penalty", v) for v in ("1", float("nan"))),
        *(("logit_bias", v) for v in ([1], {"a": 1}, {1: float("inf")}, {-1: 1.0}, {1: None})),
    ],
)
def test_wrong_options_are_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(BundleError, match=rf"\[input.value\] {option}: expected"):
        Sampling.of(**{option: value})
