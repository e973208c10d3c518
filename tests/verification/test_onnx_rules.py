"""Graphs from strangers: all readers refuse a hostile graph with one code, and accept or refuse any bytes."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

import splitbundle
from splitbundle import BundleError
from splitbundle.cli import main
from splitbundle.format import graph_operators
from splitbundle.format.graph import Graph
from splitbundle.format.weight_layout import Stored
from splitbundle.verification import onnx_reader, onnx_rules
from splitbundle.verification.onnx_reader import Schema
from tests.support.graph_case import CASES, Case, written
from tests.support.graph_cases import SHARD, changed_graph, good_bundle, relist, write_all
from tests.support.graph_loop_cases import add_loop
from tests.support.models import scratch
from tests.support.paths import ROOT, TESTS
from tests.support.yardsticks import at_most, parsing

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = (ROOT / "spec" / "v1" / "bundle.md").read_text("utf-8")
GRAPH = f"{SHARD}.onnx"


@cache
def good() -> Path:
    """The bundle that cases change, without faults."""
    return good_bundle(scratch() / "good.splitbundle")


@cache
def copied() -> Path:
    """A copy of the bundle. Each case exchanges its graph."""
    return Path(shutil.copytree(good(), good().parent / "changed.splitbundle"))


def judge(data: bytes, shard: str = SHARD) -> str:
    """Return the code of the rules' refusal of a graph's bytes; none for a good graph."""
    bundle = splitbundle.open(good())
    own = bundle.shard(shard)
    assert own.graph is not None
    try:
        onnx_rules.check(data, own.graph, onnx_rules.used(own, bundle.locate_tensors(own)))
    except BundleError as error:
        (problem,) = error.problems
        assert problem.file == own.graph.file
        assert problem.offset is not None
        assert 0 <= problem.offset <= len(data)
        assert len(str(problem)) < 1000
        return problem.code
    return ""


@pytest.mark.rule("SB-O-007", "SB-O-015")
def test_graphs_as_they_should_be() -> None:
    bundle = splitbundle.open(good())
    bundle.verify(exact=True)
    for shard in bundle.shards:
        assert GRAPH in bundle.verify(SHARD).files
        assert judge((good() / f"{shard.name}.onnx").read_bytes(), shard.name) == ""
        bundle.stage(shard.name, backend="onnxruntime", threads=1)


@pytest.mark.rule(
    "SB-O-006",
    "SB-O-007",
    "SB-O-008",
    "SB-O-009",
    "SB-O-010",
    "SB-O-011",
    "SB-O-012",
    "SB-O-013",
    "SB-O-014",
    "SB-O-015",
    "SB-O-019",
)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_every_reader_refuses_alike(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied()
    relist(root, GRAPH, changed_graph(good(), case))
    bundle = splitbundle.open(root)
    for read in (lambda: bundle.verify(SHARD), lambda: bundle.stage(SHARD, backend="onnxruntime", threads=1)):
        with pytest.raises(BundleError) as caught:
            read()
        assert [(problem.code, problem.file) for problem in caught.value.problems] == [(case.code, GRAPH)]
    generate = ["generate", str(root), "--ids", "1", "-n", "1", "--backend", "onnxruntime"]
    for status, arguments in ((3, ["verify", str(root)]), (1, generate))[: 2 if CASES.index(case) % 10 == 0 else 1]:
        assert main.main([*arguments, "--json"]) == status
        said = capsys.readouterr()
        (problem,) = json.loads(said.out)["problems"]
        assert (problem["code"], problem["file"]) == (case.code, GRAPH)
        assert "Traceback" not in said.err


@pytest.mark.rule("SB-O-019")
def test_a_loop_as_it_should_be() -> None:
    """The graph that the hostile cases of loops begin with is good, for the rules and for onnxruntime."""
    root = copied()
    relist(root, GRAPH, looped(SHARD))
    bundle = splitbundle.open(root)
    bundle.verify(SHARD)
    bundle.stage(SHARD, backend="onnxruntime", threads=1)


def looped(shard: str) -> bytes:
    """Return a good graph with a loop."""
    model = ModelProto.FromString((good() / f"{shard}.onnx").read_bytes())
    add_loop(model)
    return written(model)


@pytest.mark.rule("SB-O-013")
def test_a_unit_of_two_files() -> None:
    """Each tensor's data is in its own part, at its own offset."""
    model = ModelProto.FromString((good() / "trunk.onnx").read_bytes())
    files = {entry.value for each in model.graph.initializer for entry in each.external_data if entry.key == "location"}
    one, other = sorted(path for path in files if path.startswith("layer-003"))
    entries = [entry for each in model.graph.initializer for entry in each.external_data if entry.value == one]
    entries[0].value = other
    assert judge(written(model), "trunk") == "graph.weights"


