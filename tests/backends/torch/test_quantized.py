"""Quantized weights in torch: the numbers that they stand for, the kernels, gradients, and what a stage keeps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import splitbundle
from splitbundle import Bundle, BundleError, training
from splitbundle.backends.torch import kernels, quantized, rounding
from splitbundle.backends.torch.kernel_choice import COLUMNS, INT4PACK, INT8PACK
from splitbundle.backends.torch.logical import LogicalTensors
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.format.encodings import TABLE
from splitbundle.storage.reader import ORIGINAL_VECTORS, VECTORS
from tests.support import models, second_decoder

FORMS = {"rows8": ("int8", 32), "blocks4_32": ("int4", 32), "blocks4_64": ("int4", 64), "blocks4_128": ("int4", 128)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A llama of 128 channels with a tied head, cut in three."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import splitbundle_converter

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    root = tmp_path_factory.mktemp("wide")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(root / "source")
    return splitbundle_converter.convert(root / "source", root / "plain.splitbundle", split=[1, 2])


@pytest.fixture(scope="module")
def made(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("quantized")
    return {
        form: plain.quantize(root / f"{form}.splitbundle", to, group=group, method="rtn")
        for form, (to, group) in FORMS.items()
    }


def by_hand(bundle: Bundle, name: str) -> Tensor:
    """The numbers of a quantized tensor, by the table of the specification, one at a time."""
    unit = next(unit for unit, names in bundle.architecture.unit_tensors().items() if name in names)
    from safetensors.torch import load_file

    stored = load_file(bundle.path / bundle.manifest.units[unit][0])
    codes, scale = stored[name], stored[f"{name}_scale"].double()
    if codes.dtype == torch.int8:
        return codes.double() * scale[:, None]
    rows, blocks, half = codes.shape
    found = torch.empty(rows, blocks, 2 * half, dtype=torch.float64)
    for j in range(half):
        found[:, :, 2 * j] = scale * (codes[:, :, j].double() % 16 - 8)
        found[:, :, 2 * j + 1] = scale * ((codes[:, :, j] // 16).double() - 8)
    return found.view(rows, -1)


@pytest.mark.rule("SB-W-014")
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_has_the_numbers_of_the_table(made: dict[str, Bundle], form: str) -> None:
    bundle = made[form]
    name = "layers.1.mlp.down.weight"
    assert bundle.manifest.storage.encodings[name] == form
    numbers = LogicalTensors(bundle, "layer-001")[name]
    assert torch.equal(numbers.double(), by_hand(bundle, name))
    assert bundle.manifest.storage.encodings["embedding.token.weight"] == "rows8"
    assert "layers.1.mlp_norm.weight" not in bundle.manifest.storage.encodings


@pytest.mark.parametrize("form", FORMS)
def test_the_bundle_verifies_and_names_what_a_reader_must_know(
    made: dict[str, Bundle], plain: Bundle, form: str
) -> None:
    bundle = splitbundle.open(made[form].path)
    assert bundle.manifest.features == (("rows8",) if form == "rows8" else ("rows8", "blocks4"))
    bundle.verify(exact=True)
    bundle.run_vectors(backend="torch")
    assert bundle.manifest.model.parent == plain.fingerprint
    assert bundle.manifest.vectors is not None
    assert bundle.manifest.vectors.original is not None
    moved = bundle.distances(backend="torch")
    assert [each.where for each in moved] == [*(f"hidden.{i}" for i in range(4)), "logits"]
    assert 0 < moved[-1].relative < (0.05 if form == "rows8" else 0.6)
    assert plain.distances() == []


def test_the_same_bundle_gives_the_same_bytes(plain: Bundle, made: dict[str, Bundle], tmp_path: Path) -> None:
    again = plain.quantize(tmp_path / "again.splitbundle", "int4", method="rtn")
    assert again.id == made["blocks4_32"].id


def test_a_search_is_nearer_than_rounding_and_calibration_nearer_in_what_a_layer_gives(plain: Bundle) -> None:
    weight = LogicalTensors(plain, "layer-000")["layers.0.mlp.up.weight"].float()
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(48, 128, generator=generator)  # inputs of a layer go along few directions
    x = torch.randn(400, 48, generator=generator) @ mixed + 0.1 * torch.randn(400, 128, generator=generator)
    encoding, off, result = TABLE["blocks4_32"], {}, {}
    for method in ("rtn", "search", "gptq"):
        pair = rounding.quantized(weight, encoding, method, x.T @ x if method == "gptq" else None)
        change = weight - quantized.dequantized(*pair, encoding, torch.float32)
        off[method], result[method] = float(change.norm()), float((x @ change.T).norm())
    assert off["search"] < 0.97 * off["rtn"]
    assert result["gptq"] < 0.85 * result["search"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 40])
def test_each_kernel_computes_the_product(made: dict[str, Bundle], form: str, rows: int) -> None:
    stage = made[form].stage(layers=(1, 2), dtype="float32")
    module = stage.layers["1"].mlp.gate
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows))
    x[:, 7] *= 50  # a channel of outliers, as trained models have
    right = x.double() @ by_hand(made[form], "layers.1.mlp.gate.weight").T
    size = float(right.abs().max())

    def off(got: Tensor) -> float:
        return float((got.double() - right).abs().max()) / size

    arguments = module.weight, module.scale
    assert off(quantized.exact(x, *arguments, module.encoding)) < 1e-6
    assert off(quantized.exact(x.bfloat16(), *arguments, module.encoding)) < 0.02
    if form == "rows8":
        if quantized.works(COLUMNS):
            assert off(quantized.columns(x, *arguments)) < 2e-4
        if quantized.works(INT8PACK):
            assert off(quantized.int8pack(x, *arguments)) < 0.02
    elif quantized.works(INT4PACK):
        assert off(quantized.int4pack(x, quantized.pack(*arguments, module.encoding), module.encoding)) < 0.02
    assert off(module(x)) < 0.02


@pytest.mark.parametrize("form", ["rows8", "blocks4_32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cache_pieces_and_padding_give_the_results_of_one_call(
    made: dict[str, Bundle], form: str, dtype: str
) -> None:
    exact = made[form].pipeline(dtype="float32", kernels="torch")
    pipeline = made[form].pipeline(dtype=dtype)
    ids = torch.tensor(models.token_rows(12, 12)) % 96
    with torch.no_grad():
        expected = exact(ids)
        stages, caches = pipeline.stages, [stage.cache(2, 12) for stage in pipeline.stages]
        past, found = [0, 0], []
        for start, stop in ((0, 1), (1, 4), (4, 12)):
            x = ids[:, start:stop]
            for stage, cache in zip(stages, caches, strict=True):
                x = stage(x, past=past, cache=cache)
            past, found = [stop, stop], [*found, x]
    assert pipeline.stages[0].dtype == getattr(torch, dtype)
    size = float(expected.abs().max())
    assert float((torch.cat(found, 1).float() - expected).abs().max()) < (0.01 if dtype == "float32" else 0.05) * size


@pytest.mark.parametrize("form", ["rows8", "blocks4_64"])
def test_gradients_reach_the_input_and_no_code(made: dict[str, Bundle], form: str) -> None:
    stage = made[form].stage("trunk", dtype="float32", trainable=True)
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert trained == {f"layers.1.{name}.weight" for name in ("attention_norm", "mlp_norm")}
    hidden = torch.randn(1, 4, 128, requires_grad=True)
    stage(hidden).square().sum().backward()
    assert hidden.grad is not None
    numbers = LogicalTensors(made[form], "layer-001")
    plain = {name: tensor.float() for name, tensor in numbers.items()}
    module = stage.layers["1"].mlp.gate
    x = torch.randn(5, 128, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    expected = plain["layers.1.mlp.gate.weight"].sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_lora_on_quantized_layers_trains_and_saves(made: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = made["blocks4_32"]
    stage = bundle.stage("trunk", dtype="float32", trainable=True)
    before = stage.layers["1"].attention.query.weight.clone()
    names = stage.add_lora(4, 8, ["attention.query", "mlp.down"])
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=0.01)
    hidden, wanted = torch.randn(2, 6, 128), torch.randn(2, 6, 128)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (stage(hidden) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(stage.layers["1"].attention.query.base.weight, before)
    training.save_lora(tmp_path / "adapter", stage)
    other = bundle.stage("trunk", dtype="float32", trainable=True)
    training.load_lora(tmp_path / "adapter", other)
    assert names == ["layers.1.attention.query", "layers.1.mlp.down"]
    with torch.no_grad():
        torch.testing.assert_close(other(hidden), stage(hidden), rtol=1e-5, atol=1e-5)
    with pytest.raises(BundleError, match="not quantized"):
        stage.merge_lora()


def test_a_changed_norm_is_saved_beside_the_codes(made: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = made["blocks4_32"]
    stage = bundle.stage("trunk", trainable=True)
    with torch.no_grad():
        stage.layers["1"].mlp_norm.weight.add_(0.25)
    saved = bundle.save_as(tmp_path / "saved.splitbundle", stage)
    saved.verify(exact=True)
    assert saved.manifest.storage == bundle.manifest.storage
    assert saved.manifest.vectors is not None
    assert saved.manifest.vectors.original is None  # not only quantization moved its results
    assert saved.manifest.files["layer-000.safetensors"] == bundle.manifest.files["layer-000.safetensors"]
    one, other = LogicalTensors(saved, "layer-001"), LogicalTensors(bundle, "layer-001")
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["layers.1.mlp_norm.weight"]
    wide = bundle.cast(tmp_path / "wide.splitbundle", "bfloat16", notes=lambda text: None)
    assert (wide.manifest.storage.dtype, wide.manifest.storage.encodings) == (
        "bfloat16",
        bundle.manifest.storage.encodings,
    )


def test_a_copied_moved_or_pickled_stage_keeps_its_numbers(made: dict[str, Bundle]) -> None:
    stage = made["blocks4_32"].stage("top", dtype="float32")
    hidden = torch.randn(1, 2, 128)
    with torch.no_grad():
        expected = stage(hidden)
        for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
            assert torch.equal(other(hidden), expected)
        half = copy.deepcopy(stage).to(torch.float16)
        assert half.dtype == torch.float16
        assert half.layers["2"].mlp.up.scale.dtype == torch.bfloat16
        assert float((half(hidden.half()).float() - expected).abs().max() / expected.abs().max()) < 0.02
        assert half.float().dtype == torch.float32


def test_compiled_and_exported_stages_make_the_numbers(made: dict[str, Bundle]) -> None:
    stage = made["rows8"].stage("trunk", dtype="float32")
    hidden = torch.randn(1, 3, 128)
    with torch.no_grad():
        exported = torch.export.export(stage, (hidden,)).module()
        expected = made["rows8"].stage("trunk", dtype="float32", kernels="torch")(hidden)
        torch.testing.assert_close(exported(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "int3"}, "one of int8, int4"),
        ({"group": 16}, "one of 32, 64, 128"),
        ({"method": "awq"}, "one of rtn, search, gptq"),
        ({"keep": ["layers.9"]}, "parts such as head"),
        ({"keep": "head"}, "as a list"),
        ({"keep": ["embedding", "layers.0", "layers.1", "layers.2"]}, "at least one matrix"),
        ({"method": "gptq", "calibration": [[]]}, "at least one text"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    plain: Bundle, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        plain.quantize(tmp_path / "no.splitbundle", **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "no.splitbundle").exists()


def test_rounding_twice_is_refused_and_parts_can_be_kept(
    plain: Bundle, made: dict[str, Bundle], tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="without quantized weights"):
        made["rows8"].quantize(tmp_path / "twice.splitbundle")
    kept = plain.quantize(tmp_path / "kept.splitbundle", "int4", keep=["head", "layers.0", "mlp.down"], method="rtn")
    names = kept.manifest.storage.encodings
    assert "embedding.token.weight" not in names  # the table of a tied head
    assert not any(name.startswith("layers.0.") or name.endswith("mlp.down.weight") for name in names)
    assert names["layers.1.mlp.up.weight"] == "blocks4_32"
    same = plain.quantize(
        tmp_path / "same.splitbundle",
        "int4",
        keep=["lm_head", "model.layers.0", "down_proj"],
        method="rtn",
        notes=lambda text: pytest.fail(text),
    )
    assert same.manifest.storage.encodings == names  # the names of the source serve, too


def test_matrices_with_another_encoding_are_noted(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import splitbundle_converter

    sizes = {"hidden_size": 96, "intermediate_size": 136, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=80, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "s")
    bundle = splitbundle_converter.convert(tmp_path / "s", tmp_path / "plain.splitbundle")
    notes: list[str] = []
    made = bundle.quantize(tmp_path / "small.splitbundle", "int4", method="rtn", notes=notes.append)
    assert notes == [
        "4 matrices are stored in 8 bits, because blocks of 32 need a multiple of 32 columns and of 16 rows: mlp.gate, "
        "mlp.up.",
        "2 matrices stay as they are, because 8 bits need a multiple of 16 columns: mlp.down.",
    ]
    assert made.manifest.storage.encodings["layers.0.mlp.up.weight"] == "rows8"
    assert "layers.0.mlp.down.weight" not in made.manifest.storage.encodings


def test_calibration_goes_layer_by_layer(plain: Bundle, tmp_path: Path) -> None:
    ids = [list(range(1, 60)), list(range(40, 96))]
    one = plain.quantize(tmp_path / "gptq.splitbundle", "int4", method="gptq", calibration=ids)
    other = plain.quantize(tmp_path / "again.splitbundle", "int4", method="gptq", calibration=ids)
    rounded = plain.quantize(tmp_path / "rtn.splitbundle", "int4", method="rtn")
    assert one.id == other.id
    rows = torch.tensor([ids[0]])
    with torch.no_grad():
        expected, got, worse = (b.pipeline(kernels="torch")(rows) for b in (plain, one, rounded))
    assert float((got - expected).norm()) < 0.9 * float((worse - expected).norm())


def test_the_report_says_what_changed(plain: Bundle, made: dict[str, Bundle]) -> None:
    from splitbundle.backends.torch.quantization_report import measure

    report = measure(plain, made["blocks4_32"], list(range(96)) * 2)
    assert 4.5 < report.bits_per_weight < 4.9
    assert report.bytes_after < 0.3 * report.bytes_before
    assert [part.part for part in report.parts] == ["embedding", "layer-000", "layer-001", "layer-002", "head"]
    assert all(0.05 < part.weight < 0.15 for part in report.parts[1:4])
    assert report.parts[1].hidden is not None
    assert report.text is not None
    assert report.text.tokens == 189
    assert report.text.divergence > 0
    with torch.no_grad():
        logits = plain.pipeline(kernels="torch")(torch.tensor([list(range(64))]))[0, :-1]
    own = torch.nn.functional.cross_entropy(logits, torch.arange(1, 64)).exp().item()
    first = measure(plain, made["rows8"], list(range(64))).text
    assert first is not None
    assert first.perplexity_before == pytest.approx(own, rel=1e-4)


@pytest.mark.rule("SB-M-095")
@pytest.mark.parametrize("form", ["rows8", "blocks4_32"])
def test_the_golden_vectors_are_those_of_a_second_decoder(made: dict[str, Bundle], plain: Bundle, form: str) -> None:
    bundle, own = made[form], made[form].manifest.vectors
    assert own is not None
    assert own.original is not None
    tensors = {
        name: by_hand(bundle, name) if name in bundle.manifest.storage.encodings else LogicalTensors(bundle, unit)[name]
        for unit, names in bundle.architecture.unit_tensors().items()
        for name in names
    }
    vectors = map_tensors(bundle, VECTORS)
    case = min(range(len(own.lengths)), key=lambda i: abs(own.lengths[i] - 7))
    ids = vectors[f"case.{case}.ids"].tolist()
    states = second_decoder.Reference(bundle.architecture, tensors).run(ids)
    *hidden, logits = states
    for layer, rows in enumerate(hidden):
        expected = torch.tensor(rows)
        assert models.relative(vectors[f"case.{case}.hidden.{layer}"], expected) < 1e-5
    assert models.relative(vectors[f"case.{case}.logits"], torch.tensor(logits[-1])) < 1e-5
    before = map_tensors(bundle, ORIGINAL_VECTORS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in map_tensors(plain, VECTORS).items())


@pytest.mark.parametrize("form", ["rows8", "blocks4_32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_with_one_input_are_one_product(made: dict[str, Bundle], form: str, dtype: str) -> None:
    stage = made[form].stage("trunk", dtype=dtype, kernels="auto")
    block = stage.layers["1"].mlp
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(3)).to(stage.dtype)
    with torch.no_grad():
        joint = block.joint.product(x, block, unless_fused=True)
        assert (joint is None) == (not quantized.works(INT4PACK if form != "rows8" else INT8PACK))
        apart = torch.cat([block.gate(x), block.up(x)], dim=-1)
        assert joint is None or torch.equal(joint, apart)
        handle = block.up.register_forward_hook(lambda module, given, result: result * 2)
        assert block.joint.product(x, block, unless_fused=True) is None
        handle.remove()
        assert block.joint.product(torch.randn(1, 40, 128).to(x), block) is None


@pytest.mark.rule("SB-W-008")
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_layers_with_biases_are_one_product_too(tmp_path: Path, to: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import splitbundle_converter

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, num_hidden_layers=1, max_position_embeddings=64, **sizes))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "source")
    bundle = splitbundle_converter.convert(tmp_path / "source", tmp_path / "plain.splitbundle")
    stage = bundle.quantize(tmp_path / "small.splitbundle", to, method="rtn").stage(layers=(0, 1), kernels="auto")
    block = stage.layers["0"].attention
    x = torch.randn(1, 1, 128).to(stage.dtype)
    with torch.no_grad():
        joint = block.joint.product(x, block)
        kernels_of = {"int4": (INT4PACK,), "int8": (INT8PACK, COLUMNS)}[to]
        assert (joint is None) == (not any(map(quantized.works, kernels_of)))
        apart = torch.cat([layer(x) for layer in (block.query, block.key, block.value)], dim=-1)
        assert joint is None or torch.equal(joint, apart)


@pytest.mark.skipif(not quantized.works(INT4PACK), reason="no kernel for weights of 4 bits")
def test_a_packed_copy_can_be_used_with_gradients_later(made: dict[str, Bundle]) -> None:
    stage = made["blocks4_32"].stage(layers=(0, 1), kernels="auto", embeds=False)
    x = torch.randn(1, 1, stage.architecture.hidden_size).to(stage.dtype)
    with torch.inference_mode():
        stage(x, cache=stage.cache(1, 4))
    packed = [each for module in stage.modules() for each in getattr(module, "_packed", {}).values()]
    assert packed
    assert not any(tensor.is_inference() for each in packed for tensor in each.copy)


def _set_data(weight: Tensor) -> None:
    weight.data = weight.data.flip(0).contiguous()


def _swap_back(weight: Tensor) -> None:
    """Lie at another place, and then perhaps at the first one again, with other numbers."""
    for _ in range(2):
        _set_data(weight)
    weight.data = weight.data.flip(0).contiguous()


CODE_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda weight: weight.copy_(weight.flip(0)),
    "data": _set_data,
    "data, thrice": _swap_back,
}


@pytest.mark.skipif(not quantized.works(INT4PACK), reason="no kernel for weights of 4 bits")
@pytest.mark.parametrize("name", ["weight", "weight_scale"])
@pytest.mark.parametrize("change", CODE_CHANGES)
@torch.no_grad()
def test_codes_and_scales_that_change_after_a_token_count(made: dict[str, Bundle], change: str, name: str) -> None:
    """Layers that are one product, too, whose codes lie in the memory of those of each layer."""
    stage = made["blocks4_32"].stage(layers=(0, 2), kernels="auto", embeds=False)
    x = torch.randn(1, 1, stage.architecture.hidden_size, generator=torch.Generator().manual_seed(4)).to(stage.dtype)
    for part in ("attention.query", "mlp.up", "mlp.down"):
        before = stage(x, cache=stage.cache(1, 4))
        for layer in stage.layers.values():
            held = layer.get_submodule(part)._parameters
            CODE_CHANGES[change](held[name])  # type: ignore[arg-type]
        got = stage(x, cache=stage.cache(1, 4))
        anew = copy.deepcopy(stage)  # it has no packed copies
        assert torch.allclose(got, anew(x, cache=anew.cache(1, 4)), atol=1e-2), part
        assert part == "attention.query" or not torch.equal(got, before), part


@pytest.mark.skipif(not quantized.works(INT4PACK), reason="no kernel for weights of 4 bits")
@torch.inference_mode()
def test_a_copy_that_is_made_in_inference_mode_computes(made: dict[str, Bundle]) -> None:
    stage = made["blocks4_32"].stage(layers=(0, 1), kernels="auto", embeds=False)
    x = torch.ones(1, 1, stage.architecture.hidden_size, dtype=stage.dtype)
    assert torch.allclose(copy.deepcopy(stage)(x), stage(x), atol=1e-2)


@pytest.mark.skipif(not quantized.works(COLUMNS), reason="no product of integers")
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_inputs_keep_fifteen_bits(rows: int) -> None:
    codes = torch.eye(32, dtype=torch.int8) * 127
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)) ** 3
    x[0, :4] = torch.tensor([1.0, -1.0, 32384 / 32512, -32385 / 32512]) * x[0].abs().max()  # the largest parts
    got = quantized.columns(x, codes, torch.full((32,), 1 / 128, dtype=torch.bfloat16)) * 128 / 127
    step = x.abs().amax(dim=-1, keepdim=True) / 32512
    assert ((got - x).abs() <= 0.51 * step).all()
    assert torch.equal(
        quantized.columns(torch.zeros(rows, 32), codes, torch.ones(32).bfloat16()), torch.zeros(rows, 32)
    )


def test_the_kernel_depends_on_the_processor_and_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    one, six, wide = torch.ones(1, 1024).bfloat16(), torch.ones(6, 1024).bfloat16(), 8192

    def keys() -> list[str | None]:
        encoding = TABLE["rows8"]
        given = ((one, 1024), (one, wide), (six, 1024), (six.float(), wide), (torch.ones(9, 1024), 1024))
        return [quantized.key(x, outputs, encoding) for x, outputs in given]

    monkeypatch.setattr(quantized, "_AMX", False)
    assert keys() == [*["rows8-bfloat16/1-8"] * 3, "rows8-float32/1-8", None]
    monkeypatch.setattr(quantized, "_AMX", True)
    assert keys() == ["rows8-bfloat16/1-8", *["rows8-bfloat16-amx/1-8"] * 2, "rows8-float32/1-8", None]


@pytest.mark.skipif(not quantized.works(INT8PACK), reason="no kernel for weights of 8 bits")
def test_integers_are_not_multiplied_where_onednn_is_off() -> None:
    x, encoding = torch.ones(1, 64), TABLE["rows8"]
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert kernels.quantized_kernel(x, 64, encoding) == INT8PACK
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=True):
        assert kernels.quantized_kernel(x, 64, encoding) == (COLUMNS if quantized.works(COLUMNS) else INT8PACK)
