"""Training checkpoints: a resumed run equals an uninterrupted one to the bit, and nothing saved is ever lost."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import splitbundle
from splitbundle import BundleError
from splitbundle.training import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

RUN = """
import random, sys
import torch, splitbundle
from splitbundle.training import Checkpoints

bundle, directory, steps, stop, kind = splitbundle.open(sys.argv[1]), sys.argv[2], 8, int(sys.argv[3]), sys.argv[-2]
del sys.argv[2:4]  # the next run takes the next two
torch.set_num_threads(1)
torch.manual_seed(7)
random.seed(7)
draws = torch.Generator().manual_seed(3)
pipeline = bundle.pipeline(trainable=True)
parameters = list(pipeline.parameters())
optimizer = {
    "adamw": lambda: torch.optim.AdamW([{"params": parameters[:5], "lr": 1e-2}, {"params": parameters[5:]}], lr=1e-3),
    "sgd": lambda: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adafactor": lambda: torch.optim.Adafactor(parameters, lr=1e-2),
    "rprop": lambda: torch.optim.Rprop(parameters, lr=1e-3),
}[kind]()
schedule = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    ],
    milestones=[3],
)
checkpoints = Checkpoints(directory)
resumed = checkpoints.load(pipeline, optimizer, schedule, generators={"draws": draws})
start = 0 if resumed is None else resumed.step
assert resumed is None or resumed.position == {"epoch": 0, "row": resumed.step}
for step in range(start, min(steps, stop)):
    ids = torch.randint(0, 90, (2, 5 + random.randrange(3)), generator=draws)
    hidden = pipeline.stages[0](ids)
    hidden = torch.nn.functional.dropout(hidden, 0.1)
    for stage in pipeline.stages[1:]:
        hidden = stage(hidden)
    loss = torch.nn.functional.cross_entropy(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    position = {"epoch": 0, "row": step + 1}
    checkpoints.save(step + 1, pipeline, optimizer, schedule, position=position, generators={"draws": draws})
print([p.detach().double().sum().item() for p in parameters], optimizer.param_groups[0]["lr"], random.random())
"""


def run(bundle: splitbundle.Bundle, kind: str, *runs: tuple[Path, int]) -> list[str]:
    """Train in a new process. Each run has a directory and the step that it stops at. Return the line of each."""
    program = "import sys\nfor _ in range((len(sys.argv) - 3) // 2):\n    exec(sys.argv[-1], {})"
    words = [str(word) for each in runs for word in each]
    command = [sys.executable, "-W", "ignore", "-c", program, str(bundle.path), *words, kind, RUN]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "kind", ["adamw", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("sgd", "adafactor", "rprop"))]
)
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    whole, _ = run(gpt2, kind, (tmp_path / "whole", 8), (tmp_path / "parts", 4))
    assert run(gpt2, kind, (tmp_path / "parts", 8)) == [whole]
    one, other = (Checkpoints(tmp_path / name) for name in ("whole", "parts"))
    assert one.steps() == other.steps() == [6, 7, 8]
    tensors = [
        (tmp_path / name / "step-0000000008" / "tensors.safetensors").read_bytes() for name in ("whole", "parts")
    ]
    assert tensors[0] == tensors[1]


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    """Loading a checkpoint sets the random state of the process. Give the other tests theirs."""
    before = torch.get_rng_state(), random.getstate()
    yield
    torch.set_rng_state(before[0])
    random.setstate(before[1])


@pytest.fixture
def copy_of_gpt2(gpt2: splitbundle.Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gpt2.path, tmp_path / "copy.splitbundle"))


class Setup:
    """A trained stage, and what belongs to it."""

    def __init__(self, bundle: splitbundle.Bundle, shard: str = "trunk", **options: Any) -> None:
        self.stage = bundle.stage(shard, trainable=True, **options)
        self.optimizer = torch.optim.AdamW(self.stage.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)

    def step(self) -> None:
        self.stage(
            torch.ones(1, 3, self.stage.architecture.hidden_size, dtype=self.stage.dtype)
        ).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.stage.state_dict().items()}


@pytest.fixture
def setup(gpt2: splitbundle.Bundle) -> Setup:
    made = Setup(gpt2)
    made.step()
    return made


def test_what_it_holds(setup: Setup, gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """Weights without gradients are in the bundle. Those that were changed before they were frozen are saved."""
    for name, parameter in setup.stage.named_parameters():
        parameter.requires_grad_("mlp" in name)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, setup.stage, setup.optimizer, setup.schedule, position=[1, "two", None, 2.5])
    assert sorted(entry.name for entry in path.iterdir()) == ["checkpoint.json", "tensors.safetensors"]
    document = json.loads((path / "checkpoint.json").read_text())
    weights = {item["name"] for item in document["tensors"] if item["name"].startswith("weights/")}
    assert weights == {f"weights/{name}" for name in setup.stage.state_dict()}  # one step changed all of them
    other = Setup(gpt2)
    for name, parameter in other.stage.named_parameters():
        parameter.requires_grad_("mlp" in name)
    resumed = checkpoints.load(other.stage, other.optimizer, other.schedule)
    assert resumed is not None
    assert (resumed.step, resumed.position) == (1, [1, "two", None, 2.5])
    assert all(torch.equal(value, other.stage.state_dict()[name]) for name, value in setup.weights().items())
    fresh = Setup(gpt2)
    for name, parameter in fresh.stage.named_parameters():
        parameter.requires_grad_("mlp" in name)
    path = Checkpoints(tmp_path / "fresh").save(0, fresh.stage)
    document = json.loads((path / "checkpoint.json").read_text())
    assert all("mlp" in item["name"] for item in document["tensors"] if item["name"].startswith("weights/"))


def fused(own: Setup) -> None:
    optimizer = torch.optim.AdamW(own.stage.parameters(), lr=1e-2, fused=True)
    own.stage(torch.ones(1, 3, 48)).square().mean().backward()
    optimizer.step()


def by_data(own: Setup) -> None:
    for parameter in own.stage.parameters():
        parameter.data.mul_(1.5)


def replaced(own: Setup) -> None:
    own.stage.load_state_dict({name: value * 1.5 for name, value in own.stage.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [fused, by_data, replaced])
def test_weights_that_were_trained_and_then_frozen(
    change: Callable[[Setup], None], gpt2: splitbundle.Bundle, tmp_path: Path
) -> None:
    """torch counts not every change of a tensor. So the bytes are compared with those of the bundle."""
    own, other = Setup(gpt2), Setup(gpt2)
    change(own)
    for setup in (own, other):
        setup.stage.requires_grad_(False)
    path = Checkpoints(tmp_path).save(1, copy.deepcopy(own.stage))
    Checkpoints(tmp_path).load(other.stage)
    assert all(torch.equal(value, other.stage.state_dict()[name]) for name, value in own.weights().items())
    document = json.loads((path / "checkpoint.json").read_text())
    assert len([item for item in document["tensors"] if item["name"].startswith("weights/")]) > 8


def test_frozen_weights_stay_in_the_bundle(copy_of_gpt2: Path, tmp_path: Path) -> None:
    own = Setup(splitbundle.open(copy_of_gpt2))
    own.stage.add_lora(2, 4, ["attention.query"])

    def weights(path: Path) -> set[str]:
        names = (item["name"] for item in json.loads((path / "checkpoint.json").read_text())["tensors"])
        return {name for name in names if name.startswith("weights/")}

    adapters = {f"weights/layers.1.attention.query.lora_{kind}" for kind in "ab"}
    assert weights(Checkpoints(tmp_path / "a").save(1, own.stage)) == adapters
    shutil.rmtree(copy_of_gpt2)  # nothing is known about the frozen ones now, so all are saved
    assert len(weights(Checkpoints(tmp_path / "b").save(1, own.stage))) == len(list(own.stage.parameters()))


def test_the_schema(setup: Setup, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schemas = pytest.importorskip("splitbundle_schemas")
    path = Checkpoints(tmp_path).save(1, setup.stage, setup.optimizer, setup.schedule, position={"a": [1.5]})
    validator = jsonschema.Draft202012Validator(schemas.load("checkpoint"))
    document = json.loads((path / "checkpoint.json").read_text())
    validator.validate(document)
    for broken in ({"format": "other"}, {"step": -1}, {"more": 1}, {"state": {}}):
        assert not validator.is_valid(document | broken)


def test_the_last_ones_are_kept(setup: Setup, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "runs" / "one", keep=2)
    assert (checkpoints.steps(), checkpoints.load(setup.stage)) == ([], None)
    for step in (1, 2, 10, 20):
        checkpoints.save(step, setup.stage)
    assert checkpoints.steps() == [10, 20]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-0000000010", "step-0000000020"]
    with pytest.raises(BundleError, match=r"\[output.exists\]"):
        checkpoints.save(20, setup.stage)
    checkpoints.save(15, setup.stage)
    assert checkpoints.steps() == [15, 20]
    (checkpoints.directory / ".removed-0123").mkdir()
    (checkpoints.directory / ".step-0000000030.tmp-0123456789abcdef").mkdir()
    (checkpoints.directory / ".step-0000000030.tmp-0123456789abcdef" / "tensors.safetensors").write_bytes(b"half")
    checkpoints.save(21, setup.stage)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-0000000020", "step-0000000021"]


def test_an_older_one(setup: Setup, tmp_path: Path) -> None:
    checkpoints, known = Checkpoints(tmp_path), {}
    for step in (1, 2, 3):
        known[step] = setup.weights()
        checkpoints.save(step, setup.stage, setup.optimizer)
        setup.step()
    resumed = checkpoints.load(setup.stage, setup.optimizer, step=2)
    assert resumed is not None
    assert resumed.step == 2
    assert all(torch.equal(value, known[2][name]) for name, value in setup.weights().items())
    with pytest.raises(BundleError, match="there are 1, 2, 3"):
        checkpoints.load(setup.stage, step=4)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_the_weights_alone(trainable: bool, lora: bool, gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """Without the optimizer of the run, as a server leaves a checkpoint, and without a change of anything else."""
    run = gpt2.pipeline(trainable=True)
    if lora:
        for stage in run.stages:
            stage.add_lora(4, 8.0)
    learning = [parameter for parameter in run.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.5)
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):
        run(ids).pow(2).mean().backward()
        optimizer.step()
    Checkpoints(tmp_path).save(5, run, optimizer, position={"row": 7})
    other = gpt2.pipeline(trainable=trainable)
    if lora:
        with pytest.raises(BundleError, match=r"\[checkpoint.mismatch\]"):
            Checkpoints(tmp_path).load(other, weights_only=True)
        for stage in other.stages:
            stage.add_lora(4, 8.0)
    other(ids)  # what it keeps of its weights mustn't be used any more
    drawn = torch.get_rng_state()
    resumed = Checkpoints(tmp_path).load(other, weights_only=True)
    assert (resumed.step, resumed.position) == (5, {"row": 7})  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), drawn)
    with torch.no_grad():
        torch.testing.assert_close(other(ids), run(ids), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(other(ids), gpt2.pipeline()(ids), atol=1e-3)
    with pytest.raises(BundleError, match=r"\[input.value\] weights_only"):
        Checkpoints(tmp_path).load(run, optimizer, weights_only=True)


def test_16_bits_with_wider_state(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """An optimizer that keeps float32 beside bfloat16 weights gets them back as they were."""
    own = Setup(gpt2, dtype="bfloat16")
    own.step()
    for state in own.optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-6
    Checkpoints(tmp_path).save(1, own.stage, own.optimizer)
    other = Setup(gpt2, dtype="bfloat16")
    Checkpoints(tmp_path).load(other.stage, other.optimizer)
    for one, same in zip(own.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert same["exp_avg"].dtype == torch.float32
        assert torch.equal(one["exp_avg"], same["exp_avg"])


def test_stages_that_were_loaded_apart(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """Each has a token table of its own."""
    ends = [gpt2.stage(name, trainable=True) for name in ("bottom", "top")]
    with torch.no_grad():
        ends[1].embedding.token.weight.add_(1)
    Checkpoints(tmp_path).save(1, ends)
    again = [gpt2.stage(name, trainable=True) for name in ("bottom", "top")]
    Checkpoints(tmp_path).load(again)
    for one, other in zip(ends, again, strict=True):
        assert torch.equal(one.embedding.token.weight, other.embedding.token.weight)


def test_two_stages_of_one_name(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    trunks = [gpt2.stage("trunk", trainable=True) for _ in range(3)]
    with pytest.raises(BundleError, match=r"stages: expected stages of different names, got 'trunk' twice"):
        Checkpoints(tmp_path).save(1, trunks)


def test_other_objects_and_generators(setup: Setup, tmp_path: Path) -> None:
    generator, scaler = torch.Generator().manual_seed(5), torch.amp.GradScaler("cpu", init_scale=8.0)
    Checkpoints(tmp_path).save(1, setup.stage, others={"scaler": scaler}, generators={"mine": generator})
    expected = (torch.rand(3, generator=generator), torch.rand(3), random.random())
    other = torch.amp.GradScaler("cpu", init_scale=4.0)
    Checkpoints(tmp_path).load(setup.stage, others={"scaler": other}, generators={"mine": generator})
    assert other.state_dict()["scale"] == 8.0
    assert torch.equal(torch.rand(3, generator=generator), expected[0])
    assert torch.equal(torch.rand(3), expected[1])
    assert random.random() == expected[2]


class Odd:
    def __init__(self, value: object) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"deep": [{"value": self.value}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["deep"][0]["value"]


@pytest.mark.parametrize(
    "value",
    [0, -(2**80), 1.5, float("inf"), float("-inf"), True, None, "text", (1, (2.0,)), [], {}, {1: "a", "b": [True]}],
)
def test_values_come_back_as_they_were(value: object, setup: Setup, tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, setup.stage, others={"odd": Odd(value)})
    other = Odd(...)
    Checkpoints(tmp_path).load(setup.stage, others={"odd": other})
    assert other.value == value
    assert type(other.value) is type(value)


@pytest.mark.parametrize(
    "value", [torch.tensor(2.5), torch.zeros(0, 3), torch.ones(2, dtype=torch.bool), torch.arange(5, dtype=torch.int16)]
)
def test_tensors_come_back_as_they_were(value: Tensor, setup: Setup, tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, setup.stage, others={"odd": Odd(value)})
    other = Odd(...)
    Checkpoints(tmp_path).load(setup.stage, others={"odd": other})
    assert isinstance(other.value, Tensor)
    assert (other.value.dtype, other.value.shape) == (value.dtype, value.shape)
    assert torch.equal(other.value, value)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        print,
        {1, 2},
        b"x",
        1j,
        {None: 1},
        {(1, 2): 1},
        torch.ones(2, dtype=torch.complex64),
        {1: torch.ones(1), "1": torch.ones(1)},
    ],
)
def test_a_state_that_cannot_be_stored(value: object, setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"\[input.value\] others/odd/deep/0/value.*: expected tensors, numbers, text"
    ):
        Checkpoints(tmp_path).save(1, setup.stage, others={"odd": Odd(value)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("position", [(1, 2), {1: 2}, object(), float("nan"), torch.ones(1), b"x"])
def test_a_position_that_json_lacks(position: object, setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] position: expected what JSON has"):
        Checkpoints(tmp_path).save(1, setup.stage, position=position)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(setup: Setup, tmp_path: Path) -> None:
    for wrong in (0, -1, 1.5, "3", None):
        with pytest.raises(BundleError, match=r"\[input.value\] keep"):
            Checkpoints(tmp_path, keep=wrong)  # type: ignore[arg-type]
    checkpoints = Checkpoints(tmp_path)
    for step in (-1, 1.5, "x", 10**16):
        with pytest.raises(BundleError, match=r"\[input.value\] step"):
            checkpoints.save(step, setup.stage)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"\[input.value\] stages"):
        checkpoints.save(1, [])
    with pytest.raises(BundleError, match=r"\[input.value\] stages"):
        checkpoints.save(1, nn.Linear(2, 2))
    foreign = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    with pytest.raises(BundleError, match=r"\[input.value\] optimizer: expected parameters of the given stages"):
        checkpoints.save(1, setup.stage, foreign)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_something_else(setup: Setup, gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """Nothing is set when something doesn't fit."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, setup.stage, setup.optimizer, setup.schedule)
    others = {
        "bottom": Setup(gpt2, "bottom"),
        "dtype": Setup(gpt2, dtype="bfloat16"),
    }
    sgd, fewer = Setup(gpt2), Setup(gpt2)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: checkpoints.load(others["bottom"].stage), "stages"),
        (
            lambda: checkpoints.load(others["dtype"].stage, others["dtype"].optimizer, others["dtype"].schedule),
            "stages",
        ),
        (
            lambda: checkpoints.load(sgd.stage, torch.optim.SGD(sgd.stage.parameters(), lr=1.0), sgd.schedule),
            "optimizer",
        ),
        (
            lambda: checkpoints.load(
                fewer.stage, torch.optim.AdamW(list(fewer.stage.parameters())[1:]), fewer.schedule
            ),
            "optimizer",
        ),
        (lambda: checkpoints.load(fewer.stage, fewer.optimizer), "schedule"),
        (lambda: checkpoints.load(fewer.stage), "optimizer"),
        (lambda: checkpoints.load(fewer.stage, fewer.optimizer, fewer.schedule, others={"x": Odd(1)}), "others"),
        (
            lambda: checkpoints.load(fewer.stage, fewer.optimizer, fewer.schedule, generators={"x": torch.Generator()}),
            "generators",
        ),
    ]
    before = fewer.weights()
    for call, what in cases:
        with pytest.raises(BundleError, match=rf"\[checkpoint.mismatch\] .*{what}"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in fewer.weights().items())
    trained = gpt2.save_as(tmp_path / "trained.splitbundle", setup.stage)
    with pytest.raises(BundleError, match=r"\[checkpoint.mismatch\] .*bundles"):
        checkpoints.load(Setup(trained).stage, setup.optimizer, setup.schedule)


