"""Plans of whole and of partial bundles, and cuts that are made by size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.planning.costs import bundle_costs
from splitbundle.planning.plan import DEFAULT_CONTEXT
from splitbundle.records import replace
from tests.support.models import bundle as model
from tests.support.paths import ROOT, TESTS

CHECKPOINT = ROOT / "examples" / "license-gpt2"
FIELDS = {
    *("name", "layers", "embeds", "head", "bytes", "parameters", "flops_per_token", "attention", "weight_bytes"),
    *("cache_bytes_per_token", "boundary_bytes_per_token", "boundary_bytes_per_row"),
    *("flops_per_token_at_context", "memory_bytes"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("plan") / "license.splitbundle"
    return splitbundle_converter.convert(CHECKPOINT, output, split=[2, 4], check=False)


def test_the_present_shards(bundle: Bundle) -> None:
    plan = bundle.plan(context=10, batch=3, dtype="float16")
    assert (plan.context, plan.batch, plan.dtype, plan.cuts, plan.proposed) == (10, 3, "float16", None, None)
    costs = bundle_costs(bundle.manifest, bundle.architecture, "float16")
    assert [planned.name for planned in plan.shards] == [shard.name for shard in bundle.shards]
    for planned, own in zip(plan.shards, costs.of_shards((2, 4)), strict=True):
        assert planned.costs == own
        assert planned.memory_bytes == 2 * own.parameters + 30 * own.cache_bytes_per_token
        assert planned.flops_per_token_at_context == own.flops_per_token_at(10)
        assert planned.use_percent is None


def test_the_default_context(bundle: Bundle) -> None:
    assert bundle.plan().context == 256  # the model's own
    assert model("llama").plan().context == 64
    longer = model("llama")
    for stated, context in ((None, DEFAULT_CONTEXT), (131_072, DEFAULT_CONTEXT), (2048, 2048)):
        manifest = replace(longer.manifest, model=replace(longer.manifest.model, context_length=stated))
        assert Bundle(longer.path, manifest, longer.architecture, longer.id).plan().context == context
    assert longer.plan(context=100_000).context == 100_000  # rotary positions have no end


def test_a_plan_for_machines(bundle: Bundle) -> None:
    plan = bundle.plan(machines=[3_000_000, 4_000_000], batch=2)
    assert plan.proposed is not None
    assert [shard.capacity_bytes for shard in plan.proposed] == [3_000_000, 4_000_000]
    for shard in plan.proposed:
        assert shard.capacity_bytes is not None
        assert shard.memory_bytes <= shard.capacity_bytes
        assert shard.use_percent is not None
        assert 0 <= shard.use_percent * shard.capacity_bytes - 100 * shard.memory_bytes < shard.capacity_bytes
    with pytest.raises(BundleError, match=r"\[usage.size\] machines: expected more memory"):
        bundle.plan(machines=[3_000_000, 4_000_000], batch=200)


def test_the_json_of_a_plan_has_plain_values(bundle: Bundle) -> None:
    document = bundle.plan(machines=[10**9, 10**9]).as_json()
    again = json.loads(json.dumps(document))
    assert set(again) == {"context", "batch", "dtype", "shards", "cuts", "proposed"}
    assert {frozenset(shard) for shard in again["shards"]} == {frozenset(FIELDS)}
    assert {frozenset(shard) for shard in again["proposed"]} == {frozenset({*FIELDS, "capacity_bytes", "use_percent"})}
    numbers = {type(value) for shard in again["shards"] for name, value in shard.items() if "_" in name}
    assert numbers == {int}
    kinds = {"kind", "layers", "flops_per_token_and_position", "most_positions"}
    assert set(again["shards"][0]["attention"][0]) == kinds


def test_a_partial_bundle_is_planned_from_its_documents(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("manifest.json", "architecture.json"):
        shutil.copy(bundle.path / name, tmp_path / name)
    assert splitbundle.open(tmp_path).plan(equal=4) == bundle.plan(equal=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"equal": 9}, r"\[usage.cut\] equal: expected 1 to 8 shards"),
        ({"max_shard_size": 1}, r"\[usage.size\] max_shard_size: expected at least 451,456 bytes"),
        ({"machines": []}, r"\[usage.cut\] machines: expected 1 to 8 machines"),
        ({"equal": 2, "machines": [1]}, r"\[usage.cut\] machines: expected at most one of equal, max_shard_size, mach"),
        ({"context": 0}, r"\[input.value\] context: expected 1 to 256, the positions of the model"),
        ({"context": 257}, r"\[input.value\] context: expected 1 to 256, the positions of the model"),
        ({"batch": 0}, r"\[input.value\] batch: expected a number from 1"),
        ({"batch": 1.5}, r"\[input.value\] batch: expected a number from 1"),
        ({"dtype": "float8"}, r"\[input.dtype\] dtype: expected one of float32, float16, bfloat16"),
    ],
)
def test_wrong_calls(arguments: dict[str, object], message: str, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=message):
        bundle.plan(**arguments)  # type: ignore[arg-type]


# Cuts by size, when a bundle is written.


@pytest.mark.parametrize(
    ("asked", "cuts"), [({"equal": 2}, (3,)), ({"equal": 4}, (1, 3, 5)), ({"max_shard_size": 1_260_000}, (2, 4))]
)
def test_convert_and_resplit_make_the_proposed_cuts(
    asked: dict[str, int], cuts: tuple[int, ...], bundle: Bundle, tmp_path: Path
) -> None:
    plan = bundle.plan(**asked)  # type: ignore[arg-type]
    again = splitbundle_converter.resplit(bundle, tmp_path / "again", check=False, **asked)  # type: ignore[arg-type]
    made = splitbundle_converter.convert(CHECKPOINT, tmp_path / "made", check=False, **asked)  # type: ignore[arg-type]
    assert plan.cuts == again.manifest.cuts == made.manifest.cuts == cuts
    assert plan.proposed is not None
    for written in (again, made):
        assert [(shard.name, shard.bytes) for shard in written.shards] == [
            (shard.name, shard.costs.bytes) for shard in plan.proposed
        ]


def test_convert_knows_the_sizes_of_units_in_several_files(tmp_path: Path) -> None:
    """Each file has a header of its own, which counts."""
    made = splitbundle_converter.convert(
        CHECKPOINT, tmp_path / "made", check=False, max_file_size=200_000, max_shard_size=1_000_000, dtype="bfloat16"
    )
    assert made.plan(max_shard_size=1_000_000).cuts == made.manifest.cuts == (3,)
    largest = max(shard.bytes for shard in made.shards)
    for less, cuts in ((0, (3,)), (1, (2, 4))):
        output = tmp_path / f"less-{less}"
        again = splitbundle_converter.convert(
            CHECKPOINT,
            output,
            check=False,
            max_file_size=200_000,
            max_shard_size=largest - less,
            dtype="bfloat16",
        )
        assert again.manifest.cuts == cuts


def test_names_and_refusals_when_a_bundle_is_written(bundle: Bundle, tmp_path: Path) -> None:
    made = splitbundle_converter.resplit(bundle, tmp_path / "named", equal=2, names=["one", "two"], check=False)
    assert [shard.name for shard in made.shards] == ["one", "two"]
    golden = TESTS / "golden" / "v1.0" / "llama.splitbundle"
    for call in (
        lambda **asked: splitbundle_converter.resplit(golden, tmp_path / "x", **asked),
        lambda **asked: splitbundle_converter.convert(CHECKPOINT, tmp_path / "x", **asked),
    ):
        for asked, message in (
            ({"equal": 2, "split": [1]}, r"\[usage.cut\] equal: expected at most one of split, equal, max_shard_size"),
            ({"equal": 2, "max_shard_size": 9}, r"\[usage.cut\] max_shard_size: expected at most one of"),
            ({"equal": 99}, r"\[usage.cut\] equal: expected 1 to \d shards"),
            ({"max_shard_size": 9}, r"\[usage.size\] max_shard_size: expected at least"),
            ({"equal": 2, "names": ["a"]}, r"\[usage.names\] names: expected 2 different names"),
            ({"equal": 2, "names": "ab"}, r"\[usage.names\] names: .*, got the text .ab.\. Give one name"),
        ):
            with pytest.raises(BundleError, match=message):
                call(**asked)
    assert not (tmp_path / "x").exists()
