"""Choose cuts: shards of equal size, shards below a size, or shards that fit given machines. All choices are exact.

A shard's load is its size in bytes, or its memory relative to its machine's. Every choice makes the largest load as
small as possible. Of the cuts that do, it takes those with the smallest sum of squared loads, which are the most even.
Of these, it takes the lowest layer numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.integers import as_integer
from splitbundle.planning.costs import ModelCosts, UnitCosts

Load = Callable[[int, int, int], int]
"""The number of a shard, its first layer, and the layer after its last -> its load, which is an integer."""


class _Sizes:
    """One cost of every range of layers, by sums that were made once."""

    def __init__(self, costs: ModelCosts, cost: Callable[[UnitCosts], int]) -> None:
        self.layers = len(costs.layers)
        self._sums = [0, *accumulate(cost(layer) for layer in costs.layers)]
        self._embedding, self._head, self._tied = cost(costs.embedding), cost(costs.head), costs.tied
        self.total = self.of(0, self.layers, first=True, last=True)

    def of(self, start: int, stop: int, *, first: bool, last: bool) -> int:
        """Return the cost of the first, the last or another shard. With a tied head, the last one has the table too."""
        ends = (self._embedding if first or (last and self._tied) else 0) + (self._head if last else 0)
        return self._sums[stop] - self._sums[start] + ends

    def largest_part(self) -> tuple[int, str]:
        """Return the largest cost of what can't be cut, and its name: an end alone, or one layer."""
        head = "the head with the embedding that it shares" if self._tied else "the head"
        layers = ((self._sums[i + 1] - self._sums[i], f"layer {i}") for i in range(self.layers))
        ends = (
            (self.of(0, 0, first=True, last=False), "the embedding"),
            (self.of(self.layers, self.layers, first=False, last=True), head),
        )
        return max((*ends, *layers), key=lambda part: part[0])

    def fewest(self, limit: int) -> int:
        """Return the number of the fewest shards that cost at most ``limit`` each; no part may cost more.

        Each shard but the last ends as late as it can.
        """
        shards, at = 1, 0
        while self.of(at, self.layers, first=shards == 1, last=True) > limit:

            def cost(stop: int, start: int = at, first: bool = shards == 1) -> int:
                return self.of(start, stop, first=first, last=False)

            at += bisect_right(range(at, self.layers + 1), limit, key=cost) - 1
            shards += 1
        return shards

    def loads(self, scales: Sequence[int]) -> Load:
        """Return the loads of as many shards as there are scales: the cost times the scale."""
        last = len(scales) - 1

        def load(shard: int, start: int, stop: int) -> int:
            return self.of(start, stop, first=shard == 0, last=shard == last) * scales[shard]

        return load


def equal_cuts(costs: ModelCosts, shards: int) -> tuple[int, ...]:
    """Return the cuts with which the largest shard has as few bytes as possible.

    The first shard may be the embedding alone, and the last one the head alone.

    Raises:
        BundleError: ``usage.cut`` for a number of shards that the model can't be cut into.
    """
    number, most = as_integer(shards), len(costs.layers) + 2
    if number is None or not 1 <= number <= most:
        expected = f"1 to {most} shards, as the model has {most - 2} layers and two ends"
        hint = "A shard between two others needs a layer"
        raise BundleError(Problem(code="usage.cut", argument="equal", expected=expected, got=quoted(shards), hint=hint))
    sizes = _Sizes(costs, lambda unit: unit.bytes)
    largest = _smallest(lambda limit: sizes.fewest(limit) <= number, low=sizes.largest_part()[0], high=sizes.total)
    load = sizes.loads([1] * number)
    return _most_even(load, _starts(load, sizes.layers, number, largest), largest)


def cuts_by_size(costs: ModelCosts, max_bytes: int) -> tuple[int, ...]:
    """Return the cuts of the fewest shards that each have at most ``max_bytes`` bytes.

    Of the cuts into this number of shards, these are ``equal_cuts``.

    Raises:
        BundleError: ``usage.size`` for no number of bytes, or for less than the largest unit has.
    """
    limit = as_integer(max_bytes)
    if limit is None or limit < 1:
        raise _wrong_size("max_shard_size", "a number of bytes from 1", quoted(max_bytes))
    sizes = _Sizes(costs, lambda unit: unit.bytes)
    size, part = sizes.largest_part()
    if limit < size:
        expected = f"at least {size:,} bytes, the size of {part}, which can't be cut"
        raise _wrong_size("max_shard_size", expected, f"{limit:,}", "Name this size or a larger one")
    return equal_cuts(costs, sizes.fewest(limit))


