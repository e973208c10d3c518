"""The definition of done: at every cut, chained shards compute the results of transformers for each row alone."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.backends.torch import kernels
from splitbundle.backends.torch.pipeline import Pipeline
from splitbundle.backends.torch.stage import Stage, load_stages
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.format.architecture.attention import Attention
from splitbundle.format.architecture.decoder import Architecture, LayerKind
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.architecture.feedforward import Mlp
from splitbundle.format.architecture.norms import Norm
from splitbundle.format.architecture.positions import Alibi, QueryTemperature, Sinusoidal
from splitbundle.format.architecture.rotary import Linear, Llama3, Rotary
from splitbundle.storage.reader import VECTORS
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.reference.golden_vectors import case_lengths
from tests.support.models import (
    BY_PIECES,
    CONFIGURATIONS,
    LAYERS,
    ONE_PER_FAMILY,
    TOLERANCE,
    VOCAB,
    WITHOUT_CACHE,
    bundle,
    checkpoint,
    deviations,
    expected_logits,
    load_original,
    original,
    original_logits,
    original_of,
    relative,
    token_rows,
)
from tests.support.scenarios import Worst, chat, run
from tests.support.tiers import EVERY_FACT, FEW, TWO_PER_FAMILY, USUAL, crossed, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

Cuts = tuple[int, ...]
EVERYWHERE: Final = range(LAYERS + 1)
SINGLE_CUTS: Final[tuple[Cuts, ...]] = tuple((cut,) for cut in EVERYWHERE)
PAIRS_OF_CUTS: Final[tuple[Cuts, ...]] = tuple(itertools.combinations(EVERYWHERE, 2))

STEADY: Final = tuple(name for name in CONFIGURATIONS if name not in BY_PIECES)
"""The configurations for which transformers gives the same results in any pieces."""
HARDEST: Final = tuple(name for name in ONE_PER_FAMILY if name not in BY_PIECES)
two_per_family = pytest.mark.parametrize("name", thinned(STEADY, TWO_PER_FAMILY))
ONE_EACH: Final = frozenset(name for name in HARDEST if name in USUAL)
few = pytest.mark.parametrize("name", thinned(STEADY, FEW))
few_families = pytest.mark.parametrize("name", thinned(HARDEST, FEW))


@cache
def stage(name: str, start: int, stop: int, embeds: bool, head: bool) -> Stage:
    """Load a layer range of the named model once."""
    selection = bundle(name).select(layers=(start, stop), embeds=embeds, head=head)
    return load_stages(bundle(name), [selection])[0]


@cache
def chain(name: str, cuts: Cuts) -> Pipeline:
    """Load stages that meet at ``cuts``. The first may only embed, and the last may be only the head."""
    edges = (0, *cuts, LAYERS)
    ranges = list(itertools.pairwise(edges))
    last = len(ranges) - 1
    return Pipeline([stage(name, *ends, i == 0, i == last) for i, ends in enumerate(ranges)])


# Every cut and every pair of cuts, with stages called by hand.


@pytest.mark.rule("SB-B-004", "SB-B-014", "SB-C-001")
@pytest.mark.parametrize(
    ("number", "name"),
    crossed([1, 2], STEADY, kept=lambda number, name: name in FEW or (name in ONE_EACH and number == 1)),
)
def test_prefill_and_decoding_at_every_cut(name: str, number: int) -> None:
    """One call runs without a cache; then a prefill and single tokens run with one.

    The rows pass every small window.
    """
    rows = token_rows(12, 12)
    expected = torch.stack([expected_logits(name, tuple(row)) for row in rows])
    ids = torch.tensor(rows)
    worst = Worst(name)
    for cuts in itertools.combinations(EVERYWHERE, number):
        stages: list[Stage] = list(chain(name, cuts).stages)  # type: ignore[arg-type]
        x = ids
        for part in stages:
            x = part(x)
        worst.see(x.flatten(0, 1), expected.flatten(0, 1), f"cuts {cuts}, prefill")
        caches = [part.cache(len(rows), 12) for part in stages]
        for start, stop in itertools.pairwise((0, 7, 8, 9, 10, 11, 12)):
            x = ids[:, start:stop]
            for part, kept in zip(stages, caches, strict=True):
                x = part(x, past=[start] * len(rows), cache=kept)
            wanted = expected[:, start:stop]
            worst.see(x.flatten(0, 1), wanted.flatten(0, 1), f"cuts {cuts}, positions {start} to {stop}")
    worst.check()


@pytest.mark.rule("SB-B-014", "SB-C-001")
@two_per_family
def test_hidden_states_at_every_cut(name: str) -> None:
    """The residual stream of the original crosses a boundary, so another runtime may take it from there."""
    model = original(name)
    ids = token_rows(11, seed=3)[0]
    layers = model.get_submodule(FAMILIES[CONFIGURATIONS[name][0]].modules)
    hidden: list[Tensor] = []

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple | list) else output)

    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    original_logits(model, ids)
    for hook in hooks:
        hook.remove()
    worst = Worst(name)
    for cut in EVERYWHERE:
        got = stage(name, 0, cut, True, False)(torch.tensor([ids]))
        worst.see(got[0], hidden[cut][0], f"hidden before layer {cut}")
    worst.check()


# Long scenarios: see scenarios.py.


PARTS: Final = ("one", "the others")


def run_scenarios(name: str, part: str, everywhere: Sequence[Cuts]) -> None:
    """All scenarios at one of the cuts, each model at another one, or at the others."""
    own = everywhere[list(CONFIGURATIONS).index(name) % len(everywhere)]
    worst = Worst(name)
    for cuts in everywhere:
        if (cuts == own) == (part == "one"):
            run(chain(name, cuts), worst, f"cuts {cuts}")
    worst.check()


@pytest.mark.rule("SB-B-003", "SB-B-004", "SB-B-005", "SB-B-006", "SB-B-007", "SB-B-008")
@pytest.mark.parametrize(
    ("part", "name"),
    crossed(PARTS, STEADY, kept=lambda part, name: name in FEW or (name in ONE_EACH and part == "one")),
)
def test_scenarios_at_every_cut(name: str, part: str) -> None:
    """Pieces, padding, rollback, reordering, last logits: in every configuration, uncut and at every cut."""
    run_scenarios(name, part, ((), *SINGLE_CUTS))


@pytest.mark.rule("SB-B-006", "SB-B-014")
@pytest.mark.parametrize(
    ("part", "name"), crossed(PARTS, HARDEST, kept=lambda part, name: name in FEW and part == "one")
)
def test_scenarios_at_every_pair_of_cuts(name: str, part: str) -> None:
    """The same with two boundaries, in the configuration of each family that has the most ways to go wrong."""
    run_scenarios(name, part, PAIRS_OF_CUTS)


@pytest.mark.rule("SB-B-006", "SB-B-008")
@pytest.mark.parametrize(
    ("seed", "name"),
    crossed(
        range(2), STEADY, kept=lambda seed, name: name in FEW or (name in HARDEST and name not in ONE_EACH and not seed)
    ),
)
def test_random_conversations(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls, rollbacks and reorderings come in a random order; once with the products of large weights."""
    monkeypatch.setattr(kernels, "SMALL", 0 if seed else kernels.SMALL)
    chance = random.Random(f"{name} {seed}")
    worst = Worst(name)
    cuts = chance.choice((*SINGLE_CUTS, *PAIRS_OF_CUTS))
    chat(chain(name, cuts), worst, f"cuts {cuts}", chance)
    worst.check()


