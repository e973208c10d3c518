"""Parts that split learning left on disk, put together: three state dicts, and beside each what it is a part of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.cli import main
from splitbundle_converter.families.table import FAMILIES
from tests.support.checkpoints import MISSING, said
from tests.support.models import bundle, checkpoint, load_original, make_model, original_logits, token_rows

pytestmark = pytest.mark.usefixtures("one_thread", "pickles_here")

CUTS: Final = (1, 3)
RANGES: Final = {"bottom": (0, 1), "trunk": (1, 3), "top": (3, 4)}
GPT2: Final = "a name of gpt2's tensors, with or without 'transformer.', its layers numbered from 0: such as"

Tensors = dict[str, Tensor]
Rename = Callable[[str], str]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """An empty directory for parts."""
    (tmp_path / "parts").mkdir()
    return tmp_path / "parts"


def cut(name: str, ranges: dict[str, tuple[int, int]] = RANGES) -> dict[str, Tensors]:
    """Return the tensors of a named model by part. Layers count from 0 in each; a tied head is copied to the top."""
    tensors = dict(make_model(name).state_dict())
    layers = FAMILIES[json.loads((checkpoint(name) / "config.json").read_text())["model_type"]].layers
    made: dict[str, Tensors] = {part: {} for part in ranges}
    last = list(ranges)[-1]
    for key, tensor in tensors.items():
        if key.startswith(f"{layers}."):
            number, _, inner = key.removeprefix(f"{layers}.").partition(".")
            part, (start, _) = next((p, r) for p, r in ranges.items() if r[0] <= int(number) < r[1])
            made[part][f"{layers}.{int(number) - start}.{inner}"] = tensor
        else:
            norm = "ln_f" in key or key.startswith(("model.norm.", "lm_head.", "model.decoder.final_layer_norm."))
            made[last if norm else "bottom"][key] = tensor
    return made


def write(
    path: Path,
    name: str,
    *,
    tensors: dict[str, Tensors] | None = None,
    ranges: dict[str, tuple[int, int]] = RANGES,
    rename: Rename = lambda key: key,
    inclusive: bool = False,
    files: str = "{part}.pt",
    metadata: str = "{part}_metadata.json",
    **fields: dict[str, Any],
) -> Path:
    """Write the parts. ``fields`` change the metadata of a part; ``...`` removes a field."""
    config = json.loads((checkpoint(name) / "config.json").read_text())
    for part, state in (cut(name, ranges) if tensors is None else tensors).items():
        torch.save({rename(key): tensor for key, tensor in state.items()}, path / files.format(part=part))
        start, stop = ranges[part]
        said = {"component": part, "start_layer": start, "end_layer": stop - inclusive, "config": config, "seed": 7}
        said = {key: value for key, value in (said | fields.get(part, {})).items() if value is not ...}
        (path / metadata.format(part=part)).write_text(json.dumps(said))
    return path


def convert(path: Path, output: Path, **named: Any) -> Any:
    """Convert, and check that only the bundle is left."""
    made = splitbundle_converter.convert(path, output, allow_pickle=True, **named)
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]
    return made


def refused(path: Path, output: Path, *, allow_pickle: bool = True) -> BundleError:
    """Return the error of a conversion, and check that no file is left."""
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(path, output, allow_pickle=allow_pickle, check=False)
    assert not list(output.parent.iterdir())
    return caught.value


# What converts.


@pytest.mark.parametrize(("name", "inclusive"), [("gpt2", False), ("llama", True)])
def test_three_parts_are_the_model(child: None, parts: Path, output: Path, name: str, inclusive: bool) -> None:
    """The bundle keeps the cuts, passes the check, and has the fingerprint of the whole checkpoint."""
    made = convert(write(parts, name, inclusive=inclusive), output)
    assert made.manifest.vectors is not None
    assert made.fingerprint == bundle(name).fingerprint
    assert [(shard.name, shard.layers) for shard in made.shards] == list(RANGES.items())
    source = dict(splitbundle_converter.source_tensors(made))
    whole = make_model(name).state_dict()
    assert source.keys() == whole.keys()
    assert all(torch.equal(source[key], whole[key]) for key in whole)
    # The configuration in the metadata of the parts becomes a file. So the model goes back to Hugging Face whole.
    back = splitbundle_converter.export(made, parts / "back")
    (ids,) = token_rows(5)
    assert torch.equal(original_logits(load_original(back), ids), original_logits(load_original(checkpoint(name)), ids))


@pytest.mark.parametrize(
    ("name", "inclusive"),
    [
        ("gpt2", False),
        ("llama", True),
        *(pytest.param(name, False, marks=pytest.mark.long) for name in ("opt", "gpt_neox", "bloom")),
    ],
)
def test_parts_that_are_the_state_dicts_of_stages(parts: Path, output: Path, name: str, inclusive: bool) -> None:
    """Their layers have global numbers. A tied head's table is in both ends."""
    stages = [bundle(name).stage(layers=layers, head=part == "top") for part, layers in RANGES.items()]
    tensors = {part: stage.state_dict() for part, stage in zip(RANGES, stages, strict=True)}
    made = convert(write(parts, name, tensors=tensors, inclusive=inclusive), output)
    assert made.fingerprint == bundle(name).fingerprint