def test_other_adapters_and_classes(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    own = Setup(gpt2)
    own.stage.add_lora(2, 2, ["c_attn"])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, own.stage, schedule=own.schedule, others={"odd": Odd(1)})
    for alpha, options in ((64, {}), (2, {"rslora": True}), (2, {"dropout": 0.5})):
        other = Setup(gpt2)
        other.stage.add_lora(2, alpha, ["c_attn"], **options)
        with pytest.raises(BundleError, match=r"\[checkpoint.mismatch\] .*adapters"):
            checkpoints.load(other.stage, schedule=other.schedule, others={"odd": Odd(1)})
    again = Setup(gpt2)
    again.stage.add_lora(2, 2, ["c_attn"])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(again.optimizer, 5)
    with pytest.raises(BundleError, match=r"class of schedule: expected .*StepLR.*, got 'CosineAnnealingLR'"):
        checkpoints.load(again.stage, schedule=cosine, others={"odd": Odd(1)})
    with pytest.raises(BundleError, match="class of others/odd"):
        checkpoints.load(again.stage, schedule=again.schedule, others={"odd": torch.amp.GradScaler("cpu")})
    assert checkpoints.load(again.stage, schedule=again.schedule, others={"odd": Odd(1)}) is not None


WILD = (None, True, "x", -1, 1e300, [], {}, {"list": []}, {"dict": []}, {"tensor": "weights/layers.1.mlp.up.bias"})


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value inside of a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key != "python":  # 625 numbers
            yield from places(inner, (*path, key))


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 4))])
def test_a_hostile_state_is_refused_and_nothing_is_set(
    part: int, setup: Setup, gpt2: splitbundle.Bundle, tmp_path: Path
) -> None:
    """Each value of the state, replaced by others, gives an error of this package, or is taken."""
    checkpoints = Checkpoints(tmp_path)
    scaler, generator = torch.amp.GradScaler("cpu"), torch.Generator()
    named: dict[str, Any] = {"others": {"scaler": scaler}, "generators": {"g": generator}}
    path = checkpoints.save(1, setup.stage, setup.optimizer, setup.schedule, **named) / "checkpoint.json"
    good = path.read_text()
    other = Setup(gpt2)
    before, refused = other.weights(), 0
    for i, place in enumerate(places(json.loads(good)["state"])):
        if i % 4 != part or not place:
            continue
        document = json.loads(good)
        holder = document["state"]
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = WILD[i % len(WILD)]
        path.write_text(json.dumps(document))
        try:
            checkpoints.load(other.stage, other.optimizer, other.schedule, **named)
        except BundleError:
            refused += 1
            assert all(torch.equal(value, before[name]) for name, value in other.weights().items()), place
        else:
            other = Setup(gpt2)
    assert refused > 20


