"""The chosen cuts beside the best of all cuts, for small random models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st

from splitbundle import BundleError
from splitbundle.planning.costs import ModelCosts, RangeCosts, UnitCosts
from splitbundle.planning.cuts import check_only_one, cuts_by_size, cuts_for, cuts_for_machines, equal_cuts

CONTEXT, BATCH = 3, 2
Cuts = tuple[int, ...]
Load = int | Fraction


def model(embedding: int, layers: list[tuple[int, int]], head: int, tied: bool) -> ModelCosts:
    """Return the costs of a model whose units have as many parameters as bytes; a layer has a cache, too."""
    return ModelCosts(
        embedding=UnitCosts(bytes=embedding, parameters=embedding),
        layers=tuple(UnitCosts(bytes=b, parameters=b, kind="a", cache_bytes_per_token=c) for b, c in layers),
        head=UnitCosts(bytes=head, parameters=head),
        tied=tied,
        hidden_size=4,
        item_size=2,
    )


SMALL = st.integers(0, 9)
"""So small that many cuts are equally good."""
LARGE = st.integers(1, 10**12)
MODELS = st.one_of(
    *(
        st.builds(
            model,
            embedding=number,
            layers=st.lists(st.tuples(number, SMALL), min_size=1, max_size=7),
            head=number,
            tied=st.booleans(),
        )
        for number in (SMALL, LARGE)
    )
)
MANY = settings(max_examples=300, deadline=None, database=None)


def all_cuts(costs: ModelCosts, shards: int) -> Iterator[Cuts]:
    yield from itertools.combinations(range(len(costs.layers) + 1), shards - 1)


def best(costs: ModelCosts, shards: int, load: Callable[[int, RangeCosts], Load]) -> tuple[Load, Cuts]:
    """Return the smallest largest load, and the most even cuts that have it, by trying all."""
    found = []
    for cuts in all_cuts(costs, shards):
        loads = [load(i, own) for i, own in enumerate(costs.of_shards(cuts))]
        found.append((max(loads), sum(each**2 for each in loads), cuts))
    largest, _, cuts = min(found)
    return largest, cuts


def in_bytes(_: int, costs: RangeCosts) -> int:
    return costs.bytes


@seed(0)
@MANY
@given(costs=MODELS, data=st.data())
def test_equal_cuts_are_the_best(costs: ModelCosts, data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, len(costs.layers) + 2))
    assert equal_cuts(costs, shards) == best(costs, shards, in_bytes)[1]


@seed(0)
@MANY
@given(costs=MODELS, data=st.data())
def test_cuts_by_size_are_the_fewest_and_the_best(costs: ModelCosts, data: st.DataObject) -> None:
    number = len(costs.layers) + 2
    least = int(best(costs, number, in_bytes)[0])
    limit = data.draw(st.integers(1, max(1, costs.of_shards(())[0].bytes + 1)) | st.just(max(1, least)))
    if limit < least:
        with pytest.raises(BundleError, match=f"at least {least:,} bytes") as caught:
            cuts_by_size(costs, limit)
        assert (caught.value.codes, caught.value.problems[0].argument) == (("usage.size",), "max_shard_size")
        return
    tried = (best(costs, shards, in_bytes) for shards in range(1, number + 1))
    assert cuts_by_size(costs, limit) == next(cuts for largest, cuts in tried if largest <= limit)


@seed(0)
@MANY
@given(costs=MODELS, data=st.data())
@example(costs=model(0, [(1, 0), (5, 0), (1, 0)], 0, tied=False), data=None).via("a layer that only one machine holds")
def test_cuts_for_machines_are_the_best(costs: ModelCosts, data: st.DataObject | None) -> None:
    machines = [2, 2, 20, 2]
    if data is not None:
        sizes = st.integers(1, 60) | st.integers(10**11, 10**13)
        machines = data.draw(st.lists(sizes, min_size=1, max_size=min(5, len(costs.layers) + 2)))

    def use(i: int, own: RangeCosts) -> Fraction:
        return Fraction(own.memory_bytes(CONTEXT, BATCH), machines[i])

    largest, cuts = best(costs, len(machines), use)
    if largest <= 1:
        assert cuts_for_machines(costs, machines, CONTEXT, BATCH) == cuts
        return
    with pytest.raises(BundleError) as caught:
        cuts_for_machines(costs, machines, CONTEXT, BATCH)
    (problem,) = caught.value.problems
    assert (problem.code, problem.argument) == ("usage.size", "machines")
    # The sizes in the message do, and they are the smallest ones in these proportions.
    needed = [int(each.replace(",", "")) for each in problem.expected.partition("at least ")[2][:-6].split(", ")]
    assert needed == [-(-each * largest.numerator // largest.denominator) for each in machines]
    cuts_for_machines(costs, needed, CONTEXT, BATCH)


THREE = model(7, [(4, 1), (4, 1), (4, 1)], 1, tied=True)


def test_the_embedding_or_the_head_may_be_alone() -> None:
    """Both shards at the ends of a tied model have the table."""
    assert equal_cuts(THREE, 5) == (0, 1, 2, 3)
    assert [own.bytes for own in THREE.of_shards((0, 1, 2, 3))] == [7, 4, 4, 4, 8]
    assert equal_cuts(THREE, 3) == (1, 3)
    assert [own.bytes for own in THREE.of_shards((1, 3))] == [11, 8, 8]
    assert [own.bytes for own in THREE.of_shards(())] == [20]


@pytest.mark.parametrize("shards", [0, -1, 6, 2.0, True, "2"])
def test_a_number_of_shards_that_the_model_cannot_have(shards: object) -> None:
    with pytest.raises(BundleError, match="1 to 5 shards, as the model has 3 layers") as caught:
        equal_cuts(THREE, shards)  # type: ignore[arg-type]
    assert (caught.value.codes, caught.value.problems[0].argument) == (("usage.cut",), "equal")


@pytest.mark.parametrize("size", [0, -5, 1.5, False, "1GB"])
def test_a_size_that_is_no_number_of_bytes(size: object) -> None:
    with pytest.raises(BundleError, match=r"\[usage.size\] max_shard_size: expected a number of bytes from 1"):
        cuts_by_size(THREE, size)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"\[usage.size\] machines: expected numbers of bytes from 1"):
        cuts_for_machines(THREE, [100, size], 1, 1)  # type: ignore[list-item]


def test_the_part_that_is_too_large_is_named() -> None:
    for costs, part in (
        (THREE, "8 bytes, the size of the head with the embedding that it shares"),
        (model(9, [(4, 0)], 1, tied=False), "9 bytes, the size of the embedding"),
        (model(1, [(4, 0), (9, 0)], 1, tied=False), "9 bytes, the size of layer 1"),
        (model(1, [(4, 0)], 9, tied=False), "9 bytes, the size of the head"),
    ):
        with pytest.raises(BundleError, match=f"at least {part}, which can't be cut, got 3. Name this size"):
            cuts_by_size(costs, 3)


@pytest.mark.parametrize("machines", [[], [100] * 6])
def test_a_number_of_machines_that_the_model_cannot_have(machines: list[int]) -> None:
    with pytest.raises(BundleError, match=r"\[usage.cut\] machines: expected 1 to 5 machines"):
        cuts_for_machines(THREE, machines, 1, 1)


def test_one_way_at_a_time() -> None:
    check_only_one({"equal": 1, "machines": None})
    with pytest.raises(BundleError, match="at most one of split, equal, max_shard_size, got split and equal"):
        cuts_for([1], 2, None, lambda: THREE, default=())
    assert cuts_for([1, 2], None, None, lambda: THREE, default=()) == (1, 2)
    assert cuts_for([], None, None, lambda: THREE, default=(3,)) == ()
    assert cuts_for(None, None, None, lambda: THREE, default=(3,)) == (3,)
    assert cuts_for(None, 3, None, lambda: THREE, default=(3,)) == (1, 3)
    assert cuts_for(None, None, 20, lambda: THREE, default=(3,)) == ()