def test_a_tied_table_that_was_trained_at_both_ends(parts: Path, output: Path) -> None:
    stages = [bundle("gpt2").stage(layers=layers) for layers in RANGES.values()]
    tensors = {part: dict(stage.state_dict()) for part, stage in zip(RANGES, stages, strict=True)}
    tensors["top"]["embedding.token.weight"] = tensors["top"]["embedding.token.weight"] + 1
    error = refused(write(parts, "gpt2", tensors=tensors), output)
    assert "top.pt /embedding.token.weight: expected the table that the bottom has" in str(error)
    assert "sum_tied_gradients" in str(error)
    del tensors["trunk"]["layers.1.attention.key.weight"]
    tensors["top"]["embedding.token.weight"] = tensors["bottom"]["embedding.token.weight"]
    for old in parts.iterdir():
        old.unlink()
    assert "only layers.1.attention.query.weight" in str(refused(write(parts, "gpt2", tensors=tensors), output))


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("gpt2", lambda key: key.removeprefix("transformer.")),
        ("gpt2", lambda key: key.removeprefix("transformer.").replace("h.", "layers.", 1) if ".h." in key else key),
        ("gpt2", lambda key: key.replace("transformer.h.", "blocks.")),
        ("llama", lambda key: key.removeprefix("model.")),
        ("opt", lambda key: key.removeprefix("model.")),
        ("opt", lambda key: key.removeprefix("model.decoder.")),
    ],
)
def test_names_without_their_surroundings(parts: Path, output: Path, name: str, rename: Rename) -> None:
    assert convert(write(parts, name, rename=rename), output, check=False).fingerprint == bundle(name).fingerprint


def test_a_split_of_ones_own_wins(parts: Path, output: Path) -> None:
    write(parts, "gpt2")
    made = convert(parts, output, split=[2], names=["client", "server"], check=False)
    assert [(shard.name, shard.layers) for shard in made.shards] == [("client", (0, 2)), ("server", (2, 4))]
    shutil.rmtree(output)
    assert len(convert(parts, output, split=[], check=False).shards) == 1


def test_the_command_cuts_them_where_they_were_cut(parts: Path, output: Path) -> None:
    """``split`` moves the cuts, and a resplit without ``split`` has none."""
    words = ["convert", str(write(parts, "gpt2")), "--allow-pickle", "--no-check", "--quiet", "-o", str(output)]
    assert main.main(words) == 0
    assert [(shard.name, shard.layers) for shard in splitbundle.open(output).shards] == list(RANGES.items())
    assert main.main([*words, "--force", "--split", "2"]) == 0
    assert splitbundle.open(output).manifest.cuts == (2,)
    assert main.main(["resplit", str(output), "--force", "--quiet"]) == 0
    assert splitbundle.open(output).manifest.cuts == ()


@pytest.mark.parametrize(
    "ranges",
    [
        {"bottom": (0, 0), "trunk": (0, 4), "top": (4, 4)},
        {"bottom": (0, 3), "top": (3, 4)},
    ],
)
@pytest.mark.parametrize("inclusive", [False, True])
def test_other_parts(parts: Path, output: Path, ranges: dict[str, tuple[int, int]], inclusive: bool) -> None:
    """The bottom only embeds, the top is only the head, and there is no trunk."""
    made = convert(write(parts, "gpt2", ranges=ranges, inclusive=inclusive), output, check=False)
    assert made.fingerprint == bundle("gpt2").fingerprint
    assert [(shard.name, shard.layers) for shard in made.shards] == list(ranges.items())


def test_two_trunks(parts: Path, output: Path) -> None:
    ranges = {"bottom": (0, 1), "x": (1, 2), "y": (2, 3), "top": (3, 4)}
    trunk = {"component": "trunk"}
    made = convert(write(parts, "gpt2", ranges=ranges, x=trunk, y=trunk), output, check=False)
    assert made.fingerprint == bundle("gpt2").fingerprint
    assert [shard.name for shard in made.shards] == ["bottom", "trunk-1", "trunk-2", "top"]


