"""Sessions, generation, sampling and training: what a pipeline does beyond computing logits."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.sampling import Sampling
from splitbundle.torch_pipeline import Pipeline, load_pipeline
from splitbundle.torch_sampling import draw
from splitbundle.torch_stage import Stage, load_stages
from tests.support.models import (
    LAYERS,
    ONE_PER_FAMILY,
    TOLERANCE,
    VOCAB,
    bundle,
    checkpoint,
    expected_logits,
    load_original,
    make_model,
    original,
    relative,
    token_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")

one_per_family = pytest.mark.parametrize("name", ONE_PER_FAMILY)


@cache
def pipeline(name: str) -> Pipeline:
    """The named model, a stage a layer."""
    return bundle(name).pipeline()


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[7] * (width - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


# Sessions.


@pytest.mark.rule("SB-B-010", "SB-B-011")
def test_a_call_that_does_not_fit_leaves_the_session_as_it_was() -> None:
    name = "qwen2-mixed"
    parts = pipeline(name)
    rows = token_rows(6, 6)
    session = parts.session(2, 8)
    parts(torch.tensor(rows), session=session)
    with pytest.raises(BundleError) as caught:
        parts(torch.tensor(token_rows(3, 3, seed=1)), session=session)
    assert str(caught.value) == (
        "[session.capacity] capacity: expected at least 9 slots, got 8. Open a session with more capacity"
    )
    assert session.past == [6, 6]
    more = token_rows(2, 2, seed=2)
    logits = parts(torch.tensor(more), session=session)
    for row in range(2):
        known = expected_logits(name, tuple(rows[row] + more[row]))
        assert relative(logits[row], known[6:]) <= TOLERANCE
    assert session.past == [8, 8]


@pytest.mark.rule("SB-B-011")
@pytest.mark.parametrize(
    "call",
    [
        lambda parts, ids, session: parts(ids, session=session, logits=0),
        lambda parts, ids, session: parts(ids.expand(3, -1), session=session),
        lambda parts, ids, session: parts(ids + VOCAB, session=session),
        lambda parts, ids, session: parts(ids.repeat(1, 9), session=session),
        lambda parts, ids, session: parts(ids, session=session, attention_mask=torch.tensor([[1, 0, 1]])),
    ],
    ids=["logits", "rows", "ids", "capacity", "mask"],
)
def test_a_refused_call_writes_nothing(call: Callable[..., Any]) -> None:
    """Into no stage's cache, whichever stage it was that refused."""
    parts = pipeline("llama")
    session = parts.session(1, 8)
    parts(torch.tensor(token_rows(4)), session=session)

    def state() -> list[Any]:
        held = [tensor for kept in session.caches for tensor in (*kept.keys.values(), *kept.values.values())]
        return [session.past, [kept.filled for kept in session.caches], [tensor.tolist() for tensor in held]]

    before = state()
    with pytest.raises(BundleError):
        call(parts, torch.tensor(token_rows(3, seed=1)), session)
    assert state() == before


@pytest.mark.rule("SB-B-011")
def test_a_stage_that_trains_refuses_before_the_first_has_written() -> None:
    """The stages before it don't train, and would have gone ahead."""
    whole = bundle("llama")
    parts = Pipeline([whole.stage(layers=(0, 2)), whole.stage(layers=(2, 4), trainable=True)])
    session = parts.session(1, 8)
    with pytest.raises(BundleError):
        parts(torch.tensor(token_rows(3)), session=session)
    assert [kept.filled for kept in session.caches] == [[0], [0]]


@pytest.mark.rule("SB-B-006", "SB-B-007")
def test_capacity_counts_tokens_and_not_padding() -> None:
    """Rows of 5 and 3 tokens in a sequence of 12 need 5 slots, as padding enters no cache."""
    name = "llama-llama3"
    rows = token_rows(5, 3)
    ids, mask = left_padded(rows)
    ids, mask = functional.pad(ids, (4, 3)), functional.pad(mask, (4, 3))
    session = pipeline(name).session(2, 5)
    logits = pipeline(name)(ids, attention_mask=mask, session=session)
    assert logits.shape == (2, 12, VOCAB)
    for row, tokens in enumerate(rows):
        at = mask[row].bool()
        assert relative(logits[row, at], expected_logits(name, tuple(tokens))) <= TOLERANCE
        assert not logits[row, ~at].any()