@two_per_family
def test_the_reference_agrees_with_itself(name: str) -> None:
    """transformers in pieces with its cache differs from transformers at once by noise that the tolerance allows."""
    if name == "mistral-narrow-tied":
        pytest.skip("transformers fails with a cache and a window of one")
    if CONFIGURATIONS[name][0] in WITHOUT_CACHE:
        pytest.skip("transformers has no cache for this family")
    row = token_rows(13, seed=1)[0]
    pieces = original_logits(original(name), row, pieces=(3, 1, 7, 2))
    assert relative(pieces, expected_logits(name, tuple(row))) <= TOLERANCE / 2


# Above the threshold of a scaling by length, pieces and the whole differ, in transformers too.


@pytest.mark.rule("SB-C-031")
@pytest.mark.parametrize("name", sorted(BY_PIECES))
@pytest.mark.parametrize("cuts", [(), (2,), (1, 3)])
def test_rows_that_outgrow_a_threshold(name: str, cuts: Cuts) -> None:
    """Compare each row with a new model driven in that row's own pieces.

    Ragged rows pass the threshold in different calls.
    """
    worst = Worst(name)
    pipeline = chain(name, cuts)
    for calls in ([[13] * 4], [[3] * 4, [1] * 4, [7] * 4, [2] * 4], [[3, 9, 0, 12], [1] * 4, [0, 3, 7, 1], [6] * 4]):
        rows = token_rows(*(sum(call[i] for call in calls) for i in range(4)), seed=8)
        session = pipeline.session(4, 40)
        left, got = [list(row) for row in rows], [torch.zeros(0, VOCAB) for _ in rows]
        for call in calls:
            width = max(call)
            ids, mask = torch.zeros(2, 4, width, dtype=torch.int64)
            for i, count in enumerate(call):
                ids[i, width - count :] = torch.tensor(left[i][:count], dtype=torch.int64)
                mask[i, width - count :] = 1
                left[i] = left[i][count:]
            logits = pipeline(ids, attention_mask=mask, session=session)
            got = [
                torch.cat((before, logits[i, width - n :])) for i, (before, n) in enumerate(zip(got, call, strict=True))
            ]
        for i, row in enumerate(rows):
            pieces = [call[i] for call in calls if call[i]]
            expected = original_logits(load_original(checkpoint(name)), row, pieces=pieces)
            worst.see(got[i], expected, f"cuts {cuts}, row {i} in {pieces}")
        with pytest.raises(BundleError, match=r"\[session.rollback\]"):
            session.rollback([past - 1 for past in session.past])
        session.rollback(session.past)  # all of a row may go
    worst.check()


