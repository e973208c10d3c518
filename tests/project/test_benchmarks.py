"""The benchmark's own arithmetic, and its output. No test asserts a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from benchmarks import cases, computing, file_sets, files, machine, pictures, processes, report, sets
from benchmarks.computing import tokens
from benchmarks.contenders import (
    COMMANDS,
    CONTENDERS,
    DEFAULT_WAITING,
    LLAMA_FLASH,
    TORCH,
    TORCH_COMMAND,
    TORCH_ONE,
    TORCH_WAITING,
)
from benchmarks.files import Workshop, check_config
from benchmarks.goals import Goal, Term, times_as_fast
from benchmarks.processes import Failed, beside, interleaved, measured
from benchmarks.shapes import SHAPES, Shape
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    family: Shape(
        family=family,
        vocabulary=97,
        hidden=32,
        inner=56,
        layers=3,
        heads=4,
        key_heads=4 if family == "gpt2" else 2,
        positions=64,
        end=5,
    )
    for family in ("gpt2", "llama", "qwen2")
}


def model_of(shape: Shape) -> Any:
    models: Any = AutoModelForCausalLM
    return models.from_config(AutoConfig.for_model(shape.family, **shape.config()))


@pytest.mark.parametrize("family", SMALL)
def test_parameters_and_bytes_are_those_of_the_real_model(family: str) -> None:
    shape = SMALL[family]
    model = model_of(shape)
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert shape.parameters() == sum(numbers.values())
    tables = sum(n for name, n in numbers.items() if "wpe" in name)  # a token needs one row of it
    rows = 32 * (2 if family == "gpt2" else 1)
    cache = model(torch.zeros(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    slots = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert shape.cache_bytes(7, "float32") == 4 * slots
    assert shape.moved(6, 1, 1, "float32") == 4 * (sum(numbers.values()) - tables + rows + slots)
    assert shape.moved(6, 1, 8, "bfloat16") == 2 * (sum(numbers.values()) - tables + 8 * rows + 8 * slots)


@pytest.mark.parametrize("family", SMALL)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape, length = SMALL[family], 16
    model = model_of(shape)
    model.set_attn_implementation("eager")  # their products are seen one by one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, length, dtype=torch.int64), logits_to_keep=1)
    # torch also counts the products with positions that a token doesn't attend to, and the rotation's angles
    unseen = 2 * 2 * 4 * shape.layers * shape.head_size * (length * length - length * (length + 1) // 2)
    angles = 0 if family == "gpt2" else shape.head_size * length
    assert counter.get_total_flops() - shape.operations(0, length, 2) - 2 * unseen in (0, angles, 2 * angles)


def test_goals_are_judged_by_the_median_of_the_rounds() -> None:
    runs = [{"a": {"t": own}, "b": {"t": 4.0, "u": 1.0}} for own in (2.0, 1.0, 4.0)]
    fast = Goal(what="", own=Term("a", "t"), against=Term("b", "t"), at_least=2.0).outcome(runs)
    assert (fast["median"], fast["least"], fast["greatest"], fast["reached"]) == (2.0, 1.0, 4.0, True)
    assert not Goal(what="", own=Term("a", "t"), against=Term("b", "t"), at_least=2.1).outcome(runs)["reached"]
    share = Goal(
        what="", own=Term("a", "t"), less=(Term("b", "u"),), against=Term("b", "t"), share=True, at_most=0.2
    ).outcome(runs)
    assert (share["median"], share["reached"]) == (0.25, False)
    amount = Goal(what="", own=Term("a", "t"), less=(Term("b", "u"),), at_most=1.0).outcome(runs)
    assert (amount["median"], amount["greatest"], amount["reached"], amount["unit"]) == (1.0, 3.0, True, "s")
    absent = Goal(what="", own=Term("a", "t"), against=Term("c", "t"), at_least=1.0).outcome(runs)
    assert absent["median"] is None
    assert absent["missing"] == "t of c"
    assert times_as_fast(runs, "t", "a", "b") == {"median": 2.0, "least": 1.0, "greatest": 4.0}
    assert times_as_fast(runs, "t", "a", "c") is None


def test_contenders_take_turns_and_one_that_fails_is_left_out() -> None:
    seen: list[str] = []

    def ran(name: str) -> Any:
        def measure() -> dict[str, float]:
            seen.append(name)
            if name == "b" and len(seen) > 3:
                raise Failed("it broke")
            return {"t": 1.0}

        return measure

    runs, failed = interleaved({name: ran(name) for name in "abc"}, 3, None)
    assert "".join(seen) == "abccbaac"
    assert failed == {"b": "it broke"}
    assert runs == [{"a": {"t": 1.0}, "c": {"t": 1.0}}] * 3


@pytest.mark.parametrize("name", sets.NAMES)
def test_every_set_names_what_there_is(name: str) -> None:
    own = list(sets.chosen(name, None, None))
    assert own
    for case in own:
        assert {*case.contenders, case.reference} <= CONTENDERS.keys()
        measured = {"import", "import torch", "load", "first token", "private", "private after loading"}
        for point in case.points:
            assert point.context + point.tokens <= SHAPES[case.model].positions
            measured |= {cases.point_name(what, point.context, point.batch) for what in ("prefill", "decode")}
        measured |= {*case.columns.values()}
        # If every contender is present, each goal has its comparison.
        run: dict[str, Any] = {contender: dict.fromkeys(measured, 1.0) for contender in case.contenders}
        rates = {"read": 1e9, "multiply float32": 1e9, "multiply bfloat16": 1e9}
        run |= sets.derive(case, run, rates if case.points else None)
        assert [goal.outcome([run]).get("missing") for goal in case.goals] == [None] * len(case.goals)
    (tiny,) = sets.chosen(name, ("tiny",), "float32")
    assert (tiny.set, tiny.model, tiny.goals) == (name, "tiny", ())


def test_the_limit_is_the_slower_of_moving_and_multiplying() -> None:
    case = next(iter(sets.chosen("prefill", ("gpt2",), None)))
    shape = SHAPES["gpt2"]
    moving = sets.derive(case, {}, {"read": 1.0, "multiply float32": 1e30})[sets.LIMIT]["prefill 256"]
    assert moving == shape.moved(0, 256, 1, "float32") / 256
    multiplying = sets.derive(case, {}, {"read": 1e30, "multiply float32": 1.0})[sets.LIMIT]["prefill 256"]
    assert multiplying == shape.operations(0, 256, 1) / 256


def test_of_two_measured_limits_the_better_counts_and_more_than_it_is_said() -> None:
    (case,) = sets.chosen("decode", ("tiny",), "float32")
    slow, fast = ({"read": rate, "multiply float32": rate} for rate in (1e9, 2e9))
    own: dict[str, Any] = {"splitbundle torch": {"decode 256": 1e-9}}
    run = cases._best_rates({"the machine": slow, **own, "the machine, again": fast})
    assert run == {**own, "the machine": fast}
    assert cases._best_rates(own) == own
    document = {"set": "decode", "model": "tiny", "dtype": "float32", "threads": 1, "rounds": 1, "goals": []}
    document |= {"figures": ["decode 256"], "reference": "splitbundle torch", "differences": {}, "left out": {}}
    document |= {"runs": [run | sets.derive(case, run, fast)], "machine": machine.facts()}
    said = "so others used the machine"
    assert said in report.markdown([document])
    own["splitbundle torch"]["decode 256"] = 1.0
    assert said not in report.markdown([document])


def test_another_models_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 3}), "utf-8")
    with pytest.raises(Failed, match="vocab_size is 3 and not 1024"):
        check_config(tmp_path, SHAPES["tiny"])


def test_tokens_are_the_models() -> None:
    rows = tokens(300, 3, 97)
    assert len(rows) == 3
    assert rows[0] != rows[1]
    assert all(0 <= token < 97 for row in rows for token in row)


@pytest.mark.parametrize("family", SMALL)
def test_gguf_has_every_tensor_of_the_family(tmp_path: Path, family: str) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks import gguf_file

    shape = SMALL[family]
    model = model_of(shape).bfloat16()
    model.save_pretrained(tmp_path / "model")
    gguf_file.write(shape, tmp_path / "model", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    names = {tensor.name: tensor for tensor in reader.tensors}
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), shape.layers)
    wanted = {known.get_name(name, (".weight", ".bias")) for name, _ in model.named_parameters()}
    assert names.keys() == wanted
    assert sum(int(tensor.n_elements) for tensor in names.values()) == shape.parameters()
    types = {tensor.tensor_type.name for tensor in names.values() if tensor.name.startswith("blk.")}
    assert types == {"BF16", "F32"}
    up = names["blk.1.ffn_up.weight"]
    assert [int(size) for size in up.shape] == [shape.hidden, shape.inner]  # its order is reversed


def test_what_computes_something_else_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    measuring = cases.Measuring(workshop=Workshop(tmp_path), threads=1, rounds=1, only=None, lock=None)
    (case,) = sets.chosen("decode", ("tiny",), "float32")
    asked: list[str] = []

    def computed(module: str, task: dict[str, Any]) -> dict[str, Any]:
        asked.append(task["module"])
        return {"logits": [4.0, 2.01 if task["module"] == "contender_genai" else 2.0]}

    monkeypatch.setattr(cases, "measured", computed)
    for again in range(2):
        names = ("splitbundle torch", "transformers", "onnxruntime-genai", "llama.cpp")
        tasks = {name: {"module": CONTENDERS[name].module, "path": str(tmp_path / "config.json")} for name in names}
        left_out: dict[str, str] = {}
        differences = measuring._check(case, tasks, tmp_path / "config.json", left_out)
        assert list(tasks) == ["splitbundle torch", "transformers", "llama.cpp"]
        why = "its logits differ from transformers' by 0.0025 of the largest logit, and may by 0.001"
        assert left_out == {"onnxruntime-genai": why}
        assert (differences["splitbundle torch"], differences["llama.cpp"]) == (0.0, 0.0)
        peers = [] if again else ["contender_genai", "contender_llama_cpp"]  # the results are remembered
        assert asked == ["contender_transformers", "contender_torch", *peers]
        asked.clear()
    assert cases.difference([1.0], [1.0, 2.0]) == float("inf")
    assert cases.difference([1.0, float("nan"), 2.0], [1.0, 1.5, 2.0]) == float("inf")


def test_sizes_and_what_a_report_says_of_them(tmp_path: Path) -> None:
    measuring = cases.Measuring(workshop=Workshop(tmp_path), threads=1, rounds=None, only=None, lock=None)
    document = measuring.of_files("size", "tiny")
    sizes = document["runs"][0]
    assert sizes[file_sets.PARAMETERS]["bytes"] == 4 * SHAPES["tiny"].parameters()
    bundle = tmp_path / "tiny-v2.splitbundle"
    stored = sum(path.stat().st_size for path in bundle.glob("*.safetensors"))
    assert sizes[file_sets.BUNDLE]["bytes"] == stored
    # Another version's results aren't used.
    layer = bundle / "layer-001.safetensors"
    content = bytearray(layer.read_bytes())
    content[8:40] = bytes(32)
    layer.write_bytes(content)
    with pytest.raises(Failed, match=r"made by another version .*Remove it"):
        measuring.workshop.make("bundle", "tiny", "float32")
    # A tiny model's headers weigh more than the limit for GPT-2.
    text = report.markdown([document])
    assert "goal ≤ 1.001 ×, came 1." in text
    assert ": **missed**" in text


def document(**fields: Any) -> dict[str, Any]:
    """A document of an older version, which recorded less."""
    found = {"set": "decode", "model": "tiny", "dtype": "float32", "threads": 1, "reference": "a", "goals": []}
    found |= {"figures": ["decode 256"], "left out": {}, "differences": {}, "machine": machine.facts()}
    runs = [{"a": {"decode 256": 1.0}}, {"a": {"decode 256": 3.0}}]
    return found | {"runs": runs, "rounds": len(runs)} | fields


def test_a_page_tells_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goals = [
        Goal(what=what, own=Term("a", "decode 256"), against=Term(other, "decode 256"), at_least=1.0).outcome([{}])
        for what, other in (("one", LLAMA_FLASH), ("two", "transformers"))
    ]
    why = "its logits differ from transformers' by 0.0025 of the largest logit, and may by 0.001"
    text = report.markdown(
        [
            document(
                goals=goals,
                interrupted=True,
                **{"left out": {LLAMA_FLASH: why}, "not run": ["transformers"], "rounds of the set": 5},
            )
        ]
    )
    assert ", 1 thread, medians of 2 of 5 rounds\n" in text
    assert "It was interrupted after these rounds." in text
    assert "| a | 2e+03 | " not in text  # it gives its least and greatest values
    assert f"- one: goal ≥ 1 ×, not measured: decode 256 of a, {why} ({LLAMA_FLASH})\n" in text
    assert "- two: goal ≥ 1 ×, not measured: decode 256 of a, transformers wasn't run\n" in text
    # Older documents lack it, and other programs' files are no documents.
    report.write(document(), tmp_path)
    (tmp_path / "foreign.json").write_text('{"set": "decode"}', "utf-8")
    (tmp_path / "broken.json").write_text("[", "utf-8")
    report.write_pages(tmp_path)
    assert "medians of 2 rounds\n" in (tmp_path / "decode.md").read_text("utf-8")
    said = capsys.readouterr().err
    assert [name in said for name in ("foreign.json", "broken.json", "decode-tiny")] == [True, True, False]


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def test_each_measured_process_has_its_own_environment_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def task(name: str, of_set: str) -> dict[str, Any]:
        (case,) = sets.chosen(of_set, ("tiny",), "float32")
        measuring = cases.Measuring(workshop=Workshop(tmp_path), threads=2, rounds=1, only=None, lock=None)
        return measuring._task(case, name, "")

    said = f"import json, os; print(json.dumps([os.environ.get(name) for name in {WAITING}]))"
    monkeypatch.setattr(processes, "_CHILD", said)
    for name in WAITING:
        monkeypatch.setenv(name, "own")
    environments: dict[str, Any] = {name: measured("", task(name, "contention")) for name in CONTENDERS}
    for name in (TORCH_COMMAND, *COMMANDS.values()):
        assert environments.pop(name) == ["PASSIVE", "20000", None]
    assert {name: own for name, own in environments.items() if own != [None] * 3} == {}
    assert measured("", task(TORCH, "decode")) == ["own"] * 3  # the other sets leave them as they are
    threads = {name: task(name, "contention")["threads"] for name in CONTENDERS}
    assert {name: number for name, number in threads.items() if number != 2} == {TORCH_ONE: 1}


def test_the_contender_waits_as_the_command_does() -> None:
    code = f"""if True:
        import os
        import splitbundle.__main__ as command
        import splitbundle.cli.main as main
        main.main = lambda: print([os.environ.get(name) for name in {WAITING}])
        command.run()
    """
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / name) for name in (".", "runtime", "converter", "schemas"))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    own = CONTENDERS[TORCH_COMMAND].environment
    assert done.stdout == f"{[own[name] for name in WAITING]}\n", done.stderr
    assert CONTENDERS[TORCH_WAITING].environment == DEFAULT_WAITING


@pytest.mark.parametrize("error", [None, Failed("it broke"), KeyboardInterrupt()])
def test_busy_processes_end_with_the_block(error: BaseException | None) -> None:
    caught: list[BaseException] = []
    try:
        with beside(2) as busy:
            assert [each.poll() for each in busy] == [None, None]
            if error is not None:
                raise error
    except (Failed, KeyboardInterrupt) as raised:
        caught.append(raised)
    assert caught == ([] if error is None else [error])
    assert len(busy) == 2
    assert None not in [each.returncode for each in busy]
    with beside(0) as busy:
        assert busy == []


def test_a_busy_process_that_ends_early_is_told_and_none_outlives_its_parent() -> None:
    with pytest.raises(Failed, match="ended too early"), beside(2) as busy:
        busy[0].kill()
        busy[0].wait()
    assert None not in [each.returncode for each in busy]
    # This one is not of that parent, as if its parent were gone.
    assert subprocess.run([sys.executable, "-c", processes._BUSY, "0"], timeout=60).returncode == 0


def test_contention_is_measured_quiet_and_beside_busy_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    real = beside

    @contextlib.contextmanager
    def counted(count: int) -> Iterator[Any]:
        with real(count) as busy:
            running[:] = [len(busy)]
            yield busy
        running.clear()

    def computed(module: str, task: dict[str, Any]) -> dict[str, Any]:
        assert module == "computing"  # the rates of the machine aren't measured
        return {"logits": [1.0]} if task["logits"] else {"decode 64": 0.001 + running[0] * task["threads"], "load": 1.0}

    monkeypatch.setattr(cases, "measured", computed)
    monkeypatch.setattr(cases, "beside", counted)
    names = (TORCH_COMMAND, TORCH_WAITING, TORCH_ONE)
    measuring = cases.Measuring(workshop=Workshop(tmp_path), threads=2, rounds=1, only=names, lock=None)
    (case,) = sets.chosen("contention", ("tiny",), None)
    document = measuring.of_models(case)
    assert document["runs"][0][TORCH_COMMAND] == {
        "decode 64": 0.001,
        "load": 1.0,
        "decode 64 beside 1 busy": 2.001,
        "load beside 1 busy": 1.0,
        "decode 64 beside 2 busy": 4.001,
        "load beside 2 busy": 1.0,
    }
    text = report.markdown([document])
    assert "| decode 64, ms a token | quiet | 1 busy | 2 busy |\n|---|---|---|---|\n" in text
    assert f"| {TORCH_COMMAND} | 1 | 2e+03 | 4e+03 |\n" in text
    assert f"| {sets.BEST} | 1 | 1e+03 | 2e+03 |\n" in text
    assert "÷ this" not in text  # transformers was not run
    runs = [run | {"transformers": dict.fromkeys(run[TORCH_ONE], 8.004)} for run in document["runs"]]
    text = report.markdown([document | {"runs": runs * 2}])
    assert "| transformers ÷ this | quiet | 1 busy | 2 busy |\n|---|---|---|---|\n" in text
    assert "| 4.00 (4.00 to 4.00) | 2.00 (2.00 to 2.00) |\n" in text


def test_the_goals_of_contention() -> None:
    case = next(iter(sets.chosen("contention", ("gpt2",), None)))
    quiet, one, two = case.columns.values()
    run = {
        TORCH_COMMAND: {quiet: 1.2, one: 2.0, two: 4.0},
        TORCH_WAITING: {quiet: 1.0, one: 9.0, two: 9.0},
        TORCH_ONE: {quiet: 2.0, one: 1.9, two: 3.0},
        "transformers": {quiet: 2.0, one: 5.0, two: 9.0},
    }
    derived = sets.derive(case, run, None)
    assert derived[sets.BEST] == {quiet: 1.0, one: 1.9, two: 3.0}
    outcomes = [goal.outcome([run | derived]) for goal in case.goals]
    assert [(each["median"], each["reached"]) for each in outcomes] == [(0.95, True), (2.5, False), (1.2, False)]
    del run[TORCH_ONE]
    assert sets.BEST not in sets.derive(case, run, None)


def test_small_models_have_a_goal_for_decoding() -> None:
    assert SHAPES["smollm2-135m"].parameters() == 134_515_008
    for model in ("gpt2", "smollm2-135m"):
        for dtype in ("float32", "bfloat16"):
            (prefill,), (decode,) = (sets.chosen(name, (model,), dtype) for name in ("prefill", "decode"))
            assert (decode.goals[-1].what, decode.goals[-1].at_least) == (
                "decoding, torch, against transformers",
                1.2,
            )
            assert bool(prefill.goals) == ((model, dtype) == ("gpt2", "float32"))


@pytest.mark.parametrize(
    ("name", "instructions", "short", "tag"),
    [
        ("Intel(R) Xeon(R) Processor", ["avx2", "avx512f", "amx_tile"], "Intel Xeon (amx)", "intel-xeon-amx"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", ["avx2"], "Intel Xeon (avx2)", "intel-xeon-avx2"),
        ("AMD EPYC", ["avx2", "avx512f", "sha_ni"], "AMD EPYC (avx512)", "amd-epyc-avx512"),
        ("AMD EPYC 7R13 48-Core Processor", ["avx2"], "AMD EPYC 7R13 (avx2)", "amd-epyc-7r13-avx2"),
        (None, ["asimd", "sve"], "Linux aarch64 (sve)", "linux-aarch64-sve"),
        (None, [], "Linux aarch64", "linux-aarch64"),
    ],
)
def test_a_processor_has_a_short_name(name: str | None, instructions: list[str], short: str, tag: str) -> None:
    found: dict[str, Any] = {"system": "Linux 6.1 aarch64", "instructions": instructions}
    found |= {} if name is None else {"processor": name}
    assert (machine.processor(found), machine.tag(found)) == (short, tag)


def test_results_of_two_processors_are_side_by_side(tmp_path: Path) -> None:
    goals = [Goal(what="one", own=Term("a", "decode 256"), at_most=2.0).outcome([{"a": {"decode 256": 1.0}}])]
    amd, intel = (
        document(goals=goals, threads=2, machine=machine.facts() | {"processor": name, "instructions": instructions})
        for name, instructions in (("AMD EPYC", ["avx512f"]), ("Intel(R) Xeon(R) Processor", ["amx_tile"]))
    )
    # The results of an older version have no processor in their name. Only the same processor replaces them.
    old, own = tmp_path / "decode-tiny-float32.json", tmp_path / "decode-tiny-float32.intel-xeon-amx.json"
    old.write_text(json.dumps(amd), "utf-8")
    report.write(intel, tmp_path)
    assert [json.loads(path.read_text("utf-8")) for path in (old, own)] == [amd, intel]
    report.write(amd | {"interrupted": True}, tmp_path)
    report.write(intel | {"interrupted": True}, tmp_path)
    assert {*tmp_path.iterdir()} == {old, own}
    assert all(json.loads(path.read_text("utf-8"))["interrupted"] for path in (old, own))
    report.write_pages(tmp_path)
    places = ["AMD EPYC (avx512), 2 threads", "Intel Xeon (amx), 2 threads"]
    page, index = ((tmp_path / name).read_text("utf-8") for name in ("decode.md", "README.md"))
    assert page.startswith(f"# decode\n\nMeasured on {'; '.join(places)}.\n")
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == [f"## decode tiny float32: {place}, medians of 2 rounds" for place in places]
    assert f"\nMeasured on {'; '.join(places)}.\n" in index
    row = "| [decode](decode.md) | tiny float32 | 2 | one | "
    head = "| set | model | rounds | goal | bound | came | |\n|---|---|---|---|---|---|---|\n"
    assert [f"## {place}\n\n{head}{row}" in index for place in places] == [True, True]


def test_the_stored_results_have_a_place_on_their_pages() -> None:
    results = ROOT / "benchmarks" / "results"
    for path in results.glob("*.json"):
        stored = json.loads(path.read_text("utf-8"))
        place = report._place(stored)
        first = [(results / name).read_text("utf-8").split("\n## ")[0] for name in (f"{stored['set']}.md", "README.md")]
        assert [place in text for text in first] == [True, True]
        assert "-".join(filter(None, (stored[key] for key in ("set", "model", "dtype")))) in path.name


def test_the_stored_pictures_and_pages_are_those_of_the_stored_results(tmp_path: Path) -> None:
    """``python -m benchmarks.pictures`` writes them anew."""
    results = ROOT / "benchmarks" / "results"
    for path in results.glob("*.json"):
        shutil.copy(path, tmp_path)
    report.write_pages(tmp_path)
    written = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir() if path.suffix != ".json"}
    stored = {path.name: path.read_text("utf-8") for path in results.iterdir() if path.suffix != ".json"}
    assert sorted(written) == sorted(stored)
    assert [name for name in written if written[name] != stored[name]] == []


def test_the_page_of_speeds_begins_with_the_ranges_of_the_stored_results() -> None:
    """In float32, on all processors and models that were measured."""
    stored = [json.loads(path.read_text("utf-8")) for path in (ROOT / "benchmarks" / "results").glob("*.json")]

    def span(of_set: str, other: str, *backends: str) -> str:
        found = [
            ratio["median"]
            for each in stored
            if (each["set"], each["dtype"]) == (of_set, "float32")
            for figure in each["figures"]
            for backend in backends
            if (ratio := times_as_fast(each["runs"], figure, f"splitbundle {backend}", other))
        ]
        return f"{min(found):.1f} to {max(found):.1f} ×"

    both = ("torch", "onnxruntime")
    cells = [
        *(f"{span('prefill', other, *both)} as fast" for other in ("transformers", "llama.cpp")),
        *(f"{span('decode', other, own)} with {own}" for own in both for other in ("transformers", "llama.cpp")),
    ]
    head = (ROOT / "docs" / "explanation" / "speed.md").read_text("utf-8").partition("\n## ")[0]
    assert [cell for cell in cells if cell not in head] == []


def test_a_picture_says_machine_threads_and_spread_and_has_one_scale() -> None:
    runs = [{"a": {"decode 256": own}, "b": {"decode 256": 1.0}} for own in (0.5, 0.25, 1.0)]
    facts = machine.facts() | {"processor": "AMD EPYC", "instructions": ["avx512f"]}
    one = document(runs=runs, reference="b", threads=2, machine=facts, figures=["decode 256"])
    drawn = pictures.picture([one, one | {"model": "other", "runs": runs[:1]}])
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    said = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    assert "tiny float32 decode 256: AMD EPYC (avx512), 2 threads, 3 rounds" in said
    assert "other float32 decode 256: AMD EPYC (avx512), 2 threads, 1 round" in said
    assert "Bar: median of the rounds. Line across it: least to greatest round." in said
    assert "All panels have one scale; a step of it is a factor of 2." in next(text for text in said if "scale" in text)
    assert [said.count(text) for text in ("2.00 (1.00 to 4.00)", "2.00", "1.00 (1.00 to 1.00)")] == [1, 1, 1]
    bars = [element.attrib for element in root.iter() if element.get("class") == "peer"]
    assert bars[0]["width"] == bars[2]["width"] != bars[1]["width"]
    about = next(element.text or "" for element in root.iter() if element.tag.endswith("desc"))
    assert "3 rounds: a 2.00 (1.00 to 4.00); b 1.00 (1.00 to 1.00). other" in about
    assert "prefers-color-scheme: dark" in drawn
    assert pictures.picture([one | {"reference": "c"}]) is None


def test_memory_that_the_system_does_not_tell_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    computing._more(figures, "private", 5, 3)
    assert figures == {"private": 2}
    monkeypatch.setattr(computing, "private", lambda: None)
    assert computing.Sampler().stop() is None
    computing._more(figures, "private after loading", computing.private(), 3)
    assert figures == {"private": 2}
    (case, _) = sets.chosen("memory", None, None)
    run = {"splitbundle torch": {"load": 1.0}, **sets.derive(case, {}, None)}
    assert [goal.outcome([run])["median"] for goal in case.goals] == [None, None]
    assert "MiB" not in report.markdown([document(figures=["private"])])


@pytest.mark.parametrize("family", SMALL)
def test_no_bias_is_zero_and_no_norm_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    from safetensors.torch import load_file

    monkeypatch.setitem(SHAPES, "small", SMALL[family])
    workshop = Workshop(tmp_path)
    path = workshop.make("checkpoint", "small", "float32")
    again = Workshop(tmp_path / "again").make("checkpoint", "small", "float32")
    assert (path / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    vectors = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if tensor.dim() == 1}
    assert any(name.endswith(".bias") for name in vectors) == (family != "llama")
    for name, tensor in vectors.items():
        assert 0.01 < tensor.std() < 0.3
        assert abs(tensor.mean() - (0 if name.endswith(".bias") else 1)) < 0.1


def test_what_is_broken_in_a_directory_is_told(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    path = workshop.make("checkpoint", "tiny", "float32")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    config = (path / "config.json").read_bytes()
    weights = (path / "model.safetensors").read_bytes()
    broken = {
        "model.safetensors": (weights[:-100], "can't be read"),
        "config.json": (config[:-5], "has no configuration"),
    }
    for name, (content, told) in broken.items():
        whole = (path / name).read_bytes()
        (path / name).write_bytes(content)
        with pytest.raises(Failed, match=told):
            workshop.make("checkpoint", "tiny", "float32")
        (path / name).write_bytes(whole)
    workshop.make("checkpoint", "tiny", "float32")
    for name in ("model.safetensors", "config.json"):
        (path / name).unlink()
        with pytest.raises(Failed, match=r"has 0 of|has no configuration"):
            workshop.make("checkpoint", "tiny", "float32")


def test_of_two_runs_that_make_the_same_one_drops_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files._checkpoint

    def raced(path: Path, model: str, dtype: str) -> None:
        monkeypatch.setattr(files, "_checkpoint", real)
        other = Workshop(tmp_path).make("checkpoint", model, dtype)
        (other / "first").touch()
        real(path, model, dtype)

    monkeypatch.setattr(files, "_checkpoint", raced)
    path = Workshop(tmp_path).make("checkpoint", "tiny", "float32")
    assert (path / "first").exists()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_an_interruption_keeps_whole_rounds() -> None:
    def until(calls: int) -> Any:
        counted = iter(range(calls))

        def measure() -> dict[str, float]:
            if next(counted, None) is None:
                raise KeyboardInterrupt
            return {"t": 1.0}

        return measure

    assert interleaved({"a": until(9), "b": until(2)}, 3, None)[0] == [{"a": {"t": 1.0}, "b": {"t": 1.0}}] * 2
    with pytest.raises(KeyboardInterrupt):
        interleaved({"a": until(9), "b": until(0)}, 3, None)
