"""What a stage refuses, and in which words: where it was, what was expected, what came."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.torch_stage import Stage
from tests.support.models import LAYERS, TOLERANCE, VOCAB, bundle, checkpoint, expected_logits, relative, token_rows

HIDDEN = 36


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bottom [0, 1), trunk [1, 3), top [3, 4); the head is its own matrix."""
    output = tmp_path_factory.mktemp("stages") / "llama.splitbundle"
    return splitbundle_converter.convert(checkpoint("llama"), output, split=(1, 3), check=False)


@pytest.fixture(scope="module")
def bottom(whole: Bundle) -> Stage:
    """Takes token ids."""
    return whole.stage("bottom")


@pytest.fixture(scope="module")
def trunk(whole: Bundle) -> Stage:
    """Takes hidden states."""
    return whole.stage("trunk")


@pytest.fixture
def copy(whole: Bundle, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy.splitbundle"))


def refusal(call: Any, *arguments: Any, **named: Any) -> str:
    """The text of the error that a call ends with."""
    with pytest.raises(BundleError) as caught:
        call(*arguments, **named)
    return str(caught.value)


# At a boundary.


@pytest.mark.rule("SB-B-012")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([[1]], "[input.type] stage bottom, token ids: expected a torch.Tensor, got list"),
        (torch.zeros(1, 2), "[input.dtype] stage bottom, token ids: expected an integer dtype, got torch.float32"),
        (
            torch.zeros(1, 2, dtype=torch.bool),
            "[input.dtype] stage bottom, token ids: expected an integer dtype, got torch.bool",
        ),
        (
            torch.tensor([1, 2]),
            "[input.shape] stage bottom, token ids: expected (batch, sequence), neither 0, got (2,)",
        ),
        (
            torch.zeros(2, 0, dtype=torch.int64),
            "[input.shape] stage bottom, token ids: expected (batch, sequence), neither 0, got (2, 0)",
        ),
        (
            torch.zeros(0, 2, dtype=torch.int64),
            "[input.shape] stage bottom, token ids: expected (batch, sequence), neither 0, got (0, 2)",
        ),
        (torch.tensor([[1, VOCAB]]), "[input.value] stage bottom, token ids: expected ids from 0 to 60, got 61"),
        (torch.tensor([[1, -1]]), "[input.value] stage bottom, token ids: expected ids from 0 to 60, got -1"),
        (
            torch.zeros(1, 2, dtype=torch.int64, device="meta"),
            "[input.device] stage bottom, token ids: expected cpu, where this stage is, got meta",
        ),
    ],
)
def test_token_ids(bottom: Stage, given: Any, text: str) -> None:
    hint = ". Move it with .to(...), or open the stage with device=" if text.startswith("[input.device]") else ""
    assert refusal(bottom, given) == text + hint


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_dtype_will_do(bottom: Stage, dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 60, 0]])
    assert torch.equal(bottom(ids.to(dtype)), bottom(ids))


@pytest.mark.rule("SB-B-001")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            torch.zeros(1, 2, HIDDEN, dtype=torch.bfloat16),
            "[input.dtype] stage trunk, hidden at layer 1: expected torch.float32, as this stage computes, "
            "got torch.bfloat16",
        ),
        (
            torch.zeros(1, 2, dtype=torch.int64),
            "[input.dtype] stage trunk, hidden at layer 1: expected torch.float32, as this stage computes, "
            "got torch.int64",
        ),
        (
            torch.zeros(1, 2, HIDDEN + 1),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (1, 2, 37)",
        ),
        (
            torch.zeros(2, HIDDEN),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (2, 36)",
        ),
        (
            torch.zeros(1, 0, HIDDEN),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (1, 0, 36)",
        ),
        (
            torch.zeros(1, 1, 2, HIDDEN),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (1, 1, 2, 36)",
        ),
        (
            None,
            "[input.type] stage trunk, hidden at layer 1: expected a torch.Tensor, got NoneType",
        ),
    ],
)
def test_hidden_states(trunk: Stage, given: Any, text: str) -> None:
    hints = {
        "input.dtype": "Convert it with .to(stage.dtype), or open the stage with dtype=",
        "input.shape": "It must be what the stage before gave, of the same model",
        "input.device": "Move it with .to(...), or open the stage with device=",
    }
    hint = hints.get(text[1 : text.index("]")])
    assert refusal(trunk, given) == (f"{text}. {hint}" if hint else text)