@pytest.mark.rule("SB-B-006", "SB-B-010")
def test_capacity_counts_each_row_s_own_tokens() -> None:
    """Of rows with different pasts too: the fuller one's padding has no slot to go to."""
    name = "qwen2-mixed"
    rows, more = token_rows(7, 2), token_rows(1, 5, seed=1)
    parts = pipeline(name)
    session = parts.session(2, 8)
    ids, mask = left_padded(rows)
    parts(ids, attention_mask=mask, session=session)
    ids, mask = left_padded(more)
    logits = parts(ids, attention_mask=mask, session=session)
    assert session.past == [8, 7]
    for row in range(2):
        known = expected_logits(name, tuple(rows[row] + more[row]))
        assert relative(logits[row, mask[row].bool()], known[len(rows[row]) :]) <= TOLERANCE


def test_a_full_row_waits_while_another_goes_on() -> None:
    """The row is at the last position that the model has: what is computed in its place must look nothing up beyond."""
    parts = pipeline("gpt2")
    limit = bundle("gpt2").architecture.position_limit
    assert limit == 48
    rows = token_rows(limit, 3)
    ids, mask = left_padded(rows)
    session = parts.session(2, limit)
    parts(ids, attention_mask=mask, session=session)
    logits = parts(torch.tensor([[1], [2]]), attention_mask=torch.tensor([[0], [1]]), session=session)
    assert not logits[0].any()
    assert relative(logits[1], expected_logits("gpt2", (*rows[1], 2))[3:]) <= TOLERANCE


@pytest.mark.rule("SB-B-012")
def test_a_model_has_no_more_positions_than_its_table() -> None:
    parts = pipeline("gpt2")
    with pytest.raises(BundleError) as caught:
        parts.session(1, 49)
    text = "[session.capacity] capacity: expected 1 to 48, the positions of the model, got 49"
    assert str(caught.value) == text
    with pytest.raises(BundleError) as caught:
        parts(torch.zeros(1, 49, dtype=torch.int64))
    assert str(caught.value) == (
        "[input.position] stage bottom, past + count: expected at most 48, the positions of the model, got 49"
    )


def test_rolling_back_too_far_is_refused() -> None:
    parts = pipeline("llama")
    session = parts.session(2, 8)
    ids, mask = left_padded(token_rows(4, 2))
    parts(ids, attention_mask=mask, session=session)
    for tokens, text in (
        (3, "[session.rollback] tokens: expected 0 to 2 tokens, what row 1 has, got 3"),
        ([5, 0], "[session.rollback] tokens: expected 0 to 4 tokens, what row 0 has, got 5"),
        ([0, -1], "[session.rollback] tokens: expected 0 to 2 tokens, what row 1 has, got -1"),
        ([1], "[session.rollback] tokens: expected one number, or one for each of 2 rows, got [1]"),
    ):
        with pytest.raises(BundleError) as caught:
            session.rollback(tokens)
        assert str(caught.value) == text
        assert session.past == [4, 2]
    session.rollback(2)
    assert session.past == [2, 0]


def test_reordering_to_rows_that_do_not_exist_is_refused() -> None:
    session = pipeline("llama").session(2, 8)
    for rows in ([0], [0, 2], [-1, 0], [0, 1, 1]):
        with pytest.raises(BundleError) as caught:
            session.reorder(rows)
        assert str(caught.value) == f"[input.value] rows: expected 2 row numbers below 2, got {rows}"


def test_a_session_is_of_one_number_of_rows() -> None:
    parts = pipeline("llama")
    with pytest.raises(BundleError) as caught:
        parts(torch.zeros(3, 1, dtype=torch.int64), session=parts.session(2, 8))
    assert str(caught.value) == "[input.shape] stage bottom, past: expected 3 rows, as the tokens, got 2"


@pytest.mark.rule("SB-B-013")
def test_stages_that_do_not_tile_the_model_are_refused() -> None:
    def stages(*ranges: tuple[int, int]) -> list[Stage]:
        whole = bundle("llama")
        selections = [
            whole.select(layers=ends, embeds=i == 0, head=i == len(ranges) - 1) for i, ends in enumerate(ranges)
        ]
        return load_stages(whole, selections)

    bottom, middle, top = stages((0, 1), (1, 3), (3, 4))
    of_one = "expected a stage of one model from layer {} on, the first embeds, the last has the head, got layers {}"
    for given, text in (
        ([bottom, top], f"stages[1]: {of_one.format(1, '(3, 4), embeds=False, head=True')}"),
        ([bottom, middle], f"stages[1]: {of_one.format(1, '(1, 3), embeds=False, head=False')}"),
        ([middle, top], f"stages[0]: {of_one.format(0, '(1, 3), embeds=False, head=False')}"),
        ([], "stages: expected stages up to the last layer, got up to 0"),
    ):
        with pytest.raises(BundleError) as caught:
            Pipeline(given)
        assert str(caught.value) == f"[pipeline.tiling] {text}"
    assert isinstance(Pipeline([bottom, middle, top]), Pipeline)