def test_the_kits_readme_names_what_there_is() -> None:
    """The README's table of hostile inputs has every case of a graph, and no other."""
    text = (TESTS / "conformance" / "README.md").read_text("utf-8")
    named = set(re.findall(r"`graph/([a-zA-Z0-9*-]+)`", text.partition("\n| **ONNX** | |\n")[2]))
    assert len(named) > 10
    found = {name: {case.name for case in CASES if fnmatchcase(case.name, name)} for name in named}
    assert [name for name in named if not found[name]] == []
    assert {case.name for case in CASES} == set().union(*found.values())


def test_names_of_cases_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundles for other readers differ from the good one by the graph and the entries that list it."""
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.code for case in CASES} == set(re.findall(r"^\| `(graph\.[a-z]+)` \|", SPEC, flags=re.MULTILINE))
    monkeypatch.setattr("tests.support.graph_cases.CASES", CASES[::100])
    write_all(tmp_path / "cases")
    for case in CASES[::100]:
        root = tmp_path / "cases" / f"{case.name}.splitbundle"
        assert json.loads((tmp_path / "cases" / f"{case.name}.json").read_text())["code"] == case.code
        same = {path.name for path in root.iterdir() if path.read_bytes() == (good() / path.name).read_bytes()}
        assert {path.name for path in root.iterdir()} - same == {GRAPH, "manifest.json", "SHA256SUMS"}


@pytest.mark.rule("SB-O-008")
@pytest.mark.parametrize("loop", [False, True])
def test_every_truncation_is_refused(loop: bool) -> None:
    data = smallest(loop)
    found = [judge_top(data[:length]) for length in range(len(data))]
    assert set(found) == {"graph.syntax", "graph.version"}
    assert found.index("graph.version") > len(data) - 20  # only the version of the operators is removed there
    assert judge_top(data) == ""


@cache
def top() -> tuple[Graph, dict[str, Stored]]:
    """The smallest graph, and the weights that it must have."""
    bundle = splitbundle.open(good())
    shard = bundle.shard("top")
    assert shard.graph is not None
    return shard.graph, onnx_rules.used(shard, bundle.locate_tensors(shard))


def judge_top(data: bytes) -> str:
    """Judge the smallest graph."""
    try:
        onnx_rules.check(data, *top())
    except BundleError as error:
        return error.codes[0]
    return ""


@cache
def smallest(loop: bool) -> bytes:
    """Return the bytes of the smallest graph, or of it with a loop."""
    return looped("top") if loop else (good() / "top.onnx").read_bytes()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Change, remove, insert or repeat bytes of the smallest graph, with or without a loop, or make any bytes."""
    data = bytearray(smallest(draw(st.booleans())))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        stop = min(len(data), at + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.binary(max_size=12), st.just(bytes(data[at:stop]) * 2)))
        data[at : draw(st.sampled_from([at, min(len(data), at + len(piece)), stop]))] = piece
    return bytes(data)


