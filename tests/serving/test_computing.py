"""Work that is done one piece at a time: order, errors, and the end."""

from __future__ import annotations

import threading
import time

import pytest

from splitbundle.serving.computing import MOST_CALLERS, Computing, Stopped


def test_a_caller_does_its_work_itself_if_nothing_waits() -> None:
    computing = Computing("test")
    assert computing.run(threading.get_ident) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        computing.run(lambda: 1 // 0)
    assert computing.run(lambda: "goes on") == "goes on"
    computing.stop()
    with pytest.raises(Stopped):
        computing.run(lambda: 1)


def test_only_a_few_threads_compute() -> None:
    """Each of them has a pool of OpenMP's threads. All others hand their work to one thread."""
    computing, used = Computing("test"), set()
    threads = [
        threading.Thread(target=lambda: used.add(computing.run(threading.get_ident))) for _ in range(3 * MOST_CALLERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(computing._callers) <= MOST_CALLERS
    assert len(used) <= MOST_CALLERS + 1
    computing.stop()


def test_one_piece_at_a_time_and_waiting_work_in_order() -> None:
    computing = Computing("test")
    done: list[int] = []
    inside, go = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go.wait(30)
        done.append(-1)

    holder = threading.Thread(target=lambda: computing.run(hold))
    holder.start()
    assert inside.wait(30)
    waiting = []
    for i in range(10):
        thread = threading.Thread(target=lambda i=i: computing.run(lambda: done.append(i)))  # type: ignore[misc]
        thread.start()
        waiting.append(thread)
        deadline = time.monotonic() + 30
        while computing.waiting <= i and time.monotonic() < deadline:
            time.sleep(0.001)
    go.set()
    for thread in (holder, *waiting):
        thread.join(30)
    assert done == list(range(-1, 10))
    computing.stop()


def test_many_threads_and_an_end_in_the_middle() -> None:
    """Each caller gets its own result or ``Stopped``, and none waits for ever."""
    for _ in range(20):
        computing = Computing("test")
        outcomes: list[object] = []

        def ask(i: int, to: Computing = computing, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(to.run(lambda: i) == i)
            except Stopped:
                outcomes.append(None)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
        for i, thread in enumerate(threads):
            thread.start()
            if i == 12:
                computing.stop()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert len(outcomes) == 24
        assert False not in outcomes


@pytest.mark.parametrize("by_caller", [True, False])
def test_the_end_waits_for_a_bounded_time(by_caller: bool) -> None:
    computing, begun, go_on = Computing("test"), threading.Event(), threading.Event()
    if not by_caller:  # as many threads as may compute have come
        computing._callers.update(range(-MOST_CALLERS, 0))

    def work() -> None:
        begun.set()
        go_on.wait(30)

    worker = threading.Thread(target=lambda: computing.run(work))
    worker.start()
    begun.wait(30)
    assert not computing.stop(0.1)
    with pytest.raises(Stopped):
        computing.run(lambda: 1)
    go_on.set()
    worker.join(30)
    assert computing.stop(30)