# Tests that a mistake would be visible.


def mistakes(facts: Architecture) -> dict[str, Architecture]:
    """Change one fact of the architecture, for every fact that no shape fixes and that shows in one row."""
    kinds = [facts.layer_kinds[name] for name in dict.fromkeys(facts.layers)]
    made: dict[str, Architecture] = {}

    def in_kinds(what: str, change: Callable[[LayerKind], LayerKind]) -> None:
        changed = {name: change(kind) for name, kind in facts.layer_kinds.items()}
        if changed != facts.layer_kinds:
            made[what] = replace(facts, layer_kinds=changed)

    def in_attention(what: str, change: Callable[[Attention], Attention]) -> None:
        in_kinds(what, lambda kind: replace(kind, attention=change(kind.attention)))

    def in_position(what: str, of: type, change: Callable[[Any], Any]) -> None:
        def other(attention: Attention) -> Attention:
            position = attention.position
            return replace(attention, position=change(position)) if isinstance(position, of) else attention

        in_attention(what, other)

    def in_experts(what: str, change: Callable[[Experts], Experts]) -> None:
        in_kinds(what, lambda kind: replace(kind, mlp=change(kind.mlp)) if isinstance(kind.mlp, Experts) else kind)

    def in_norms(what: str, change: Callable[[Norm], Norm]) -> None:
        changed = {name: replace(kind, norm=change(kind.norm)) for name, kind in facts.layer_kinds.items()}
        norm = None if facts.head.norm is None else change(facts.head.norm)
        made[what] = replace(facts, layer_kinds=changed, head=replace(facts.head, norm=norm))

    narrow = any(kind.attention.window == 1 for kind in kinds)  # a token that sees only itself has no weights to change
    if not narrow:
        in_attention("scale", lambda a: replace(a, scale=a.scale * 1.02))
        in_position("base", Rotary, lambda p: replace(p, base=p.base * 1.3) if p.dim > 2 else p)
        in_position("scaling", Rotary, lambda p: replace(p, scaling=Linear(factor=1.7)))
        in_position("layout", Rotary, lambda p: replace(p, layout=OTHER_LAYOUT[p.layout]) if p.dim > 2 else p)
        in_position("ramp", Rotary, _ramp)
        in_position("bias", Alibi, lambda p: replace(p, max_bias=p.max_bias + 0.5))
        in_position("bias multiplier", Alibi, lambda p: replace(p, multiplier=p.multiplier * 1.05))
    in_attention("window", lambda a: replace(a, window=a.window + 1) if a.window and a.window < 12 else a)
    in_attention("no window", lambda a: replace(a, window=None) if a.window and a.window < 12 else a)
    in_attention("chunk", lambda a: replace(a, chunk=a.chunk + 1) if a.chunk and a.chunk < 12 else a)
    in_attention("no chunk", lambda a: replace(a, chunk=None) if a.chunk and a.chunk < 12 else a)
    in_attention("clip", lambda a: replace(a, clip=a.clip * 1.1) if a.clip else a)
    in_attention("score cap", lambda a: replace(a, logit_cap=a.logit_cap * 1.05) if a.logit_cap else a)
    in_attention("temperature", lambda a: replace(a, query_temperature=None) if _is_felt(a.query_temperature) else a)
    in_attention("temperature's offset", _other_offset)
    in_attention("q/k norm", _norm_later)
    in_kinds("activation", _other_activation)
    if kinds[0].placement not in ("output", "sandwich"):  # where a norm of the sum takes it away
        in_experts("another scale of the router", lambda e: _routed(e, scale=e.router.scale * 1.02))
    in_experts("one more expert", lambda e: replace(e, per_token=e.per_token + 1) if _can_grow(e) else e)
    in_experts("an offset", lambda e: replace(e, up_offset=1.0 - e.up_offset))
    in_experts("a clamp", lambda e: replace(e, clamp=0.05))
    in_experts("weighed inputs", lambda e: _routed(e, weighs="output" if e.router.weighs == "input" else "input"))
    in_kinds("residual", lambda kind: replace(kind, residual_multiplier=kind.residual_multiplier * 1.02))
    in_norms("norm kind", lambda norm: replace(norm, kind=OTHER_NORM[norm.kind]))
    if kinds[0].norm.affine:
        in_norms("weight offset", lambda norm: replace(norm, weight_offset=1.0 - norm.weight_offset))
    if kinds[0].norm.eps > 1e-4:
        in_norms("eps", lambda norm: replace(norm, eps=norm.eps / 10))
    if facts.embedding.norm is None:  # which would take it away again
        multiplier = facts.embedding.multiplier * 1.02
        made["multiplier"] = replace(facts, embedding=replace(facts.embedding, multiplier=multiplier))
    position = facts.embedding.position
    if isinstance(position, Sinusoidal):
        other = replace(position, offset=position.offset + 1)
        made["offset"] = replace(facts, embedding=replace(facts.embedding, position=other))
    made["logits"] = replace(facts, head=replace(facts.head, multiplier=facts.head.multiplier * 1.02))
    if facts.head.logit_cap is not None:
        made["cap"] = replace(facts, head=replace(facts.head, logit_cap=facts.head.logit_cap * 1.05))
    reversed_layers = replace(facts, layers=facts.layers[::-1])
    if reversed_layers != facts and reversed_layers.unit_tensors() == facts.unit_tensors():
        made["layers"] = reversed_layers
    return made


