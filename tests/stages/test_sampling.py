"""Sampling: seeds, and the probabilities of the tokens that are drawn."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from splitbundle.backends.torch.sampling import draw
from splitbundle.stages.sampling import Sampling
from tests.support.models import token_rows
from tests.support.pipelines import generated

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_seed_makes_the_same_text() -> None:
    rows = token_rows(6, 2)
    arguments = {"max_new_tokens": 16, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    once = generated("llama", rows, seed=5, **arguments)
    assert generated("llama", rows, seed=5, **arguments) == once
    assert generated("llama", rows, seed=6, **arguments) != once
    assert generated("llama", rows, seed=5, max_new_tokens=16) != once


def test_the_likeliest_of_one_is_the_greedy_one() -> None:
    rows = token_rows(6, 2)
    greedy = generated("llama", rows, max_new_tokens=12)
    assert generated("llama", rows, max_new_tokens=12, temperature=2.0, top_k=1, seed=0) == greedy
    assert generated("llama", rows, max_new_tokens=12, temperature=2.0, top_p=1e-9, seed=0) == greedy


def exact(logits: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities, computed in another way: each token is compared with the last one that is kept.

    *Shape:* (vocab) -> (vocab), float64.
    """
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=0)
    values = sorted(probabilities.tolist(), reverse=True)[: sampling.top_k]
    if sampling.top_p is not None:
        kept, reached = 0, 0.0
        while reached < sampling.top_p * sum(values):
            reached += values[kept]
            kept += 1
        values = values[:kept]
    probabilities[probabilities < values[-1]] = 0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=2.0, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling) -> None:
    """Test Pearson's chi-squared over 40,000 draws with a fixed seed. Tokens without probability are never drawn."""
    logits = torch.tensor([1.5, -0.3, 2.2, 0.0, 1.1, -2.0, 0.9, 2.0])
    number = 40_000
    expected = exact(logits, sampling) * number
    drawn = draw(logits.expand(number, -1), sampling, random.Random(1))
    counts = torch.bincount(drawn, minlength=len(logits)).double()
    possible = expected > 0
    assert not counts[~possible].any()
    assert int(possible.sum()) > 1
    squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    # The mean and four standard deviations: a correct sampler passes with 999 of 1,000 seeds.
    assert squared < freedom + 4 * math.sqrt(2 * freedom)
    # A temperature that is a tenth off wouldn't pass, so the test can fail.
    other = exact(logits, Sampling(temperature=sampling.temperature * 1.1, top_k=sampling.top_k)) * number
    assert ((counts - other)[possible] ** 2 / other[possible]).sum().item() > freedom + 4 * math.sqrt(2 * freedom)


def test_a_draw_takes_one_number_a_row() -> None:
    """Every row has its own numbers, in order, so a row's text doesn't depend on how they were fetched."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(5, -1)
    generator, twin = random.Random(3), random.Random(3)
    drawn = draw(logits, Sampling(temperature=1.0), generator)
    assert drawn.tolist() == [int(draw(logits[:1], Sampling(temperature=1.0), twin)) for _ in range(5)]
    assert generator.random() == twin.random()


def test_the_inverse_of_the_distribution_is_one_function() -> None:
    """The first token whose cumulated probability exceeds u, also where u meets it: another backend draws the
    same."""

    class ArrayInfo(random.Random):
        """Give one number."""

        def __init__(self, number: float) -> None:
            super().__init__()
            self.number = number

        def random(self) -> float:
            return self.number

    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    for uniform, expected in ((0.0, 1), (0.49, 1), (0.51, 0), (0.74, 0), (0.76, 2), (0.874, 2), (0.876, 3), (0.999, 3)):
        assert draw(logits, Sampling(temperature=1.0), ArrayInfo(uniform)).tolist() == [expected]
    even = torch.zeros(1, 4)
    for uniform, expected in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)):
        assert draw(even, Sampling(temperature=1.0), ArrayInfo(uniform)).tolist() == [expected]


def test_equal_logits_are_taken_by_rising_id() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0]])
    assert draw(logits, Sampling(), random.Random(0)).tolist() == [1]
    assert draw(logits, Sampling(temperature=1.0, top_k=1), random.Random(0)).tolist() == [1]
    seen = {int(draw(logits, Sampling(temperature=1.0, top_k=2), random.Random(seed))) for seed in range(40)}
    assert seen == {1, 2}