def test_gradients_and_a_cache_do_not_go_together() -> None:
    """What the cache holds would be without a gradient, silently."""
    parts = bundle("llama").pipeline(trainable=True)
    with pytest.raises(BundleError) as caught:
        parts(torch.zeros(1, 2, dtype=torch.int64), session=parts.session(1, 8))
    assert str(caught.value) == (
        "[input.grad] stage bottom, cache: expected a call without gradients: use torch.no_grad(), "
        "got gradients enabled"
    )
    with torch.no_grad():
        parts(torch.zeros(1, 2, dtype=torch.int64), session=parts.session(1, 8))


# Greedy generation.

GREEDY: Final = ("gpt2", "gpt2-by-layer", "llama", "llama-llama3")


def original_greedy(name: str, row: Sequence[int], number: int, stop_ids: Sequence[int] = ()) -> list[int]:
    """What transformers generates for one row alone: its new tokens."""
    ids = torch.tensor([list(row)])
    stop = {"eos_token_id": list(stop_ids)} if stop_ids else {"eos_token_id": -1}
    made = original(name).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=number, pad_token_id=0, **stop
    )
    return made[0, len(row) :].tolist()  # type: ignore[no-any-return]


def generated(name: str, rows: Sequence[Sequence[int]], **arguments: Any) -> list[list[int]]:
    """What the pipeline generates, row by row."""
    ids, mask = left_padded(rows)
    given = pipeline(name).generate(ids, attention_mask=mask, **arguments)
    return torch.stack(list(given), dim=1).tolist()


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_generation_is_that_of_transformers(name: str) -> None:
    rows = token_rows(6, 1, 11)
    known = [original_greedy(name, row, 20) for row in rows]
    assert generated(name, rows, max_new_tokens=20) == known
    for row, expected in zip(rows, known, strict=True):
        assert generated(name, [row], max_new_tokens=20) == [expected]


def cut_at(row: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """A row up to its first stop id, that one included."""
    return list(row[: next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))])


@pytest.mark.parametrize("name", GREEDY)
def test_a_row_ends_with_its_stop_id(name: str) -> None:
    """The stop id is still given; then -1 while others go on; and when all have ended, nothing more."""
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
    """A prompt in a session, whose last token comes with the call, is the prompt at once."""
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
    """The caller's code runs between two tokens, and its gradient mode is its own."""
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


# Sampling.


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
    """The probabilities, written down another way: what is left out is found by comparing with the last one kept.

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
    """Pearson's chi-squared over 40,000 draws with a fixed seed; and none of what has no probability."""
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
    # The mean and four standard deviations: a right sampler passes 999 seeds in 1,000.
    assert squared < freedom + 4 * math.sqrt(2 * freedom)
    # A temperature a tenth off wouldn't pass, so the test can fail.
    other = exact(logits, Sampling(temperature=sampling.temperature * 1.1, top_k=sampling.top_k)) * number
    assert ((counts - other)[possible] ** 2 / other[possible]).sum().item() > freedom + 4 * math.sqrt(2 * freedom)