def _routed(experts: Experts, **changes: Any) -> Experts:
    own = experts.router
    if "weighs" in changes and own.normalised and experts.per_token == 1:  # the weight is 1
        return experts
    return replace(experts, router=replace(own, **changes))


def _can_grow(experts: Experts) -> bool:
    """Whether a further expert would have a weight of its own."""
    return (
        experts.per_token < experts.count and experts.router.groups is None and experts.router.function != "sparsemixer"
    )


OTHER_LAYOUT: Final = {"half": "interleaved", "interleaved": "half"}
OTHER_NORM: Final = {"layer_norm": "rms_norm", "rms_norm": "layer_norm"}


def _ramp(position: Rotary) -> Rotary:
    scaling = position.scaling
    if isinstance(scaling, Llama3):
        return replace(position, scaling=replace(scaling, original_positions=scaling.original_positions + 1))
    return position


def _is_felt(temperature: QueryTemperature | None) -> bool:
    return temperature is not None and temperature.original_positions < 12


def _norm_later(attention: Attention) -> Attention:
    norm = attention.query_key_norm
    if norm is None or norm.width == "full" or not isinstance(attention.position, Rotary):
        return attention
    if not norm.norm.affine:  # rotation changes no norm: without a weight, before and after are the same
        return replace(attention, query_key_norm=None)
    return replace(attention, query_key_norm=replace(norm, after_rotation=not norm.after_rotation))


