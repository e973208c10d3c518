"""Which rows are computed next: steps together, prompts in pieces, and clients in turn."""

from __future__ import annotations

import random

import pytest

from splitbundle import BundleError
from splitbundle.stages.turns import Turns, Waiting, Work


def made(left: int, client: str = "") -> Work:
    work = Work(client)
    work.left = left
    return work


def test_steps_go_together_and_prompts_in_pieces_between_them() -> None:
    turns: Turns[Work] = Turns(piece=8, large_piece=32)
    steps, long, longer = [made(1), made(1)], made(20), made(30)
    for work in (*steps, long, longer):
        turns.add(work)
    seen = []
    for _ in range(16):
        chosen = turns.next()
        seen.append([(work, count) for work, count in chosen])
        for work, count in chosen:
            work.left = max(work.left - count, 1) if work in (long, longer) else 1
            if work in (long, longer) and work.left == 1:
                turns.remove(work)
    assert seen[::2] == [[(work, 1) for work in steps]] * 8  # every second call is theirs
    assert [chosen[0][0] for chosen in seen[1:6:2]] == [long, longer, long]
    assert all(count <= 8 for chosen in seen for _, count in chosen)


def test_a_prompt_alone_has_larger_pieces() -> None:
    turns: Turns[Work] = Turns(piece=8, large_piece=32)
    work = made(40)
    turns.add(work)
    assert turns.next() == [(work, 32)]


def test_short_prompts_go_together_where_padding_costs_little() -> None:
    turns: Turns[Work] = Turns(piece=16)
    first, alike, shorter, long = made(4), made(3), made(2), made(100)
    for work in (first, alike, shorter, long):
        turns.add(work)
    assert turns.next() == [(first, 4), (alike, 3), (shorter, 2), (long, 4)]


def test_nothing_is_left_out_for_long() -> None:
    """Whatever comes, each piece of work is computed within as many calls as there are pieces before it."""
    for seed in range(200):
        draw = random.Random(seed)
        turns: Turns[Work] = Turns(piece=draw.choice((1, 4, 16)), large_piece=16)
        left = {made(draw.randint(1, 60)): 0 for _ in range(draw.randint(1, 12))}
        number = len(left)
        for work in left:
            turns.add(work)
        for _ in range(2000):
            chosen = turns.next()
            assert chosen
            assert len({work for work, _ in chosen}) == len(chosen)
            for work in left:
                left[work] += 1
            for work, count in chosen:
                assert 0 < count <= work.left
                left[work] = 0
                work.left -= count
                if not work.left:
                    turns.remove(work)
                    del left[work]
            assert all(waited <= 2 * number for waited in left.values())
            if not left:
                break
        assert not left
        assert not turns.next()


def test_clients_take_turns_and_the_queue_is_bounded() -> None:
    waiting: Waiting[Work] = Waiting(6)
    works = [made(1, client) for client in ("a", "a", "a", "b", "c", "c")]
    for work in works:
        waiting.add(work)
    for client in ("d", "a"):
        with pytest.raises(BundleError) as caught:
            waiting.add(made(1, client))
        assert caught.value.codes == ("server.full",)
    assert waiting.drop(lambda work: work is works[1]) == [works[1]]
    assert [waiting.take() for _ in range(6)] == [works[0], works[3], works[4], works[2], works[5], None]
    assert len(waiting) == 0