@pytest.mark.parametrize(
    ("files", "metadata"),
    [
        ("gpt2_{part}.pt", "gpt2_{part}_metadata.json"),
        ("{part}.pt", "{part}.pt_metadata.json"),
        ("{part}.pth", "{part}_metadata.json"),
    ],
)
def test_names_of_files(parts: Path, output: Path, files: str, metadata: str) -> None:
    made = convert(write(parts, "gpt2", files=files, metadata=metadata), output, check=False)
    assert made.fingerprint == bundle("gpt2").fingerprint


def test_what_stands_beside_the_parts(parts: Path, output: Path) -> None:
    """The tokenizer is copied, a configuration must agree, and other pickles are ignored."""
    write(parts, "gpt2")
    shutil.copy(checkpoint("gpt2") / "config.json", parts)
    (parts / "tokenizer_config.json").write_text("{}")
    (parts / "optimizer.pt").write_bytes(b"never read")
    assert "tokenizer/tokenizer_config.json" in convert(parts, output, check=False).manifest.files


def test_masks_of_old_gpt2_may_stand_in_every_part(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    for state in tensors.values():
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.uint8)
    assert convert(write(parts, "gpt2", tensors=tensors), output, check=False).fingerprint == bundle("gpt2").fingerprint


# What doesn't.


def test_without_the_flag(parts: Path, output: Path) -> None:
    text = str(refused(write(parts, "gpt2"), output, allow_pickle=False))
    assert text.startswith("[source.pickle] bottom.pt: expected weights in model.safetensors or ")
    assert "Or allow_pickle=True: " in text


def test_a_tied_head_that_was_trained_away(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    tensors["top"]["lm_head.weight"] = tensors["top"]["lm_head.weight"] + 1e-6
    assert str(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        "[source.tensor] top.pt /lm_head.weight: expected the values of transformer.wte.weight, as "
        "tie_word_embeddings is true, got other values. "
        "If the head was trained apart from the embedding, save the model with tie_word_embeddings false"
    )


COUNTS: Final = "The parts are bottom, trunk, top, with 1, 2, 1 layers"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"trunk": {"start_layer": 2, "end_layer": 4}},
            f"trunk_metadata.json /start_layer: expected 1, so that the parts cover the model, got 2. {COUNTS}",
        ),
        (
            {"trunk": {"end_layer": 4}},
            "trunk_metadata.json /end_layer: expected 3 (or 2, the last layer), as trunk.pt has 2 layers, got 4. "
            f"{COUNTS}",
        ),
        (
            {"trunk": {"end_layer": 2}},
            "top_metadata.json /end_layer: expected the last layer in all parts, or the number after it in all parts, "
            f"got 0 to 1, 1 to 2, 3 to 4. {COUNTS}",
        ),
    ],
)
def test_ranges_that_do_not_tile(parts: Path, output: Path, fields: dict[str, Any], text: str) -> None:
    assert str(refused(write(parts, "gpt2", **fields), output)) == f"[source.parts] {text}"


def test_fewer_layers_than_the_configuration_has(parts: Path, output: Path) -> None:
    config = json.loads((checkpoint("gpt2") / "config.json").read_text()) | {"n_layer": 5}
    fields = {part: {"config": config} for part in RANGES}
    assert str(refused(write(parts, "gpt2", **fields), output)) == (
        f"[source.parts] top_metadata.json /end_layer: expected 5 layers in all, as the configuration has them, got 4. "
        f"{COUNTS}"
    )


def test_configurations_that_differ(parts: Path, output: Path) -> None:
    """Parts may differ in a field that changes no number, here the origin of the model."""
    config = json.loads((checkpoint("gpt2") / "config.json").read_text())
    fields = {
        "trunk": {"config": config | {"n_head": 7, "_name_or_path": "elsewhere"}},
        "top": {"config": {key: value for key, value in config.items() if key != "n_embd"}},
    }
    assert said(refused(write(parts, "gpt2", **fields), output)) == (
        "[source.parts] trunk_metadata.json /config/n_head: expected 5, as in bottom_metadata.json, got 7\n"
        "[source.parts] top_metadata.json /config/n_embd: expected 35, as in bottom_metadata.json, got none"
    )