@settings(max_examples=400, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(damaged())
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    assert judge_top(data) == "" or judge_top(data).startswith("graph.")


@pytest.mark.parametrize("loop", [False, True])
def test_every_flipped_bit_is_taken_or_refused(loop: bool) -> None:
    """A graph that passes differs from the writer's graph only in parts without a place in memory or in a file."""
    data = smallest(loop)
    model = ModelProto.FromString(data)
    weights = [each for each in model.graph.initializer if each.external_data]
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        if judge_top(bytes(changed)) == "":
            other = ModelProto.FromString(bytes(changed))
            assert [each for each in other.graph.initializer if each.external_data] == weights
            assert [other.graph.input, other.graph.output] == [model.graph.input, model.graph.output]


@pytest.mark.parametrize("place", ["embedding.safetensors", GRAPH])
@pytest.mark.parametrize("kind", ["link", "missing", "larger"])
def test_files_that_a_graph_needs(tmp_path: Path, place: str, kind: str) -> None:
    """Symbolic links are never followed, even to the same bytes."""
    root = Path(shutil.copytree(good(), tmp_path / "copy.splitbundle"))
    data = (root / place).read_bytes()
    (root / place).unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        (root / place).symlink_to(tmp_path / "elsewhere")
    elif kind == "larger":
        (root / place).write_bytes(data + b"\0")
    bundle = splitbundle.open(root)
    code = {"link": "file.kind", "missing": "file.missing", "larger": "file.size"}[kind]
    for read in (
        bundle.verify,
        lambda: bundle.verify(SHARD),
        lambda: bundle.stage(SHARD, backend="onnxruntime", threads=1),
    ):
        with pytest.raises(BundleError) as caught:
            read()
        assert [(problem.code, problem.file) for problem in caught.value.problems] == [(code, place)]
    bundle.verify("trunk")


@pytest.mark.rule("SB-O-015")
def test_verifying_a_shard_checks_its_graph(tmp_path: Path) -> None:
    root = Path(shutil.copytree(good(), tmp_path / "copy.splitbundle"))
    data = bytearray((root / GRAPH).read_bytes())
    data[-1] ^= 1
    (root / GRAPH).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(root).verify(SHARD)
    assert [(problem.code, problem.file) for problem in caught.value.problems] == [("file.digest", GRAPH)]


@pytest.mark.rule("SB-O-008")
def test_the_largest_graph_is_judged_soon() -> None:
    """The fullest graph with as many nodes as allowed, and an eighth of it, in an eighth of the memory."""
    data = with_nodes(onnx_reader.MAX_NODES)
    assert len(data) > onnx_rules.MAX_GRAPH // 2
    with at_most(20, parsing, len(data)):  # it takes about twice as long as parsing as many bytes of JSON
        assert judge(data) == ""
    data = with_nodes(onnx_reader.MAX_NODES // 8)
    tracemalloc.start()
    try:
        assert judge(data) == ""
        assert tracemalloc.get_traced_memory()[1] < 256 * 2**20 / 8
    finally:
        tracemalloc.stop()


def with_nodes(count: int) -> bytes:
    """Make the good graph with more nodes."""
    model = ModelProto.FromString((good() / GRAPH).read_bytes())
    last = "layers.0.key"
    for i in range(count - len(model.graph.node)):
        name = f"x{i}".ljust(60, "-")
        node = helper.make_node("RMSNormalization", [last, last, last], [name], axis=-1, epsilon=float(i))
        model.graph.node.append(node)
        last = name
    return written(model)


# The tables of the specification equal the code's.


def rows(heading: str) -> Iterator[list[str]]:
    """Return the cells of the table that begins with ``heading``."""
    for line in SPEC.partition(f"{heading}\n")[2].splitlines()[1:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.rule("SB-O-010")
def test_operators_are_those_of_the_specification() -> None:
    found = {}
    outputs = {name.encode(): 2 for name in re.findall(r"A node of `(\w+)` has two outputs", SPEC)}
    assert outputs.keys() == {b"TopK"}
    for operators, inputs, attributes in rows("| operators | inputs | attributes |"):
        least, _, most = inputs.replace(" or ", " to ").partition(" to ")
        kinds = {name.encode(): kind for name, kind in re.findall(r"`(\w+)` \((\w+)\)", attributes)}
        for name in re.findall(r"`(\w+)`", operators):
            found[name.encode()] = (int(least), int(most or least), kinds, outputs.get(name.encode(), 1))
    types = {"f": "FLOAT", "i": "INT", "s": "STRING", "ints": "INTS", "g": "GRAPH"}
    assert found == {
        name: (one.minimum, one.maximum, {key: types[kind] for key, kind in one.attributes.items()}, one.outputs)
        for name, one in graph_operators.OPERATORS.items()
    }


@pytest.mark.rule("SB-O-008")
def test_fields_are_those_of_the_specification() -> None:
    found = {}
    for message, fields in rows("| message | fields: number, wire type where it isn't 2 |"):
        fields = fields.replace(
            "`input` 11 and `output` 12 up to 32,768 each", "`input` 11 up to 32,768, `output` 12 up to 32,768"
        )
        own = {}
        for name, number, wire, any_, most in re.findall(
            r"`(\w+)` (\d+)(?: \((\d)\))?(?: (any))?(?: up to ([\d,]*\d))?", fields
        ):
            tag = int(number) << 3 | int(wire or 2)
            own[tag] = (name, int(most.replace(",", "") or 0), not any_ and not most)
        found[message.replace("`", "")] = own
    schemas = {value.name: value for value in vars(onnx_reader).values() if isinstance(value, Schema)}
    assert found == {
        name: {tag: (key, most, key in schema.required) for tag, (key, _, most) in schema.by_tag.items()}
        for name, schema in schemas.items()
    }