@pytest.mark.rule("SB-B-002", "SB-B-009")
@pytest.mark.parametrize(
    ("named", "text"),
    [
        (
            {"past": [1, 0]},
            "[input.position] stage trunk, past: expected 0 for every row without a cache, got [1, 0]",
        ),
        ({"past": [0]}, "[input.shape] stage trunk, past: expected 2 rows, as the tokens, got 1"),
        ({"past": [-1, 0]}, "[input.value] stage trunk, past: expected integers from 0 to 2147483648, got [-1, 0]"),
        (
            {"past": torch.zeros(2)},
            "[input.dtype] stage trunk, past: expected (batch) of an integer dtype, got torch.float32 (2,)",
        ),
        (
            {"past": torch.zeros(2, 1, dtype=torch.int64)},
            "[input.dtype] stage trunk, past: expected (batch) of an integer dtype, got torch.int64 (2, 1)",
        ),
        ({"count": [3, 4]}, "[input.value] stage trunk, count: expected integers from 0 to 3, got [3, 4]"),
        ({"count": [3, -1]}, "[input.value] stage trunk, count: expected integers from 0 to 3, got [3, -1]"),
        ({"count": [3, True]}, "[input.value] stage trunk, count: expected integers from 0 to 3, got [3, True]"),
        ({"count": [3, 3, 3]}, "[input.shape] stage trunk, count: expected 2 rows, as the tokens, got 3"),
    ],
)
def test_past_and_count(trunk: Stage, named: dict[str, Any], text: str) -> None:
    assert refusal(trunk, torch.zeros(2, 3, HIDDEN), **named) == text


@pytest.mark.rule("SB-B-009")
def test_a_past_that_the_cache_does_not_hold(trunk: Stage) -> None:
    """A stage that was restarted, or missed a call, must not go on over a hole."""
    cache = trunk.cache(2, 16)
    trunk(torch.ones(2, 3, HIDDEN), cache=cache, count=[3, 2])
    text = refusal(trunk, torch.ones(2, 1, HIDDEN), past=[3, 3], cache=cache)
    assert text == "[input.position] past[1]: expected at most 2, the positions that this stage's cache holds, got 3"
    trunk(torch.ones(2, 1, HIDDEN), past=[3, 2], cache=cache)


@pytest.mark.rule("SB-B-010")
def test_a_cache_that_is_too_small(trunk: Stage) -> None:
    cache = trunk.cache(1, 4)
    text = refusal(trunk, torch.ones(1, 5, HIDDEN), cache=cache)
    assert text == "[session.capacity] capacity: expected at least 5 slots, got 4. Open a session with more capacity"
    assert refusal(trunk.cache, 1, 0) == "[session.capacity] capacity: expected at least 1, got 0"


def test_a_cache_of_other_rows(trunk: Stage) -> None:
    text = refusal(trunk, torch.ones(1, 2, HIDDEN), cache=trunk.cache(3, 4))
    assert text == "[input.shape] batch: expected 3 rows, as the cache, got 1"


@pytest.mark.rule("SB-B-011")
def test_a_stage_by_hand_that_refuses_writes_nothing(whole: Bundle) -> None:
    top = whole.stage("top")
    cache = top.cache(1, 8)
    refusal(top, torch.ones(1, 2, HIDDEN), cache=cache, logits=0)
    assert cache.filled == [0]
    assert not any(tensor.any() for tensor in (*cache.keys.values(), *cache.values.values()))


@pytest.mark.parametrize("logits", ["first", 0, -1, 1.0, None, True])
def test_logits_that_cannot_be_wanted(whole: Bundle, logits: Any) -> None:
    text = refusal(whole.stage("top"), torch.zeros(1, 2, HIDDEN), logits=logits)
    assert (
        text == f'[input.value] stage top, logits: expected "all", "last" or a number from 1 to 1048576, got {logits!r}'
    )