def test_parts_of_two_types_with_the_same_fields(parts: Path, output: Path) -> None:
    """A different model type is refused, although it is among the ignored fields."""
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    for name in ("attention_bias", "mlp_bias", "pretraining_tp"):  # mistral hasn't these
        del config[name]
    types = {"bottom": "llama", "trunk": "llama", "top": "mistral"}
    write(parts, "llama", **{part: {"config": config | {"model_type": types[part]}} for part in types})
    assert str(refused(parts, output)) == (
        "[source.parts] top_metadata.json /config: expected the model that bottom_metadata.json describes, "
        "got another: mistral, and not llama. Save every part with the configuration of the whole"
    )


def test_two_files_of_one_part(parts: Path, output: Path) -> None:
    write(parts, "gpt2")
    shutil.copy(parts / "bottom.pt", parts / "bottom.pth")
    assert str(refused(parts, output)) == (
        "[source.parts] bottom_metadata.json: expected one file of weights beside it, got bottom.pt and bottom.pth. "
        "Remove the one that you do not want"
    )


def test_problems_are_not_listed_without_end(parts: Path, output: Path) -> None:
    write(parts, "gpt2")
    for number in range(300):
        (parts / f"x{number}_metadata.json").write_text("{}")
    assert refused(parts, output).codes == ("source.missing",) * 100


def test_a_configuration_beside_them_of_another_model(parts: Path, output: Path) -> None:
    write(parts, "gpt2")
    shutil.copy(checkpoint("gpt2-one-head") / "config.json", parts)
    assert str(refused(parts, output)) == (
        "[source.parts] config.json: expected the model that bottom_metadata.json describes, got another. "
        "Remove the one that you do not want"
    )


def test_a_configuration_that_cannot_be_converted(parts: Path, output: Path) -> None:
    fields = {part: {"config": {"model_type": "bert"}} for part in RANGES}
    text = str(refused(write(parts, "gpt2", **fields), output))
    assert text.startswith("[source.family] bottom_metadata.json /config/model_type: expected one of ")


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (
            "bottom",
            "parts: expected one bottom, one top, and what lies between them, "
            "got top (top_metadata.json), trunk (trunk_metadata.json)",
        ),
        ("top", "parts: expected one bottom, one top, and what lies between them, got bottom (bottom_metadata.json), "),
        (
            "trunk",
            "top_metadata.json /start_layer: expected 1, so that the parts cover the model, got 3. The parts are ",
        ),
    ],
)
def test_a_part_that_is_missing(parts: Path, output: Path, part: str, text: str) -> None:
    write(parts, "gpt2")
    (parts / f"{part}.pt").unlink()
    assert said(refused(parts, output)) == (
        f"[source.missing] {part}.pt: expected the weights that its metadata describe, got none"
    )
    (parts / f"{part}_metadata.json").unlink()
    assert said(refused(parts, output)).startswith(f"[source.parts] {text}")


def test_a_part_without_metadata_is_mentioned(parts: Path, output: Path) -> None:
    write(parts, "gpt2")
    (parts / "trunk_metadata.json").unlink()
    assert str(refused(parts, output)).endswith("; no metadata describes trunk.pt")


@pytest.mark.parametrize(
    ("prefix", "wrapper", "remedy"),
    [
        ("module.", "DistributedDataParallel", "of the model inside: "),
        ("_orig_mod.", "torch.compile", "of the model that was compiled, and not that of the compiled one"),
    ],
)
def test_parts_of_a_wrapped_model(parts: Path, output: Path, prefix: str, wrapper: str, remedy: str) -> None:
    write(parts, "gpt2", rename=lambda key: prefix + key)
    assert str(refused(parts, output)).startswith(
        "[source.tensor] bottom.pt: expected the names that the model's tensors have, "
        f"got names that all begin with {prefix!r}, as {wrapper} makes them. Save the state dict {remedy}"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"component": ...},
            "[field.missing] trunk_metadata.json (the whole document): expected a field 'component', ",
        ),
        (
            {"start_layer": ...},
            "[field.missing] trunk_metadata.json (the whole document): expected a field 'start_layer'",
        ),
        (
            {"end_layer": ...},
            "[field.missing] trunk_metadata.json (the whole document): expected a field 'end_layer', ",
        ),
        ({"config": ...}, "[field.missing] trunk_metadata.json (the whole document): expected a field 'config', "),
        ({"component": "middle"}, "[field.value] trunk_metadata.json /component: expected one of bottom, trunk, top, "),
        ({"start_layer": "1"}, "[field.type] trunk_metadata.json /start_layer: expected an integer, got '1'"),
        ({"start_layer": -1}, "[field.value] trunk_metadata.json /start_layer: expected an integer from 0 to "),
        ({"end_layer": 1.5}, "[field.type] trunk_metadata.json /end_layer: expected an integer, got 1.5"),
        ({"config": "gpt2"}, "[field.type] trunk_metadata.json /config: expected an object, got 'gpt2'"),
    ],
)
def test_metadata(parts: Path, output: Path, fields: dict[str, Any], text: str) -> None:
    assert str(refused(write(parts, "gpt2", trunk=fields), output)).startswith(text)