def _other_offset(attention: Attention) -> Attention:
    own = attention.query_temperature
    if own is None or not _is_felt(own):
        return attention
    return replace(attention, query_temperature=replace(own, offset=own.offset + 1))


def _other_activation(kind: LayerKind) -> LayerKind:
    if kind.mlp.activation == "xielu":  # which has tensors of its own
        return kind
    if isinstance(kind.mlp, Experts) and kind.mlp.gate_slope != 1:
        return replace(kind, mlp=replace(kind.mlp, gate_slope=kind.mlp.gate_slope * 1.05))
    return replace(kind, mlp=replace(kind.mlp, activation="relu" if kind.mlp.activation == "silu" else "silu"))


@few
def test_a_wrong_fact_shows(name: str) -> None:
    """A small change of each fact moves the logits by more than the tolerance, so the tests above can fail."""
    ids = torch.tensor(token_rows(13, seed=1))
    known = expected_logits(name, tuple(ids[0].tolist()))
    whole = bundle(name)
    for what, facts in mistakes(whole.architecture).items():
        wrong = Bundle(whole.path, whole.manifest, facts, whole.id)
        selection = wrong.select(layers=(0, LAYERS))
        difference = relative(load_stages(wrong, [selection])[0](ids)[0], known)
        assert difference > 5 * TOLERANCE, f"{what}: {difference:.3g}"


@few
def test_a_wrong_tensor_shows(name: str) -> None:
    """Rolling the rows of each tensor by one moves the logits by more than the tolerance."""
    ids = torch.tensor(token_rows(13, seed=1))
    pipeline = bundle(name).pipeline(trainable=True).requires_grad_(False)
    known = pipeline(ids)
    for what, parameter in pipeline.named_parameters():
        found = re.search(r"layers\.(\d+)\.", what.partition("stages.")[2].partition(".")[2])
        attention = bundle(name).architecture.kind_of(int(found[1]) if found else 0).attention
        plain = not isinstance(attention.position, Rotary) and attention.query_key_norm is None and not attention.clip
        if what.endswith("key.bias") and plain:
            continue  # without rotations it adds the same to every key's score, which changes nothing
        if parameter.numel() == 1:
            continue  # no rows to roll
        mlp = bundle(name).architecture.kind_of(int(found[1]) if found else 0).mlp
        if "mlp.router" in what and _is_indifferent(mlp, what):
            continue
        if attention.window == 1 and ("query" in what or "key" in what):
            continue  # a token that sees only itself has no weights to change
        kept = parameter.detach().clone()
        # A router may choose the same experts for these tokens with its corrections rolled by one.
        steps = range(1, len(kept)) if what.endswith("router.correction") else [1]
        difference = 0.0
        for step in steps:
            parameter.copy_(kept.roll(step, dims=0 if len(kept) > 1 else 1))
            difference = max(difference, relative(pipeline(ids), known))
        parameter.copy_(kept)
        assert difference > 5 * TOLERANCE, f"{what}: {difference:.3g}"
    assert torch.equal(pipeline(ids), known)


def _is_indifferent(mlp: Mlp | Experts, what: str) -> bool:
    """Whether rolling a router's tensor may choose the same experts, with the same weights."""
    if isinstance(mlp, Mlp):
        return False
    everything, one = mlp.per_token == mlp.count, mlp.per_token == 1 and mlp.router.normalised
    return one or (everything and not what.endswith("weight"))