@pytest.mark.rule("SB-B-005")
@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            torch.tensor([[1, 1, 1], [1, 0, 1]]),
            "[input.mask] attention_mask: expected one run of ones, the rest zeros, in row 1, got [1, 0, 1]",
        ),
        (
            torch.tensor([[1, 2, 1], [1, 0, 0]]),
            "[input.mask] attention_mask: expected one run of ones, the rest zeros, in row 0, got [1, 2, 1]",
        ),
        (
            torch.tensor([[0.0, 0.5, 1.0], [1, 0, 0]]),
            "[input.mask] attention_mask: expected one run of ones, the rest zeros, in row 0, got [0.0, 0.5, 1.0]",
        ),
        (
            torch.ones(2, 5),
            "[input.shape] attention_mask: expected (2, 3), as token_ids: the mask covers this call's tokens only, "
            "got (2, 5)",
        ),
        (
            torch.ones(3),
            "[input.shape] attention_mask: expected (2, 3), as token_ids: the mask covers this call's tokens only, "
            "got (3,)",
        ),
        (
            [[1, 1, 1], [1, 1, 1]],
            "[input.shape] attention_mask: expected (2, 3), as token_ids: the mask covers this call's tokens only, "
            "got list",
        ),
    ],
)
def test_masks(whole: Bundle, mask: Any, text: str) -> None:
    ids = torch.tensor(token_rows(3, 3))
    assert refusal(whole.pipeline(), ids, attention_mask=mask) == text


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_a_mask_of_any_dtype_will_do(whole: Bundle, dtype: torch.dtype) -> None:
    ids = torch.tensor(token_rows(3))
    mask = torch.tensor([[0, 1, 1]])
    pipeline = whole.pipeline()
    assert torch.equal(pipeline(ids, attention_mask=mask.to(dtype)), pipeline(ids, attention_mask=mask))


@pytest.mark.rule("SB-B-002", "SB-B-003")
def test_padding_crosses_a_boundary_as_zeros(bottom: Stage, trunk: Stage) -> None:
    """Whatever stood there: another runtime may be at the other end, and nothing of it may leak or matter."""
    ids = torch.tensor(token_rows(5, 5, 5))
    count = [5, 2, 0]
    hidden = bottom(ids, count=count)
    noise = hidden.clone()
    for row, number in enumerate(count):
        assert not hidden[row, number:].any()
        assert hidden[row, :number].all(dim=-1).all()
        noise[row, number:] = 1e3
    assert torch.equal(trunk(noise, count=count), trunk(hidden, count=count))
    assert torch.equal(bottom(ids)[0], hidden[0])


# Parts that don't exist.


def test_a_shard_that_does_not_exist(whole: Bundle) -> None:
    assert refusal(whole.stage, "middle") == (
        "[stage.name] shard: expected a shard of llama.splitbundle: bottom, trunk, top, got 'middle'. "
        "Any other part: stage(layers=(start, stop)) within 0..4"
    )


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        ((0, 5), "(0, 5)"),
        ((3, 2), "(3, 2)"),
        ((-1, 2), "(-1, 2)"),
        ((1, 2, 3), "(1, 2, 3)"),
        ((0, 2.0), "(0, 2.0)"),
        ((False, True), "(False, True)"),
        (3, "3"),
    ],
)
def test_a_range_out_of_bounds(whole: Bundle, layers: Any, got: str) -> None:
    text = f"[stage.range] layers: expected (start, stop) with 0 <= start <= stop <= 4, got {got}"
    assert refusal(whole.stage, layers=layers) == text


@pytest.mark.parametrize(
    "named",
    [
        {"layers": (2, 2)},
        {"layers": (1, 3), "embeds": True},
        {"layers": (1, 3), "head": True},
        {"layers": (0, 0), "embeds": False},
        {"layers": (4, 4), "head": False},
    ],
    ids=str,
)
def test_a_range_that_computes_nothing_or_cannot_begin_there(whole: Bundle, named: dict[str, Any]) -> None:
    start, stop = named["layers"]
    embeds, head = named.get("embeds", start == 0), named.get("head", stop == LAYERS)
    assert refusal(whole.stage, **named) == (
        "[stage.range] layers: expected a range with a layer, the embedding (at 0) or the head (at 4), "
        f"got layers=({start}, {stop}), embeds={embeds}, head={head}"
    )


def test_a_name_and_a_range_at_once(whole: Bundle) -> None:
    text = "[stage.range] layers: expected a shard's name or layers=, got both or neither"
    assert refusal(whole.stage, "bottom", layers=(0, 1)) == text
    assert refusal(whole.stage) == text


