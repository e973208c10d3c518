"""Generation by a pipeline: greedily, from a session, and its refusals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import pytest
import torch

from splitbundle import BundleError
from tests.support.models import original, token_rows
from tests.support.pipelines import generated, pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


GREEDY: Final = ("gpt2", "gpt2-by-layer", "llama", "llama-llama3")


def original_greedy(name: str, row: Sequence[int], number: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """Return the new tokens that transformers generates for one row alone."""
    ids = torch.tensor([list(row)])
    stop = {"eos_token_id": list(stop_ids)} if stop_ids else {"eos_token_id": -1}
    made = original(name).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=number, pad_token_id=0, **stop
    )
    return made[0, len(row) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_generation_is_that_of_transformers(name: str) -> None:
    rows = token_rows(6, 1, 11)
    known = [original_greedy(name, row, 20) for row in rows]
    assert generated(name, rows, max_new_tokens=20) == known
    for row, expected in zip(rows, known, strict=True):
        assert generated(name, [row], max_new_tokens=20) == [expected]


def cut_at(row: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """Return a row up to its first stop id, including it."""
    return list(row[: next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))])


@pytest.mark.parametrize("name", GREEDY)
def test_a_row_ends_with_its_stop_id(name: str) -> None:
    """The stop id is still given, then -1 while other rows go on. When all rows have ended, nothing more comes."""
    rows = token_rows(6, 1, 11)
    free = [original_greedy(name, row, 20) for row in rows]
    stop_ids, known = next(
        (stop_ids, ended)
        for stop_ids in itertools.combinations(sorted({token for row in free for token in row}), 3)
        if (ended := [cut_at(row, stop_ids) for row in free])
        and max(map(len, ended)) < 20
        and len(set(map(len, ended))) > 1
    )
    assert known == [original_greedy(name, row, 20, stop_ids) for row in rows]
    longest = max(map(len, known))
    got = generated(name, rows, max_new_tokens=20, stop_ids=stop_ids)
    assert got == [row + [-1] * (longest - len(row)) for row in known]


def test_generation_goes_on_from_a_session() -> None:
    """A session's prompt whose last token comes with the call equals the prompt at once."""
    name = "llama"
    rows = token_rows(7, 7)
    parts = pipeline(name)
    session = parts.session(2, 20)
    ids = torch.tensor(rows)
    parts(ids[:, :-1], session=session)
    got = torch.stack(list(parts.generate(ids[:, -1:], max_new_tokens=9, session=session)), dim=1).tolist()
    assert got == [original_greedy(name, row, 9) for row in rows]


def test_generation_stops_at_the_capacity_with_an_error() -> None:
    parts = pipeline("llama")
    session = parts.session(1, 6)
    tokens = parts.generate(torch.tensor(token_rows(4)), max_new_tokens=9, session=session)
    given = [next(tokens) for _ in range(3)]
    assert len(given) == 3
    with pytest.raises(BundleError) as caught:
        next(tokens)
    assert caught.value.codes == ("session.capacity",)
    assert session.past == [6]


def test_generation_leaves_gradients_as_they_are() -> None:
    """The caller's code runs between two tokens, in its own gradient mode."""
    for _ in pipeline("llama").generate(torch.tensor(token_rows(3)), max_new_tokens=2):
        assert torch.is_grad_enabled()


def test_arguments_are_refused_at_the_call_and_not_at_the_first_token() -> None:
    ids = torch.tensor(token_rows(3))
    for arguments, text in (
        ({"temperature": -1.0}, "[input.value] temperature: expected a number from 0, got -1.0"),
        ({"top_k": 0}, "[input.value] top_k: expected a number from 1, or None, got 0"),
        ({"top_p": 0.0}, "[input.value] top_p: expected a number above 0, up to 1, or None, got 0.0"),
        ({"top_p": 1.5}, "[input.value] top_p: expected a number above 0, up to 1, or None, got 1.5"),
    ):
        with pytest.raises(BundleError) as caught:
            pipeline("llama").generate(ids, **arguments)
        assert str(caught.value) == text
