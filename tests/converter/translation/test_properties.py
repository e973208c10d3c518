"""Properties of every model at every depth and cut. Depths, cuts and damage are drawn at random.

Each test draws the same examples in every run, other ones for every configuration, and beginning with the simplest.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import pytest
import torch
from hypothesis import Phase, assume, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.format.manifest.document import expand
from splitbundle_converter.checkpoint.source import Checkpoint
from splitbundle_converter.families.configuration import read_configuration
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.translation.restore import join
from splitbundle_converter.translation.translate import Translation, translate
from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY, checkpoint, make_model, scratch, token_rows
from tests.support.tiers import FEW, USUAL, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

DEEPEST: Final = 9
DEPTHS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def for_examples(
    name: str, number: int, **drawn: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Call the decorated function with ``number`` examples, which depend only on ``name``.

    A failing one isn't made smaller: the first are the smallest, and a model is made for each.
    """
    fixed = settings(max_examples=number, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    return lambda holds: seed(zlib.crc32(name.encode()))(fixed(given(**drawn)(holds)))


def of_depth(name: str, layers: int) -> dict[str, Any]:
    """Return the changes that give a named configuration ``layers`` layers. Lists by layer repeat."""
    fields = CONFIGURATIONS[name][1]
    changes: dict[str, Any] = {depth: layers for depth in DEPTHS if depth in fields}
    assert len(changes) == 1, name
    if "moe_layers" in fields:
        changes["moe_layers"] = [layer for layer in fields["moe_layers"] if layer < layers]
    for listed in (
        "layer_types",
        "mlp_layer_types",
        "no_rope_layers",
        "layer_rope_theta",
        "num_attention_heads_per_layer",
    ):
        if listed in fields:
            changes[listed] = list(itertools.islice(itertools.cycle(fields[listed]), layers))
    if "attention_types" in fields:
        kinds = [kind for kinds, times in fields["attention_types"] for kind in kinds * times]
        changes["attention_types"] = [[list(itertools.islice(itertools.cycle(kinds), layers)), 1]]
    return changes


@cache
def deep(name: str, layers: int) -> Path:
    """Return the checkpoint of a named configuration with ``layers`` layers."""
    path = scratch() / f"{name}-{layers}-layers"
    make_model(name, **of_depth(name, layers)).save_pretrained(path)
    return path


@st.composite
def cut_models(draw: st.DrawFn) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Draw a depth and two sets of cuts. The cuts 0 and the depth leave a shard without a layer."""
    layers = draw(st.integers(1, DEEPEST))
    cuts = st.sets(st.integers(0, layers)).map(lambda chosen: tuple(sorted(chosen)))
    return layers, draw(cuts), draw(cuts)


def digests(bundle: Bundle) -> dict[str, str]:
    """Return path -> sha256 of every file."""
    files = [path for path in bundle.path.rglob("*") if path.is_file()]
    return {path.relative_to(bundle.path).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_shards(bundle: Bundle, layers: int, cuts: tuple[int, ...]) -> None:
    """Check that shards tile the layers, and that each has the units of its range, computed here in another way."""
    assert bundle.manifest.cuts == cuts
    shards = bundle.shards
    assert [layer for shard in shards for layer in range(*shard.layers)] == list(range(layers))
    assert [shard.layers for shard in shards] == list(itertools.pairwise((0, *cuts, layers)))
    assert [shard.embeds for shard in shards] == [True] + [False] * len(cuts)
    assert [shard.head for shard in shards] == [False] * len(cuts) + [True]
    assert len({shard.name for shard in shards}) == len(shards)
    for shard in shards:
        units = {f"layer-{layer:03d}" for layer in range(*shard.layers)}
        if shard.embeds or (shard.head and bundle.architecture.head.tied):
            units.add("embedding")
        if shard.head:
            units.add("head")
        assert set(shard.units) == units
        assert len(shard.units) == len(units)
    assert {unit for shard in shards for unit in shard.units} == set(bundle.manifest.units)


def check_chains(bundle: Bundle, layers: int, cuts: tuple[int, ...]) -> None:
    """Two stages that meet at any layer compute the same bits as the whole model, for any cuts on disk."""
    ids = torch.tensor(token_rows(6, 6))
    whole = bundle.pipeline()(ids)
    x = ids
    for shard in bundle.shards:
        x = bundle.stage(shard.name)(x)
    assert torch.equal(x, whole)
    x = ids
    for start, stop in itertools.pairwise(sorted({0, *cuts, layers})):
        x = bundle.stage(layers=(start, stop))(x)
    assert torch.equal(x, whole)


def check_restored(bundle: Bundle, source: Path, name: str) -> None:
    """Every tensor of the checkpoint comes back, to the bit."""
    back = dict(splitbundle_converter.source_tensors(bundle))
    stored = load_file(source / "model.safetensors")
    assert back.keys() == stored.keys()
    for key, tensor in stored.items():
        assert back[key].dtype == tensor.dtype, key
        assert torch.equal(back[key], tensor), key


def learned(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the tensors without the constants of the family, which are dropped."""
    endings = tuple(pattern.rpartition("{layer}")[2] for pattern in FAMILIES[CONFIGURATIONS[name][0]].constants)
    return {key: tensor for key, tensor in tensors.items() if not (endings and key.endswith(endings))}


@pytest.mark.rule("SB-I-004")
@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, FEW))
def test_any_cuts_of_any_depth(name: str) -> None:
    """Shards tile the model, and the fingerprint stays. A resplit equals a conversion at those cuts, byte by byte."""

    @for_examples(name, 3, drawn=cut_models())
    def holds(drawn: tuple[int, tuple[int, ...], tuple[int, ...]]) -> None:
        layers, cuts, others = drawn
        source = deep(name, layers)
        with TemporaryDirectory(dir=scratch()) as folder:
            here = Path(folder)
            made = splitbundle_converter.convert(source, here / "made", split=cuts, check=False)
            other = splitbundle_converter.convert(source, here / "other", split=others, check=False)
            again = splitbundle_converter.resplit(made, here / "again", split=others)
            check_shards(made, layers, cuts)
            check_shards(again, layers, others)
            of_made, of_other = digests(made), digests(other)
            assert digests(again) == of_other
            assert made.fingerprint == other.fingerprint == again.fingerprint
            assert (made.id == other.id) == (cuts == others)
            files = made.manifest.weight_files()
            assert files == other.manifest.weight_files()
            assert [of_made[path] for path in files] == [of_other[path] for path in files]
            check_chains(made, layers, others)
            check_restored(made, source, name)

    holds()