def test_the_ends_alone(whole: Bundle) -> None:
    """A stage may be the embedding alone, or the head alone, and the rest another one."""
    embedding, layers, head = (
        whole.stage(layers=(0, 0)),
        whole.stage(layers=(0, 4), embeds=False, head=False),
        whole.stage(layers=(4, 4)),
    )
    ids = token_rows(5)
    logits = head(layers(embedding(torch.tensor(ids))))
    assert relative(logits[0], expected_logits("llama", tuple(ids[0]))) <= TOLERANCE


@pytest.mark.parametrize("open_part", ["stage", "pipeline"])
def test_backends_and_dtypes_that_do_not_exist(whole: Bundle, open_part: str) -> None:
    name = ("bottom",) if open_part == "stage" else ()
    call = getattr(whole, open_part)
    text = refusal(call, *name, backend="tensorflow")
    assert text.startswith("[stage.backend] backend: expected torch")
    assert text.endswith(", got 'tensorflow'")
    text = "[input.dtype] dtype: expected one of float32, float16, bfloat16, got "
    assert refusal(call, *name, dtype="int8") == f"{text}'int8'"
    assert refusal(call, *name, dtype="float64") == f"{text}'float64'"
    assert refusal(call, *name, dtype=torch.int64) == f"{text}'torch.int64'"


def test_a_device_that_is_not_here(whole: Bundle) -> None:
    for device in ("nonsense", "cuda:99"):
        text = refusal(whole.pipeline, device=device)
        assert text.startswith(f"[input.device] device: expected a device that torch has here, got '{device}': ")
    assert whole.stage("bottom", device="cpu").device == torch.device("cpu")


def test_sessions_of_no_rows_or_slots(whole: Bundle) -> None:
    pipeline = whole.pipeline()
    assert refusal(pipeline.session, 0) == "[input.value] batch_size: expected a number from 1, got 0"
    assert refusal(pipeline.session, 1, 0).startswith("[session.capacity] capacity: expected ")


def test_a_backend_that_is_not_installed(whole: Bundle) -> None:
    """The error says what to type, in a process where torch can't be imported."""
    program = f"""
import sys
sys.modules["torch"] = None
import splitbundle
try:
    splitbundle.open({str(whole.path)!r}).stage("bottom")
except splitbundle.MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (
        '[backend.missing] expected the library torch, to compute with backend="torch", '
        'got no such library in this environment. Install it: pip install "splitbundle[torch]"\n'
    )


# Files that aren't there, or aren't what the manifest lists.


def test_a_partial_bundle_runs_the_part_that_is_there(whole: Bundle, copy: Path) -> None:
    for unit in ("layer-001", "layer-002", "layer-003", "head"):
        (copy / f"{unit}.safetensors").unlink()
    partial = splitbundle.open(copy)
    ids = torch.tensor(token_rows(5))
    assert torch.equal(partial.stage("bottom")(ids), whole.stage("bottom")(ids))
    missing = "expected a file that the manifest lists, got none. Copy it from a whole bundle with the same fingerprint"
    assert refusal(partial.stage, "trunk") == f"[file.missing] layer-001.safetensors: {missing}"
    assert refusal(partial.stage, layers=(0, 2)) == f"[file.missing] layer-001.safetensors: {missing}"
    assert refusal(partial.stage, layers=(4, 4)) == f"[file.missing] head.safetensors: {missing}"
    assert refusal(partial.pipeline) == f"[file.missing] layer-001.safetensors: {missing}"
    assert partial.absent() == tuple(f"{unit}.safetensors" for unit in ("head", "layer-001", "layer-002", "layer-003"))
    partial.verify("bottom")


def test_a_truncated_file(copy: Path) -> None:
    """Found before anything is mapped: a mapping beyond the end of a file kills the process."""
    path = copy / "layer-001.safetensors"
    data = path.read_bytes()
    opened = splitbundle.open(copy)
    for size in (len(data) - 1, 4096, 10, 0):
        path.write_bytes(data[:size])
        assert refusal(opened.stage, "trunk") == (
            f"[file.size] layer-001.safetensors: expected {len(data)} bytes, got {size} bytes. "
            "The file isn't the one that the manifest lists: fetch or convert it again"
        )
        opened.stage("bottom")


def test_a_file_with_another_header(copy: Path) -> None:
    """Another model's file of the same size: the layer after it, under its name."""
    other = (copy / "layer-002.safetensors").read_bytes()
    listed = json.loads((copy / "manifest.json").read_text())["files"]["layer-001.safetensors"]
    (copy / "layer-001.safetensors").write_bytes(other)
    assert len(other) == listed["size"]
    length = 8 + int.from_bytes(other[:8], "little")
    assert refusal(splitbundle.open(copy).stage, "trunk") == (
        f"[file.header-digest] layer-001.safetensors: expected a header with sha256 {listed['header_sha256']}, "
        f"got {hashlib.sha256(other[:length]).hexdigest()}. The file isn't the one that the manifest lists"
    )


