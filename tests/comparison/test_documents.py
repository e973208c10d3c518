"""Comparing bundles by their documents."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.comparison import documents
from splitbundle.comparison.documents import UnitPair, compare
from splitbundle.comparison.fields import field_changes
from splitbundle.comparison.records import Values
from splitbundle.format.manifest.document import File, identity
from splitbundle.records import replace
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader
from splitbundle.writing.documents import write_documents
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
Call = tuple[BundleReader, BundleReader, Sequence[UnitPair]]


@pytest.fixture
def gpt2() -> splitbundle.Bundle:
    return splitbundle.open(GOLDEN / "gpt2.splitbundle")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "gpt2.splitbundle", tmp_path / "copy.splitbundle"))


def refused(*_: object) -> Mapping[str, Values]:
    """Stands for the comparison of values where no value may be read."""
    raise AssertionError("values were compared")


def rewritten(copy: Path, change: Callable[[splitbundle.Bundle], object]) -> splitbundle.Bundle:
    """Return a bundle with the manifest that ``change`` returns."""
    bundle = splitbundle.open(copy)
    write_documents(copy, change(bundle), bundle.architecture)  # type: ignore[arg-type]
    return splitbundle.open(copy)


def test_fields_are_named_by_pointers() -> None:
    a = {"same": [1], "x/y": {"~": 1, "gone": None}, "list": [1, 2], "one": 1, "null": None}
    b = {"same": [1], "x/y": {"~": 2}, "list": [1, 3], "one": True, "null": None, "new": {"k": 0}}
    found = [(each.pointer, each.a, each.b, each.only_in) for each in field_changes(a, b)]
    assert found == [
        ("/x~1y/~0", 1, 2, None),
        ("/x~1y/gone", None, None, "a"),
        ("/list", [1, 2], [1, 3], None),
        ("/one", 1, True, None),
        ("/new", None, {"k": 0}, "b"),
    ]
    assert list(field_changes(a, a)) == []


def test_a_bundle_and_its_copy(gpt2: splitbundle.Bundle, copy: Path) -> None:
    found = compare(gpt2, splitbundle.open(copy), measure=refused)
    assert (found.relation, found.differs) == ("same_bundle", False)
    assert {name: aspect.differs for name, aspect in found.compared.items()} == dict.fromkeys(
        documents.records.ASPECTS, False
    )


def test_other_cuts(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    other = splitbundle_converter.resplit(gpt2.path, tmp_path / "x.splitbundle", split=[2], names=["client", "server"])
    found = compare(gpt2, other, measure=refused)
    assert (found.relation, found.differs) == ("same_model", True)
    assert found.a.fingerprint == found.b.fingerprint
    assert {name for name, aspect in found.compared.items() if aspect.differs} <= {"cuts", "files", "model"}
    assert found.cuts is not None
    assert (found.cuts.a.cuts, found.cuts.b.cuts) == ((1, 2), (2,))
    assert [shard.name for shard in found.cuts.b.shards] == ["client", "server"]
    assert {shard.variant for shard in found.cuts.a.shards} == {"standard"}
    assert not compare(gpt2, other, only=["weights", "facts", "tokenizer", "vectors"], measure=refused).differs


def test_another_family(gpt2: splitbundle.Bundle) -> None:
    """Only tensors of one shape have values to compare, and layers of one kind state their facts once."""
    other = splitbundle.open(GOLDEN / "llama.splitbundle")
    compared: list[UnitPair] = []

    def measure(a: object, b: object, units: Sequence[UnitPair], progress: object) -> dict[str, Values]:
        compared.extend(units)
        return {}

    found = compare(gpt2, other, only=["facts", "weights"], measure=measure)
    of_a, of_b = gpt2.architecture.tensors(), other.architecture.tensors()
    assert {name for _, _, names in compared for name in names} == {
        name for name in of_a if of_a[name] == of_b.get(name)
    }
    assert found.relation == "other_model"
    assert found.cuts is None
    assert found.facts is not None
    assert found.weights is not None
    changes = {change.pointer: (change.a, change.b) for change in found.facts.changes}
    assert changes["/hidden_size"] == (48, 40)
    assert changes["/head/tied"] == (True, False)
    assert [pointer for pointer in changes if pointer.endswith("/gated")] == ["/layer_kinds/full/mlp/gated"]
    for unit in found.weights.units:
        assert unit.not_compared is None
        assert unit.changes
    embedding = {change.name: change for change in found.weights.units[0].changes}
    assert (embedding["embedding.position.weight"].b, embedding["embedding.position.weight"].values) == (None, None)
    token = embedding["embedding.token.weight"]
    assert token.a is not None
    assert token.b is not None
    assert token.a.shape != token.b.shape


def test_a_changed_tokenizer(gpt2: splitbundle.Bundle, copy: Path) -> None:
    path = "tokenizer/generation_config.json"
    (copy / "tokenizer").mkdir()
    (copy / path).write_bytes(b"{}")

    def change(bundle: splitbundle.Bundle) -> object:
        manifest = bundle.manifest
        listed = File(size=2, sha256=identity(b"{}").removeprefix("sha256:"))
        return replace(
            manifest,
            files=manifest.files | {path: listed},
            text=replace(manifest.text, stop_ids=(7,)),
            extensions={"x": 1},
        )

    found = compare(gpt2, rewritten(copy, change), measure=refused)
    assert found.relation == "same_model"
    assert found.tokenizer is not None
    assert [(each.pointer, each.a, each.b) for each in found.tokenizer.changes] == [("/text/stop_ids", (), (7,))]
    assert [each.path for each in found.tokenizer.files] == [path]
    assert {name for name, aspect in found.compared.items() if aspect.differs} == {"model", "tokenizer", "files"}
    assert found.model is not None
    assert [(each.pointer, each.only_in) for each in found.model.changes if "extensions" in each.pointer] == [
        ("/extensions/x", "b")
    ]


def test_a_parent_and_a_sibling(gpt2: splitbundle.Bundle, copy: Path) -> None:
    def child(name: str, digest: str) -> BundleReader:
        model = replace(gpt2.manifest.model, fingerprint=f"sha256:{digest * 64}", parent=gpt2.fingerprint)
        return BundleReader(copy, replace(gpt2.manifest, model=model), gpt2.architecture, f"sha256:{name * 64}")

    one, other = child("1", "a"), child("2", "b")
    pairs = [(gpt2, one), (one, gpt2), (one, other)]
    found = [compare(a, b, only=["model"], measure=refused) for a, b in pairs]
    assert [each.relation for each in found] == ["b_changed_from_a", "a_changed_from_b", "changed_from_one"]
    assert [each.differs for each in found] == [True, True, False]


def test_a_manifest_that_is_written_differently(gpt2: splitbundle.Bundle, copy: Path) -> None:
    """All aspects are equal, and yet the ids differ. Only a comparison of some aspects says that nothing differs."""
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    other = splitbundle.open(copy)
    found = compare(gpt2, other, measure=refused)
    assert found.differs
    assert not any(aspect.differs for aspect in found.compared.values())
    assert not compare(gpt2, other, only=["cuts", "files"], measure=refused).differs


def test_absent_files_are_no_difference(gpt2: splitbundle.Bundle, copy: Path) -> None:
    (copy / "layer-001.safetensors").unlink()
    found = compare(gpt2, splitbundle.open(copy), measure=refused)
    assert not found.differs
    assert found.files is not None
    assert (found.files.absent_in_a, found.files.absent_in_b) == ((), ("layer-001.safetensors",))


def with_digests(bundle: splitbundle.Bundle, *paths: str) -> BundleReader:
    """Return a bundle whose manifest lists another digest for some files."""
    files = dict(bundle.manifest.files)
    for path in paths:
        files[path] = replace(files[path], sha256="0" * 64)
    return BundleReader(bundle.path, replace(bundle.manifest, files=files), bundle.architecture, "sha256:" + "0" * 64)


def test_which_values_are_compared(gpt2: splitbundle.Bundle, copy: Path) -> None:
    """Those of units with other digests whose files are all here. Without torch, the digests count."""
    (copy / "layer-001.safetensors").unlink()
    other = with_digests(splitbundle.open(copy), "layer-001.safetensors", "layer-002.safetensors")
    calls: list[Call] = []
    value = Values(count=48, differing=2, not_finite=0, largest=0.5, scale=1.0, relative=0.5)

    def measure(
        a: BundleReader, b: BundleReader, units: Sequence[UnitPair], progress: Progress | None
    ) -> dict[str, Values]:
        calls.append((a, b, units))
        return {"layers.2.mlp.down.bias": value}

    weights = compare(gpt2, other, measure=measure).weights
    assert weights is not None
    names = tuple(gpt2.architecture.layer_tensors(2))
    assert calls == [(gpt2, other, [("layer-002", "layer-002", names)])]
    missing, changed = weights.units
    assert (missing.unit, missing.not_compared, missing.changes, missing.differs) == ("layer-001", "absent", (), True)
    assert (changed.unit, changed.layer, changed.not_compared, changed.tensors) == ("layer-002", 2, None, len(names))
    assert [(change.name, change.values) for change in changed.changes] == [("layers.2.mlp.down.bias", value)]

    weights = compare(gpt2, other, measure=lambda *_: None).weights
    assert weights is not None
    assert [unit.not_compared for unit in weights.units] == ["absent", "no_torch"]
    assert weights.differs

    weights = compare(gpt2, with_digests(gpt2, "layer-000.safetensors"), measure=lambda *_: {}).weights
    assert weights is not None
    assert ([unit.differs for unit in weights.units], weights.differs) == ([False], False)


def test_names_of_layers_with_other_digits(gpt2: splitbundle.Bundle) -> None:
    """Layer 2 of 3 is layer-002, and layer 2 of 1,001 is layer-0002."""
    manifest = gpt2.manifest
    architecture = replace(gpt2.architecture, layers=("full",) * 1001)
    paths = {
        unit: manifest.units.get(unit.replace("layer-0", "layer-"), ("head.safetensors",))
        for unit in architecture.units()
    }
    deep = BundleReader(gpt2.path, replace(manifest, units=paths), architecture, "sha256:" + "0" * 64)
    weights = compare(gpt2, deep, only=["weights"], measure=refused).weights
    assert weights is not None
    assert len(weights.units) == 998
    assert {unit.only_in for unit in weights.units} == {"b"}
    assert (weights.units[0].unit, weights.units[0].layer) == ("layer-0003", 3)


def test_json(gpt2: splitbundle.Bundle) -> None:
    found = gpt2.diff(splitbundle.open(GOLDEN / "llama.splitbundle"), only=["cuts", "vectors"]).as_json()
    assert list(found) == ["differs", "relation", "a", "b", *documents.records.ASPECTS]
    assert {name for name in documents.records.ASPECTS if found[name] is None} == {
        "model",
        "facts",
        "weights",
        "tokenizer",
        "files",
    }
    assert found["vectors"]["a"]["origin"] == "original"
    assert found["cuts"]["b"]["cuts"] == (0, 1, 3)


@pytest.mark.parametrize(("only", "got"), [(["cuts", "colour"], "'colour'"), ([], "none"), ("cuts", "'c'")])
def test_unknown_aspects_are_refused(only: Sequence[str], got: str, gpt2: splitbundle.Bundle) -> None:
    with pytest.raises(BundleError, match=rf"\[input.value\] only: expected .*, got {got}"):
        gpt2.diff(gpt2, only=only)