def test_metadata_that_are_no_json(parts: Path, output: Path) -> None:
    write(parts, "gpt2")
    (parts / "top_metadata.json").write_text('{"component": "top", "component": "top"}')
    assert refused(parts, output).codes == ("json.duplicate-key",)


def test_layers_with_their_global_numbers(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    tensors["trunk"] = {
        key.replace("h.1.", "h.2.").replace("h.0.", "h.1."): tensor
        for key, tensor in reversed(tensors["trunk"].items())
    }
    assert str(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        "[source.parts] trunk.pt: expected layers numbered from 0 to 1, got 2 layers, 1 to 2. "
        "In each part the layers count from 0; start_layer says where they stand in the model"
    )


@pytest.mark.parametrize(
    "key",
    ["module.h.0.ln_1.weight", "h.00.ln_1.weight", "h.0.ln_9.weight", "h.-1.ln_1.weight", "layer.0.ln_1.weight", "x"],
)
def test_names_that_are_none_of_the_familys(parts: Path, output: Path, key: str) -> None:
    tensors = cut("gpt2")
    tensors["trunk"][key] = torch.zeros(3)
    assert str(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        f"[source.tensor] trunk.pt /{key}: expected {GPT2} 'h.0.ln_1.weight', got F32 [3]. "
        "Save the part with the names that the model has"
    )


def test_tensors_in_a_part_that_they_are_none_of(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    tensors["trunk"]["wpe.weight"] = torch.zeros(48, 35)
    tensors["bottom"]["ln_f.weight"] = torch.zeros(35)
    error = refused(write(parts, "gpt2", tensors=tensors), output)
    assert str(error) == (
        "[source.tensor] bottom.pt /ln_f.weight: expected the head in the top alone, got it in the bottom. Remove it"
    )
    del tensors["bottom"]["ln_f.weight"]
    assert str(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        "[source.tensor] trunk.pt /wpe.weight: expected the embedding in the bottom alone, got it in the trunk. Remove "
        "it: a tied head needs no copy of the embedding"
    )


def test_one_tensor_under_two_names(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    tensors["bottom"]["wpe.weight"] = torch.zeros(48, 35)
    assert said(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        "[source.tensor] bottom.pt /wpe.weight: expected only one 'transformer.wpe.weight', got another, beside "
        "transformer.wpe.weight of bottom.pt"
    )
    tensors = cut("gpt2")
    tensors["trunk"]["layers.0.ln_1.weight"] = torch.zeros(35)
    assert said(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        "[source.parts] trunk.pt: expected one list of layers, got several: layers, transformer.h"
    )


def test_a_tensor_that_is_missing_is_named_as_its_part_would(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    del tensors["trunk"]["transformer.h.1.ln_1.weight"]
    rename: Rename = lambda key: key.removeprefix("transformer.")  # noqa: E731
    assert str(refused(write(parts, "gpt2", tensors=tensors, rename=rename), output)) == (
        f"[source.tensor] trunk.pt: expected a tensor 'h.1.ln_1.weight' of shape [35], got none. {MISSING}"
    )


def test_a_tensor_of_another_shape_is_named_as_its_part_has_it(parts: Path, output: Path) -> None:
    tensors = cut("gpt2")
    tensors["trunk"]["transformer.h.1.ln_1.weight"] = torch.zeros(5)
    assert str(refused(write(parts, "gpt2", tensors=tensors), output)) == (
        f"[source.tensor] trunk.pt /transformer.h.1.ln_1.weight: expected shape [35], got [5]. {MISSING}"
    )


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_parts_beside_a_whole_model(parts: Path, output: Path, file: str) -> None:
    """Parts beside a whole model are refused, as the parts may have been trained since."""
    write(parts, "gpt2")
    shutil.copy(checkpoint("gpt2") / "config.json", parts)
    shutil.copy(checkpoint("gpt2") / "model.safetensors", parts / file)
    assert str(refused(parts, output)) == (
        "[source.parts] parts: expected parts of a model, or a whole one, "
        f"got both: {file} or its index, and bottom.pt. Move the files that you do not want to another directory"
    )
    if file == "model.safetensors":
        assert splitbundle_converter.convert(parts, output, check=False).fingerprint == bundle("gpt2").fingerprint
        assert load_file(parts / file)