def test_a_header_that_does_not_say_its_length(copy: Path) -> None:
    path = copy / "layer-001.safetensors"
    data = path.read_bytes()
    for length, text in (
        (2**63, f"expected a header of at most {len(data) - 8} bytes, got a length of {2**63}"),
        (len(data), f"expected a header of at most {len(data) - 8} bytes, got a length of {len(data)}"),
        (100, "expected data that begins at a multiple of 4096, got data at 108"),
    ):
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        assert refusal(splitbundle.open(copy).stage, "trunk") == (
            f"[weights.header] layer-001.safetensors byte 0: {text}"
        )


def test_other_values_under_the_right_header(copy: Path) -> None:
    """Opening doesn't read the weights; verifying does."""
    path = copy / "layer-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = splitbundle.open(copy)
    damaged.stage("trunk")
    digest = damaged.manifest.files["layer-001.safetensors"].sha256
    assert refusal(damaged.verify, "trunk") == (
        f"[file.digest] layer-001.safetensors: expected sha256 {digest}, got {hashlib.sha256(data).hexdigest()}. "
        "The file isn't the one that the manifest lists: fetch or convert it again"
    )
    damaged.verify("bottom")


def test_a_link_in_a_file_s_place(copy: Path, whole: Bundle) -> None:
    path = copy / "layer-001.safetensors"
    path.unlink()
    path.symlink_to(whole.path / "layer-001.safetensors")
    assert refusal(splitbundle.open(copy).stage, "trunk") == (
        "[file.kind] layer-001.safetensors: expected a regular file in real directories, "
        "got layer-001.safetensors is a symbolic link. "
        "Put the file itself there: cp -rL copies what links point to"
    )


def test_no_bundle_at_all(tmp_path: Path) -> None:
    hint = "splitbundle convert SOURCE -o NAME.splitbundle makes one"
    expected = "expected a bundle, a directory with a manifest.json"
    there = tmp_path / "file"
    there.write_bytes(b"")
    for path, got in (
        (tmp_path / "none", "nothing there"),
        (tmp_path, "a directory without it"),
        (there, "a file"),
    ):
        assert refusal(splitbundle.open, path) == f"[file.missing] {path}: {expected}, got {got}. {hint}"


def test_a_tied_head_alone_has_its_table() -> None:
    """Its shard lists the embedding's unit, and the stage embeds nothing."""
    whole = bundle("gpt2")
    top = whole.stage(layers=(2, 4))
    assert "embedding" in whole.select(layers=(2, 4)).units
    text = refusal(top, torch.zeros(1, 2, dtype=torch.int64))
    assert text == (
        "[input.dtype] stage layers[2:4], hidden at layer 2: expected torch.float32, as this stage computes, "
        "got torch.int64. Convert it with .to(stage.dtype), or open the stage with dtype="
    )


def test_type_checkers_know_the_stages_of_each_backend(tmp_path: Path) -> None:
    program = """
import splitbundle
bundle = splitbundle.open("x")
reveal_type(bundle.stage("a"))
reveal_type(bundle.pipeline(dtype="float32"))
reveal_type(bundle.stage(layers=(0, 1), backend="onnxruntime", threads=1))
reveal_type(bundle.pipeline(backend="onnxruntime"))
"""
    (tmp_path / "consumer.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent"]
    done = subprocess.run([*command, "consumer.py"], cwd=tmp_path, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "splitbundle\.(\S+)"', done.stdout)
    expected = [
        "torch_stage.Stage",
        "torch_pipeline.Pipeline",
        "onnxruntime_stage.Stage",
        "onnxruntime_pipeline.Pipeline",
    ]
    assert revealed == expected, done.stdout