def test_a_damaged_checkpoint(setup: Setup, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, setup.stage, setup.optimizer)
    tensors, document = path / "tensors.safetensors", path / "checkpoint.json"
    good = tensors.read_bytes(), document.read_bytes()
    parsed = json.loads(good[1])

    def changed(**more: Any) -> bytes:
        return json.dumps(parsed | more).encode()

    for data, text, code in (
        (good[0][:-1] + bytes([good[0][-1] ^ 1]), good[1], "file.digest"),
        (good[0][:-1], good[1], "file.size"),
        (b"", good[1], "file.size"),
        (good[0], b"{", "json."),
        (good[0], b"[]", "field.type"),
        (good[0], changed(format="x"), "field.value"),
        (good[0], changed(format_version="9.0"), "field.value"),
        (good[0], changed(more=1), "field.unknown"),
        (good[0], changed(tensors=parsed["tensors"][1:]), "weights.layout"),
        (
            good[0],
            changed(tensors=[*parsed["tensors"], {"name": "weights/x", "dtype": "float32", "shape": [2**40]}]),
            "weights.layout",
        ),
        (good[0], changed(state=parsed["state"] | {"random": {"what": 1}}), "field.value"),
        (good[0], changed(state=parsed["state"] | {"random": [1]}), "field.value"),
        (good[0], changed(state=parsed["state"] | {"random": {"dict": [[1]]}}), "field.value"),
    ):
        tensors.write_bytes(data)
        document.write_bytes(text)
        with pytest.raises(BundleError) as caught:
            checkpoints.load(setup.stage, setup.optimizer)
        assert caught.value.codes[0].startswith(code), (code, caught.value)
    tensors.unlink()
    document.write_bytes(good[1])
    with pytest.raises(BundleError, match=r"\[file.missing\]"):
        checkpoints.load(setup.stage, setup.optimizer)
