"""Compute golden vectors: the results of the original class with the stored weights, in float32, row by row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from splitbundle.backends.torch.weights import DTYPES
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.sizes import count
from splitbundle.storage.files import Progress
from splitbundle_converter.checkpoint.source import Checkpoint
from splitbundle_converter.errors import line, refusal
from splitbundle_converter.families.configuration import resolve
from splitbundle_converter.families.row import Family
from splitbundle_converter.quantized.dequantizing import DequantizedCheckpoint
from splitbundle_converter.quantized.packed_weights import TORCH
from splitbundle_converter.quiet_transformers import quiet
from splitbundle_converter.reference.layered_original import LayeredOriginal
from splitbundle_converter.reference.memory import available_memory
from splitbundle_converter.reference.original_errors import BY_LAYER, UNCHECKED, loaded

LENGTHS = (1, 7, 24)
"""The number of tokens in each case: one, a few, and more than a small window."""


def case_lengths(architecture: Architecture) -> tuple[int, ...]:
    """Return the lengths of the cases. They are limited to the number of positions that the model has."""
    limit = architecture.position_limit or max(LENGTHS)
    return tuple(dict.fromkeys(min(length, limit) for length in LENGTHS))


def reference_vectors(
    load: Callable[..., tuple[Any, str]], architecture: Architecture, dtype: str
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Run the original model, and return the lengths of the cases and their tensors by name.

    The names and shapes are those of ``spec/v1/bundle.md``, section "Golden vectors". Ids are int64; hidden states and
    logits are float32.

    Args:
        load: Returns the original model in float32, and the name of the module list that has its layers. With
            ``inert=False``, it builds the model without the fields that change no logits.
        architecture: The architecture of the model.
        dtype: The dtype that the weights were rounded to, or "keep".

    Raises:
        BundleError: ``memory`` if there is not enough memory for the model in float32.
    """
    # Activations and temporary memory while loading need a fifth more than the weights alone.
    _check_memory(1.2 * model_bytes(architecture), "to check against the original model in float32", BY_LAYER)
    model, layers = loaded(load)
    if dtype != "keep":
        with torch.no_grad():
            for tensor in learned_tensors(model):
                tensor.copy_(tensor.to(DTYPES[dtype]))
    rows = case_rows(architecture)
    return case_lengths(architecture), _named(rows, [run_original(model, layers, ids) for ids in rows])


def layered_vectors(
    build: Callable[..., LayeredOriginal], architecture: Architecture, dtype: str, progress: Progress | None
) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """Return what ``reference_vectors`` returns. One layer of the original model is in memory at a time.

    Args:
        build: Returns the original model, which runs layer by layer. ``inert`` is as for ``reference_vectors``.
        architecture: The architecture of the model.
        dtype: The dtype that the weights were rounded to, or "keep".
        progress: Called with the name of the work, the layers that are done, and their number. Each call comes when a
            layer was freed, and before the next one is loaded.

    Raises:
        BundleError: ``memory`` if there is not enough memory for the largest layer in float32; ``source.*``.
    """
    # transformers joins the tensors of experts while it loads them, so some of them are in memory twice for a moment.
    what = "to check against the original model in float32, one layer at a time"
    _check_memory(1.6 * layer_bytes(architecture), what, UNCHECKED)
    original, rows = loaded(build), case_rows(architecture)
    found = original.results(rows, None if dtype == "keep" else DTYPES[dtype], progress)
    return case_lengths(architecture), _named(rows, found)


def model_bytes(architecture: Architecture) -> int:
    """Return the size in bytes of a model in float32."""
    return count(architecture.tensors()) * 4


def layer_bytes(architecture: Architecture) -> int:
    """Return the size in bytes of the largest layer in float32. The embedding and the head count as layers."""
    largest = max(count(tensors) for tensors in architecture.unit_tensors().values())
    return largest * 4


def case_rows(architecture: Architecture) -> list[Tensor]:
    """Return the token ids of the cases. *Shape:* each (sequence), int64."""
    generator = random.Random(0)
    return [
        torch.tensor([generator.randrange(architecture.vocab_size) for _ in range(length)])
        for length in case_lengths(architecture)
    ]


