"""What a deployment on Ray asks of a cluster, and what it refuses before there is one. It needs no Ray."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest

import splitbundle
import splitbundle.ray
from splitbundle.errors import BundleError, MissingExtra
from splitbundle.serving import ray_settings
from splitbundle.serving.ray_settings import PROCESS_BYTES, bounds_of, settings_of, told
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"


@pytest.fixture(scope="module")
def bundle() -> splitbundle.Bundle:
    """A bundle of three shards, of which the one in the middle is an inner one."""
    opened = splitbundle.open(GOLDEN)
    assert [shard.embeds or shard.head for shard in opened.shards] == [True, False, True]
    return opened


def settings(bundle: splitbundle.Bundle, options: dict[str, Any] | None = None, **given: Any) -> Any:
    usual: dict[str, Any] = {"stages": "actors", "rows": 4, "context": 16, "backend": "torch", "cpus": 2, "gpus": None}
    usual |= {"timeout": 5, "step_timeout": 5}
    return settings_of(bundle, str(GOLDEN), **{**usual, **given}, options=options or {})


def test_each_process_asks_for_its_own_memory(bundle: splitbundle.Bundle) -> None:
    first, middle, last = (shard.memory_bytes for shard in bundle.plan(context=16, batch=4).shards)
    made = settings(bundle)
    assert made.actors == (bundle.shards[1].name,)
    assert made.own == (bundle.shards[0].name, bundle.shards[2].name)
    assert made.bundles == (
        {"CPU": 2.0, "memory": float(first + last + PROCESS_BYTES)},
        {"CPU": 2.0, "memory": float(middle + PROCESS_BYTES)},
    )
    inside = settings(bundle, stages="inside")
    assert inside.actors == ()
    assert inside.bundles == ({"CPU": 2.0, "memory": float(first + middle + last + PROCESS_BYTES)},)


@pytest.mark.parametrize(
    ("device", "gpus", "wanted"),
    [(None, None, None), ("cuda", None, 1.0), ("cuda:0", 0.5, 0.5), ("cpu", None, None), ("cuda", 0, None)],
)
def test_a_process_on_a_gpu_asks_for_one(bundle: splitbundle.Bundle, device: Any, gpus: Any, wanted: Any) -> None:
    made = settings(bundle, {"device": device}, gpus=gpus)
    assert [each.get("GPU") for each in made.bundles] == [wanted, wanted]


def test_resources_are_told_in_words() -> None:
    assert told({"CPU": 1.0, "GPU": 0.5, "memory": 536870912.0}) == "1 CPU and 0.5 GPU and 0.54 GB of memory"
    assert told({"node:10.0.0.1": 1.0}) == "nothing"


@pytest.mark.parametrize(("given", "wanted"), [(1, (1, 1)), (3, (3, 3)), ((1, 4), (1, 4)), ([2, 2], (2, 2))])
def test_bounds_of_replicas(given: Any, wanted: tuple[int, int]) -> None:
    assert bounds_of(given) == wanted


@pytest.mark.parametrize("given", [0, -1, 1.5, "2", "12", (2, 1), (1, 2, 3), (), None, (0, 1)])
def test_wrong_bounds_of_replicas(given: Any) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] replicas"):
        bounds_of(given)


@pytest.mark.parametrize(
    ("given", "code", "argument"),
    [
        ({"stages": "outside"}, "input.value", "stages"),
        ({"rows": 0}, "input.value", "rows"),
        ({"context": 0}, "input.value", "context"),
        ({"cpus": 0}, "input.value", "cpus"),
        ({"gpus": -1}, "input.value", "gpus"),
        ({"timeout": 0}, "input.value", "timeout"),
        ({"step_timeout": "1"}, "input.value", "step_timeout"),
        ({"backend": "tensorflow"}, "stage.backend", "backend"),
    ],
)
def test_wrong_arguments(bundle: splitbundle.Bundle, given: dict[str, Any], code: str, argument: str) -> None:
    with pytest.raises(BundleError) as caught:
        settings(bundle, **given)
    assert (caught.value.codes, caught.value.problems[0].argument) == ((code,), argument)


def test_actors_need_a_shard_in_the_middle(bundle: splitbundle.Bundle, tmp_path: Any) -> None:
    import splitbundle_converter

    whole = splitbundle_converter.resplit(GOLDEN, tmp_path / "two.splitbundle", split=[1])
    with pytest.raises(BundleError, match=r'\[stage.range\] stages: .* or choose stages="inside"'):
        settings(whole)
    assert settings(whole, stages="inside").own == tuple(shard.name for shard in whole.shards)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("ray_cluster", "ray_deployment"):
        monkeypatch.delitem(sys.modules, f"splitbundle.serving.{name}", raising=False)
    package = importlib.import_module("splitbundle.serving")
    for name in ("ray_cluster", "ray_deployment"):
        monkeypatch.delattr(package, name, raising=False)
    with pytest.raises(MissingExtra, match=r'pip install "splitbundle\[ray\]"'):
        splitbundle.ray.deploy(GOLDEN)
    assert ray_settings.ACTORS == "actors"