def test_a_draw_takes_one_number_a_row() -> None:
    """And every row its own, in order: so a row's text doesn't hang on how the numbers were fetched."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(5, -1)
    generator, twin = random.Random(3), random.Random(3)
    drawn = draw(logits, Sampling(temperature=1.0), generator)
    assert drawn.tolist() == [int(draw(logits[:1], Sampling(temperature=1.0), twin)) for _ in range(5)]
    assert generator.random() == twin.random()


def test_the_inverse_of_the_distribution_is_one_function() -> None:
    """The first token whose cumulated probability exceeds u, also where u meets it: another backend draws alike."""

    class Given(random.Random):
        """Gives one number."""

        def __init__(self, number: float) -> None:
            super().__init__()
            self.number = number

        def random(self) -> float:
            return self.number

    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    for uniform, expected in ((0.0, 1), (0.49, 1), (0.51, 0), (0.74, 0), (0.76, 2), (0.874, 2), (0.876, 3), (0.999, 3)):
        assert draw(logits, Sampling(temperature=1.0), Given(uniform)).tolist() == [expected]
    even = torch.zeros(1, 4)
    for uniform, expected in ((0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)):
        assert draw(even, Sampling(temperature=1.0), Given(uniform)).tolist() == [expected]


def test_equal_logits_are_taken_by_rising_id() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0]])
    assert draw(logits, Sampling(), random.Random(0)).tolist() == [1]
    assert draw(logits, Sampling(temperature=1.0, top_k=1), random.Random(0)).tolist() == [1]
    seen = {int(draw(logits, Sampling(temperature=1.0, top_k=2), random.Random(seed))) for seed in range(40)}
    assert seen == {1, 2}


# Parameters.


@one_per_family
def test_parameters_have_their_global_names(name: str) -> None:
    """Of any layer range: the names that the architecture gives, and none is renumbered."""
    whole = bundle(name)
    tensors = whole.architecture.unit_tensors()
    for start, stop in ((0, 2), (1, 3), (2, 4), (3, 4)):
        selection = whole.select(layers=(start, stop))
        expected = {n for unit in selection.units for n in tensors[unit]}
        if start and selection.head and whole.architecture.head.tied:
            # The embedding's unit is needed for the token table alone.
            expected = {n for n in expected if not n.startswith("embedding.") or n == "embedding.token.weight"}
        assert set(whole.stage(layers=(start, stop)).state_dict()) == expected


@pytest.mark.rule("SB-B-014")
def test_a_range_computes_the_same_whatever_the_cuts_on_disk(tmp_path: Path) -> None:
    """Another cut is another manifest over the same weights."""
    name = "qwen2-mixed"
    other = splitbundle_converter.convert(checkpoint(name), tmp_path / "b.splitbundle", split=(3,), check=False)
    assert other.fingerprint == bundle(name).fingerprint
    hidden = torch.randn(2, 7, 36, generator=torch.Generator().manual_seed(0))
    for ends in ((0, 1), (1, 3), (2, 4), (3, 4)):
        given = torch.tensor(token_rows(7, 7)) if ends[0] == 0 else hidden
        assert torch.equal(other.stage(layers=ends)(given), bundle(name).stage(layers=ends)(given))


def test_parameters_take_gradients_only_where_asked() -> None:
    whole = bundle("llama")
    assert not any(p.requires_grad for p in whole.pipeline().parameters())
    assert not any(p.requires_grad for p in whole.stage("bottom").parameters())
    assert all(p.requires_grad for p in whole.pipeline(trainable=True).parameters())
    assert all(p.requires_grad for p in whole.stage("top", trainable=True).parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mappings of a process are seen on Linux alone")
@pytest.mark.parametrize("trainable", [False, True])
def test_weights_are_mapped_and_not_copied(trainable: bool) -> None:
    whole = bundle("llama")
    parts = load_pipeline(whole, trainable=trainable)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) .* (/.*\.safetensors)$", line)
        if found and Path(found[4]).parent == whole.path:
            mapped.append((int(found[1], 16), int(found[2], 16), found[3], Path(found[4]).stem))
    units = {name: unit for unit, names in whole.architecture.unit_tensors().items() for name in names}
    for stage in parts.stages:
        for name, parameter in stage.named_parameters():
            start = parameter.data_ptr()
            stop = start + parameter.nbytes
            access = [(mode, unit) for low, high, mode, unit in mapped if low <= start and stop <= high]
            # Writable and private: never shared, as the file would change then.
            assert ("rw-p", units[name]) in access, f"{name}: {access}"


def test_another_dtype_is_computed_in() -> None:
    assert {p.dtype for p in bundle("llama").pipeline(dtype="bfloat16").parameters()} == {torch.bfloat16}


# Training.


def digests(whole: Bundle) -> dict[str, str]:
    """Each file's sha256."""
    files = (path for path in whole.path.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def original_loss(model: Any, ids: Tensor) -> Tensor:
    """Of each next token. *Shape:* (batch, sequence) -> ()."""
    return next_token_loss(model(input_ids=ids).logits, ids)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """*Shape:* (batch, sequence, vocab), (batch, sequence) -> ()."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def source_gradients(whole: Bundle, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients under canonical names -> under the source's names and layouts, by the manifest's own table."""
    from splitbundle.manifest import expand
    from splitbundle_converter.translate import put_together

    return {
        name: gradient
        for template in whole.manifest.source_names
        for entry in expand(template, LAYERS)
        for name, gradient in put_together(entry, gradients.__getitem__).items()
    }


def assert_gradients(whole: Bundle, gradients: dict[str, Tensor], model: Any) -> None:
    """Holds each gradient against the original's."""
    got = source_gradients(whole, gradients)
    compared = 0
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.c_attn.bias", "k_proj.bias")):
            # Without rotations a key's bias changes nothing: its gradient is noise, so the whole vector is the scale.
            assert (got[name] - parameter.grad).abs().max() <= 1e-4 * max(parameter.grad.abs().max(), 1e-3)
        else:
            assert relative(got[name], parameter.grad) <= 1e-4, name
        compared += 1
    assert compared >= 6 * LAYERS


@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, "gpt2", "gpt2-unscaled-untied", "llama"])
def test_gradients_of_a_pipeline(name: str) -> None:
    whole = bundle(name)
    parts = whole.pipeline(trainable=True)
    model = load_original(checkpoint(name))
    ids = torch.tensor(token_rows(9, 9))
    original_loss(model, ids).backward()
    loss = next_token_loss(parts(ids), ids)
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for stage in parts.stages:
        for key, parameter in stage.named_parameters():
            assert parameter.grad is not None
            gradients[key] = parameter.grad
    assert_gradients(whole, gradients, model)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma-one-kv-biased"])