def translated(source: Checkpoint) -> Translation:
    """Return the translation of a checkpoint."""
    judged = read_configuration(source.configuration())
    return translate(source, judged.family, judged.architecture)


@pytest.mark.parametrize("name", thinned(CONFIGURATIONS, USUAL))
def test_names_map_there_and_back(name: str) -> None:
    """Every number of the source has one place in the bundle, and every tensor of the bundle has one origin."""

    @for_examples(name, 3, layers=st.integers(1, DEEPEST))
    def holds(layers: int) -> None:
        source = Checkpoint(deep(name, layers), name=name)
        judged = read_configuration(source.configuration())
        table, architecture = translate(source, judged.family, judged.architecture), judged.architecture
        entries = [entry for row in table.source_names for entry in expand(row, layers)]
        names = [tensor for entry in entries for tensor in entry.tensors]
        assert len(set(names)) == len(names)
        assert set(names) == set(table.origins) == set(architecture.tensors())
        sources: list[str] = []
        with source.reader() as reader:
            for entry in entries:
                tensors = {tensor: table.origins[tensor].extract(reader) for tensor in entry.tensors}
                assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
                    key: architecture.tensors()[key] for key in tensors
                }
                for stored, tensor in join(entry, tensors.__getitem__).items():
                    assert torch.equal(tensor, reader.get(stored)), stored
                    sources.append(stored)
        assert len(set(sources)) == len(sources)
        assert set(sources) == set(learned(source.tensors, name))

    holds()


# A table that is off by one tensor.

LETTERS: Final = "abcdefghijklmnopqrstuvwxyz0123456789._"


def problems(source: Checkpoint) -> list[Any]:
    """Return the problems of a checkpoint whose headers were changed."""
    with pytest.raises(BundleError) as caught:
        translated(source)
    assert set(caught.value.codes) == {"source.tensor"}
    return list(caught.value.problems)


@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, FEW))
def test_one_wrong_tensor_is_named(name: str) -> None:
    """A tensor that is missing, renamed, added, or of another shape or dtype is refused by its name alone."""
    whole = Checkpoint(checkpoint(name), name=name)
    names = sorted({origin.source for origin in translated(whole).origins.values()})

    @for_examples(name, 25, data=st.data())
    def holds(data: st.DataObject) -> None:
        source = Checkpoint(checkpoint(name), name=name)
        victim = data.draw(st.sampled_from(names), "tensor")
        found = source.tensors[victim]
        missing = f"a tensor {victim!r} of shape {list(found.shape)}"
        match data.draw(st.sampled_from(("missing", "renamed", "added", "shape", "dtype")), "damage"):
            case "missing":
                del source.tensors[victim]
                (problem,) = problems(source)
                assert (problem.expected, problem.got) == (missing, "none")
            case "renamed":
                other = renamed(data, victim)
                assume(other not in source.tensors)
                source.tensors[other] = replace(source.tensors.pop(victim), stored=other)
                first, second = problems(source)
                assert (first.expected, first.got) == (missing, "none")
                assert second.pointer == f"/{other}"
                assert second.got.startswith("an extra tensor")
            case "added":
                other = renamed(data, victim)
                assume(other not in source.tensors)
                source.tensors[other] = replace(found, stored=other)
                (problem,) = problems(source)
                assert problem.pointer == f"/{other}"
            case "shape":
                source.tensors[victim] = replace(found, shape=reshaped(data, found.shape))
                (problem,) = problems(source)
                assert problem.pointer == f"/{victim}"
                assert problem.expected == f"shape {list(found.shape)}"
            case "dtype":
                source.tensors[victim] = replace(found, dtype=data.draw(st.sampled_from(("F64", "I8", "F8_E4M3"))))
                (problem,) = problems(source)
                assert problem.pointer == f"/{victim}"
                assert problem.got == source.tensors[victim].dtype

    holds()


def renamed(data: st.DataObject, name: str) -> str:
    """Return a name with one character changed, inserted or removed. It may become a name of another layer.

    It never becomes ``qweight``, which is refused as quantised.
    """
    place = data.draw(st.integers(0, len(name) - 1), "place")
    into = data.draw(st.sampled_from(("", *LETTERS)), "into")
    other = name[:place] + into + name[place + data.draw(st.integers(0, 1), "replaced") :]
    assume(not other.endswith(".qweight"))
    return other


def reshaped(data: st.DataObject, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return another shape: one dimension changed, one added, or the order reversed."""
    place = data.draw(st.integers(0, len(shape) - 1), "place")
    step = data.draw(st.sampled_from((-1, 1)), "step")
    others = [(*shape[:place], shape[place] + step, *shape[place + 1 :]), (*shape, 1), shape[::-1], (1, *shape)]
    other = data.draw(st.sampled_from(others), "shape")
    assume(other != shape)
    return other