def cuts_for_machines(costs: ModelCosts, capacities: Sequence[int], context: int, batch: int) -> tuple[int, ...]:
    """Return the cuts of one shard for each machine, in the given order.

    A machine needs memory for the weights of its shard, and for the cache of ``batch`` rows of ``context`` tokens. The
    cuts make the largest use relative to the capacity as small as possible. The first machine may get the embedding
    alone, and the last one the head alone.

    Args:
        costs: The costs of the model's units.
        capacities: The memory of each machine in bytes.
        context: The number of tokens of a row.
        batch: The number of rows.

    Raises:
        BundleError: ``usage.cut`` for a number of machines that the model can't be cut for; ``usage.size`` for no
            numbers of bytes, or for machines that are too small.
    """
    bytes_of = [as_integer(each) for each in capacities]
    given = [each for each in bytes_of if each is not None and each >= 1]
    if len(given) < len(bytes_of):
        raise _wrong_size("machines", "numbers of bytes from 1, one for each machine", quoted(list(capacities)))
    most = len(costs.layers) + 2
    if not 1 <= len(given) <= most:
        expected = f"1 to {most} machines, as the model has {most - 2} layers and two ends"
        hint = "A machine between two others needs a layer"
        raise BundleError(
            Problem(code="usage.cut", argument="machines", expected=expected, got=f"{len(given)}", hint=hint)
        )
    sizes = _Sizes(costs, lambda unit: unit.parameters * costs.item_size + batch * context * unit.cache_bytes_per_token)
    # Loads relative to the capacities compare exactly as integers: load / capacity = load · (whole / capacity) / whole.
    whole = math.lcm(*given)
    scales = [whole // each for each in given]
    load, shards = sizes.loads(scales), len(given)
    largest = _smallest(
        lambda limit: bool(_starts(load, sizes.layers, shards, limit)[0]), low=0, high=sizes.total * max(scales)
    )
    if largest > whole:
        needed = ", ".join(f"{-(-each * largest // whole):,}" for each in given)
        expected = f"more memory; in these proportions, at least {needed} bytes"
        hint = "Name more or larger machines, a shorter context, fewer rows, or a smaller dtype"
        raise _wrong_size("machines", expected, ", ".join(f"{each:,}" for each in given), hint)
    return _most_even(load, _starts(load, sizes.layers, shards, largest), largest)


def cuts_for(
    split: Sequence[int] | None,
    equal: int | None,
    max_shard_size: int | None,
    costs: Callable[[], ModelCosts],
    *,
    default: tuple[int, ...],
) -> tuple[int, ...]:
    """Return the given cuts, ``equal_cuts`` or ``cuts_by_size``, or the default if none of them is asked for.

    Args:
        split: The cuts, which nothing checks here.
        equal: The number of shards.
        max_shard_size: The largest size of a shard in bytes.
        costs: Returns the costs of the model's units, if they are needed.
        default: The cuts if the other arguments are None.

    Raises:
        BundleError: ``usage.cut``, ``usage.size``.
    """
    check_only_one({"split": split, "equal": equal, "max_shard_size": max_shard_size})
    if equal is not None:
        return equal_cuts(costs(), equal)
    if max_shard_size is not None:
        return cuts_by_size(costs(), max_shard_size)
    return default if split is None else tuple(split)


def check_only_one(arguments: Mapping[str, object]) -> None:
    """Refuse more than one way to choose cuts. An argument that isn't given is None.

    Raises:
        BundleError: ``usage.cut``.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        expected, got = f"at most one of {', '.join(arguments)}", " and ".join(given)
        raise BundleError(Problem(code="usage.cut", argument=given[1], expected=expected, got=got))


def _wrong_size(argument: str, expected: str, got: str, hint: str | None = None) -> BundleError:
    return BundleError(Problem(code="usage.size", argument=argument, expected=expected, got=got, hint=hint))


def _smallest(fits: Callable[[int], bool], *, low: int, high: int) -> int:
    """Return the smallest limit from ``low`` to ``high`` that fits.

    ``high`` must fit. If a limit fits, so must every higher one.
    """
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _least(shard: int, shards: int) -> int:
    """Return the least number of layers of a shard: the first and the last shard may have none."""
    return 1 if 0 < shard < shards - 1 else 0


def _starts(load: Load, layers: int, shards: int, limit: int) -> list[list[int]]:
    """Return for each shard the layers where it may begin, so that its load and all later ones are within the limit.

    One more list has the layer after the last. If the first list is empty, no cuts are within the limit.
    """
    starts: list[list[int]] = [[] for _ in range(shards)] + [[layers]]
    for shard in reversed(range(shards)):
        ends, least = starts[shard + 1], _least(shard, shards)
        # Each shard before this one but the first has a layer, and the last of the ends bounds the starts.
        for start in range(max(0, shard - 1), max(ends, default=-1) - least + 1 if shard else 1):
            # A load grows with its end, so only the first end that leaves enough layers matters.
            i = bisect_left(ends, start + least)
            if i < len(ends) and load(shard, start, ends[i]) <= limit:
                starts[shard].append(start)
    return starts


def _most_even(load: Load, starts: list[list[int]], limit: int) -> tuple[int, ...]:
    """Return the cuts with the smallest sum of squared loads, and of these the lowest, by dynamic programming.

    The squares are convex in the sums of the layers' costs. So a later start never has an earlier best end, and the
    best end of a start in the middle bounds those of the starts on both sides.
    """
    shards = len(starts) - 1
    sums, chosen = {starts[-1][0]: 0}, []  # of a start: the sum from there on; the best end
    for shard in reversed(range(shards)):
        begins, ends, least = starts[shard], starts[shard + 1], _least(shard, shards)
        best: dict[int, tuple[int, int]] = {}
        spans = [(0, len(begins), 0, len(ends) - 1)]
        while spans:
            begin, stop, low, high = spans.pop()
            if begin == stop:
                continue
            middle = (begin + stop) // 2
            start = begins[middle]
            first = max(low, bisect_left(ends, start + least))
            options = ((load(shard, start, ends[i]), i) for i in range(first, high + 1))
            total, at = min((own**2 + sums[ends[i]], i) for own, i in options if own <= limit)
            best[start] = total, ends[at]
            spans += [(begin, middle, low, at), (middle + 1, stop, at, high)]
        sums = {start: total for start, (total, _) in best.items()}
        chosen.append({start: end for start, (_, end) in best.items()})
    cuts = [0]
    for ends_of in reversed(chosen):
        cuts.append(ends_of[cuts[-1]])
    return tuple(cuts[1:-1])