# Weights in 16 bits.

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "source", "name"),
    crossed(
        ["keep", "float32", "bfloat16", "float16"],
        ["float32", "bfloat16"],
        HARDEST,
        kept=lambda dtype, source, name: name in FEW and (source == "float32") == (dtype == "bfloat16"),
    ),
)
def test_stored_dtypes(name: str, source: str, dtype: str, tmp_path: Path) -> None:
    """Weights are rounded once, to the asked dtype.

    Computing in float32 from them equals the original with these weights.
    """
    path = checkpoint(name, source)
    converted = splitbundle_converter.convert(path, tmp_path / "b.splitbundle", split=(1, 3), dtype=dtype, check=False)
    stored = source if dtype == "keep" else dtype
    assert converted.manifest.storage.dtype == stored
    assert not converted.manifest.storage.exceptions
    dtypes = {tensor.dtype for unit in converted.manifest.units for tensor in map_tensors(converted, unit).values()}
    assert dtypes == {DTYPES[stored]}
    row = token_rows(13, seed=1)[0]
    expected = original_logits(original_of(path, DTYPES[stored]), row)
    worst = Worst(f"{name}, {source} stored as {stored}")
    worst.see(converted.pipeline(dtype="float32")(torch.tensor([row]))[0], expected, "prefill")
    worst.check()


@pytest.mark.rule("SB-G-002")
@few_families
def test_golden_vectors_hold_the_rounded_weights(name: str, tmp_path: Path) -> None:
    """The converter's own check compares the stored weights: rounding isn't an error, but any other difference is."""
    for dtype in ("bfloat16", "float16"):
        path = tmp_path / f"{dtype}.splitbundle"
        converted = splitbundle_converter.convert(checkpoint(name), path, split=(2,), dtype=dtype)
        assert max(difference.relative for difference in converted.run_vectors()) <= TOLERANCE
        golden = map_tensors(converted, VECTORS)
        model = original_of(checkpoint(name), DTYPES[dtype])
        for case in range(len(case_lengths(converted.architecture))):
            logits = original_logits(model, golden[f"case.{case}.ids"].tolist())
            assert relative(golden[f"case.{case}.logits"], logits[-1]) <= TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "name"),
    crossed(
        ["bfloat16", "float16"],
        CONFIGURATIONS,
        kept=lambda dtype, name: name in FEW or (name in EVERY_FACT and dtype == "bfloat16"),
    ),
)
def test_computing_in_16_bits(name: str, dtype: str, tmp_path: Path) -> None:
    """The deviation from the float32 answer is like transformers' in the same dtype, in prefill and in decoding.

    The two add in different orders (transformers' eager attention rounds its scores to 16 bits, torch's fused one keeps
    them), so neither is always nearer. The rest is the chance of a few hundred roundings. If one rounding tips a row's
    attention, that row's deviation is twice the other's, so the test limits the rows' geometric mean. With experts, one
    rounding may choose another expert for a token: then that row says nothing, and the test limits the median.
    """
    path, narrow = checkpoint(name), DTYPES[dtype]
    converted = splitbundle_converter.convert(path, tmp_path / "b.splitbundle", split=(2,), dtype=dtype, check=False)
    pipeline = converted.pipeline()
    assert {stage.dtype for stage in pipeline.stages} == {narrow}
    rows = token_rows(*[13] * 6, seed=1)
    ids = torch.tensor(rows)
    session = pipeline.session(len(rows), ids.shape[1])
    pieces = [4] + [1] * 9
    ours = {
        "prefill": pipeline(ids),
        "decoding": torch.cat([pipeline(piece, session=session) for piece in ids.split(pieces, dim=1)], dim=1),
    }

    def computed(load: Callable[[], Any], pieces: list[int] | None) -> Tensor:
        if pieces is None:
            model = load()
            return torch.stack([original_logits(model, row) for row in rows])
        return torch.stack([original_logits(load(), row, pieces) for row in rows])  # they depend on earlier lengths

    def reference(pieces: list[int] | None) -> tuple[Tensor, Tensor]:
        known = computed(lambda: original_of(path, narrow), pieces)
        return known, deviations(computed(lambda: load_original(path, narrow), pieces), known)

    whole = reference(None)
    for what, got in ours.items():
        known, allowed = reference(pieces) if what == "decoding" and name in BY_PIECES else whole
        assert got.dtype == narrow
        ratios = (deviations(got, known) / allowed).log()
        ratio = float((ratios.median() if "router" in str(pipeline) else ratios.mean()).exp())
        print(f"{name}, {dtype}, {what}: {ratio:.2f} of transformers' own deviation")
        assert ratio <= 1.25, what