def test_split_learning_by_hand(name: str) -> None:
    """Bottom, trunk and top on three machines: the activations go up without a graph, their gradients come down.

    Each has its own copy of a tied embedding, so its gradient is the sum of the two.
    """
    whole = bundle(name)
    stages = [whole.stage(layers=ends, trainable=True) for ends in ((0, 1), (1, 3), (3, 4))]
    model = load_original(checkpoint(name))
    ids = torch.tensor(token_rows(9, 9))
    original_loss(model, ids).backward()

    sent, received = [], []
    x = ids
    for stage in stages:
        x = stage(x)
        sent.append(x)
        x = x.detach().requires_grad_()
        received.append(x)
    next_token_loss(sent[-1], ids).backward()
    for i in (1, 0):
        gradient = received[i].grad
        assert gradient is not None
        sent[i].backward(gradient)

    gradients: dict[str, Tensor] = {}
    for stage in stages:
        for key, parameter in stage.named_parameters():
            assert parameter.grad is not None
            gradients[key] = gradients.get(key, 0) + parameter.grad
    assert_gradients(whole, gradients, model)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_does_not_change_the_bundle(name: str) -> None:
    whole = bundle(name)
    before = digests(whole)
    parts = whole.pipeline(trainable=True)
    ids = torch.tensor(token_rows(9, 9))
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = next_token_loss(parts(ids), ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert digests(whole) == before
    known = expected_logits(name, tuple(ids[0].tolist()))
    assert relative(whole.pipeline()(ids)[0], known) <= TOLERANCE
    assert relative(parts(ids)[0], known) > 100 * TOLERANCE


def test_one_step_is_the_original_s_step() -> None:
    """With a tied table the two uses must add up in one parameter, or the step is another."""
    name = "llama-one-kv-biased-tied"
    model = make_model(name)
    parts = bundle(name).pipeline(trainable=True)
    ids = torch.tensor(token_rows(9, 9))
    for module, loss in ((model, original_loss(model, ids)), (parts, next_token_loss(parts(ids), ids))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert relative(parts(ids), model(input_ids=ids).logits) <= 10 * TOLERANCE


def test_a_tied_table_is_one_parameter() -> None:
    parts = bundle("gpt2").pipeline(trainable=True)
    first, last = parts.stages[0], parts.stages[-1]
    assert first.embedding.token.weight is last.embedding.token.weight  # type: ignore[union-attr]
    names = [name for name, _ in parts.named_parameters() if "token" in name]
    assert names == ["stages.0.embedding.token.weight"]
    apart = [bundle("gpt2").stage(name, trainable=True) for name in ("bottom", "top")]
    assert apart[0].embedding.token.weight is not apart[1].embedding.token.weight  # type: ignore[union-attr]


def test_a_padded_batch_trains_as_its_rows_do() -> None:
    """Padding must not enter a gradient."""
    name = "mistral-window"
    rows = token_rows(9, 4)
    ids, mask = left_padded(rows)
    padded_parts, parts = (bundle(name).pipeline(trainable=True) for _ in range(2))
    logits = padded_parts(ids, attention_mask=mask)
    sum(logits[i, -len(row) :].square().sum() for i, row in enumerate(rows)).backward()
    sum(parts(torch.tensor([row])).square().sum() for row in rows).backward()
    for (key, one), other in zip(padded_parts.named_parameters(), parts.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert relative(one.grad, other.grad) <= 1e-4, key