def _named(rows: list[Tensor], results: list[tuple[list[Tensor], Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, (ids, (hidden, logits)) in enumerate(zip(rows, results, strict=True)):
        tensors[f"case.{i}.ids"] = ids
        for layer, state in enumerate(hidden):
            tensors[f"case.{i}.hidden.{layer}"] = state
        tensors[f"case.{i}.logits"] = logits[-1].contiguous()
    return tensors


def run_original(model: Any, place: str, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the hidden states of one row, before the first layer and after each layer, and all its logits.

    ``place`` is the name of the module list that has the layers.

    *Shape:* (sequence) -> each (sequence, hidden), and (sequence, vocab), float32.
    """
    layers = model.get_submodule(place)
    hidden: list[Tensor] = []

    def before_first(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden.append(output[0] if isinstance(output, tuple | list) else output)

    hooks = [layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False, return_dict=True).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return [state[0].contiguous() for state in hidden], logits


def learned_tensors(model: Any) -> Iterator[Tensor]:
    """Yield the parameters of a model, and the corrections of routers, which are buffers."""
    yield from model.parameters()
    yield from (
        buffer for name, buffer in model.named_buffers() if name.endswith("bias") and buffer.is_floating_point()
    )


def load_original(source: Checkpoint, family: Family, *, inert: bool = True) -> tuple[Any, str]:
    """Load the checkpoint with transformers in float32. Return the model and the name of its list of layers.

    ``inert`` is as for ``configuration.build``.

    Raises:
        BundleError: ``source.unreadable``, ``source.changed``, ``source.tensor``.
    """
    # transformers must not read config.json, which may select code.
    config = resolve(source.configuration(), inert=inert)
    config._attn_implementation = config._experts_implementation = "eager"
    try:
        with quiet():
            loaded = _load(source, config)
    except (OSError, RuntimeError, SafetensorError) as error:
        source.directory.check_unchanged()
        if isinstance(error, RuntimeError):
            raise
        raise refusal("source.unreadable", source.name, "weights that transformers can read", line(error)) from error
    model = checked(loaded, source, "every tensor that transformers wants", ("missing_keys", "mismatched_keys"))
    return model, family.modules


def checked(loaded: tuple[Any, dict[str, Any]], source: Checkpoint, expected: str, keys: tuple[str, ...]) -> Any:
    """Return the loaded model in evaluation mode. Refuse it if transformers reports tensors under one of ``keys``.

    Raises:
        BundleError: ``source.tensor``.
    """
    model, info = loaded
    wrong = {key: sorted(map(str, info[key])) for key in keys if info.get(key)}
    if wrong:
        raise refusal("source.tensor", source.name, expected, str(wrong))
    return model.eval()


def from_tensors(config: Any, tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """Return the causal language model of a configuration in float32 with these tensors, and the loading report."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the mapping has a class for each family
    loaded: tuple[Any, dict[str, Any]] = original.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    return loaded


def _load(source: Checkpoint, config: Any) -> Any:
    if isinstance(source, DequantizedCheckpoint) and source.reads_alike():
        dtypes = {weight.dtype for weight in source.packed.values()}
        config.quantization_config = {**source.fields, "dequantize": True}
        model, info = _load_directory(source, config, TORCH[dtypes.pop()])
        return model.float(), info
    return _load_tensors(source, config) if source.rewritten else _load_directory(source, config, torch.float32)


def _load_directory(source: Checkpoint, config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    generation: Any = GenerationConfig  # transformers gives no types for it
    return AutoModelForCausalLM.from_pretrained(
        str(source.directory.path),
        config=config,
        generation_config=generation(),  # generation_config.json is not needed: it changes no result
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )


def _load_tensors(source: Checkpoint, config: Any) -> Any:
    """Load the tensors that ``source`` reads. transformers itself would unpickle files, and can't load parts."""
    with source.reader() as reader:
        tensors = {name: reader.get(name) for name in source.tensors}  # the tensors keep their memory maps open
    return from_tensors(config, tensors)


def _check_memory(need: float, purpose: str, hint: str) -> None:
    available = available_memory()
    if available is not None and need > available:
        expected = f"{need / 2**30:.1f} GiB of free memory {purpose}"
        raise refusal("memory", None, expected, f"{available / 2**30:.1f} GiB", hint)
