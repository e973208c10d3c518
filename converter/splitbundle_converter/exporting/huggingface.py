"""Export a bundle as a checkpoint that other libraries load. The original checkpoint isn't needed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from splitbundle.bundle import Bundle
from splitbundle.errors import quoted
from splitbundle.format.fields import MAX_PROBLEMS
from splitbundle.opening import open_bundle
from splitbundle.storage.files import Progress
from splitbundle.verification.verify import check_digests
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.copying import check_outside, refuse_missing, unchanged
from splitbundle_converter.checkpoint.file_names import CARD, CONFIG
from splitbundle_converter.errors import refusal
from splitbundle_converter.exporting.adapter import check_adapter, with_adapter
from splitbundle_converter.exporting.card import exported_card, is_export
from splitbundle_converter.exporting.configuration import config_file, other_files
from splitbundle_converter.exporting.packed import packed_name, packed_tensors, with_quantization
from splitbundle_converter.exporting.texts import with_texts
from splitbundle_converter.exporting.weight_shards import divide, write_shards
from splitbundle_converter.options import MAX_SHARD_SIZE, Note
from splitbundle_converter.translation.restore import RestoredTensor, logical_tensors, restored_tensors

FORMS: Final = ("hf", "gguf")


def export(
    bundle: str | os.PathLike[str] | Bundle,
    output: str | os.PathLike[str],
    *,
    to: str = "hf",
    adapter: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    dequantize: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    check: bool = True,
    force: bool = False,
    notes: Note | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the weights of a bundle as a Hugging Face checkpoint, for ``from_pretrained``, or as a GGUF file.

    Names and layouts come from the manifest. Each tensor is exact to the bit. Quantized ones that are written as plain
    numbers are rounded once. Only one tensor at a time is in memory. The output appears complete, or not at all.

    Args:
        bundle: A bundle with all weights.
        output: The directory of the checkpoint, or the GGUF file.
        to: The form: "hf", or "gguf" for llama.cpp. A GGUF file needs the extra ``gguf``.
        adapter: A directory with a LoRA, as PEFT or ``splitbundle.training.save_lora`` writes it, to merge first.
        config: The path of a config.json to write in place of the one that the bundle carries. A GGUF file has none.
        dequantize: Whether to write quantized weights as plain numbers in the dtype of the model. By default they are
            written as compressed-tensors, or as blocks of GGUF, bit for bit. With an adapter, all weights are plain.
        max_shard_size: The size in bytes above which the weights are written as several files with an index.
            A GGUF file is never divided.
        check: Whether to verify each weight file of the bundle before it is read.
        force: Whether to replace a checkpoint that was exported before, or a GGUF file.
        notes: A function that is called with a sentence for each thing that was changed or left out. By default, it
            becomes a warning.
        progress: A function that is called with the current step, the amount done, and the total amount.

    Returns:
        The path of the checkpoint or the file.

    Raises:
        BundleError: ``usage.*``, ``output.*``, ``file.*``, ``json.*``, ``source.config``; ``adapter.*``;
            ``source.family`` for a model that llama.cpp has no name for.
        MissingExtra: The library gguf isn't installed.
    """
    if to not in FORMS:
        raise refusal("usage.export", None, f"one of {', '.join(FORMS)}", quoted(to), _HINT, argument="to")
    if type(max_shard_size) is not int or max_shard_size < 1:
        expected = "a number of bytes from 1"
        raise refusal("usage.size", None, expected, quoted(max_shard_size), _HINT, argument="max_shard_size")
    note = notes or _warn
    old = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    refuse_missing(old, old.manifest.weight_files())
    target = Path(os.path.abspath(output))
    check_outside(old, target)
    if to == "gguf":
        if config is not None:
            hint = "Leave it out: the metadata of the file is made of the bundle's facts"
            raise refusal(
                "usage.export", None, "no configuration for a GGUF file", quoted(config), hint, argument="config"
            )
        from splitbundle_converter.exporting.gguf_file import export_gguf  # it needs transformers

        return export_gguf(
            old,
            target,
            adapter=adapter,
            dequantize=dequantize,
            check=check,
            force=force,
            note=note,
            progress=progress,
        )
    restored = restored_tensors(old.manifest, old.architecture)
    names = _names(old, restored, note)
    configuration = config_file(old, config, note)
    others = with_texts(other_files(old, note), old, note)
    if adapter is not None:
        check_adapter(old, adapter)
    packs = bool(old.manifest.storage.encodings) and not dequantize and adapter is None
    if packs and configuration is None:
        note(
            "The quantized weights are written as plain numbers: without a config.json, nothing says how to read them."
        )
    elif packs:
        restored = packed_tensors(old, restored, note)
        names = packed_name(names)
        configuration = with_quantization(configuration or b"", restored, names)
    with atomic_directory(target, force=force, ours=is_export) as root, unchanged(old):
        if check:
            check_digests(old, old.manifest.weight_files(), progress)
        tensors = logical_tensors(old)
        merged = tensors if adapter is None else with_adapter(old, adapter, tensors)
        files = divide(restored, max_shard_size)
        write_shards(root, files, names, lambda tensor: tensor.restore(merged), progress)
        card = exported_card(old, None if adapter is None else Path(adapter).name)
        if configuration is not None:
            others[CONFIG] = configuration
        for name, data in (others | {CARD: card}).items():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(data)
    return target


_HINT: Final = "help(splitbundle_converter.export) names the values"


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _names(bundle: Bundle, restored: Sequence[RestoredTensor], note: Note) -> Callable[[RestoredTensor], str]:
    """Return a function that gives the name of a tensor in the checkpoint.

    A part of a source has the names of its own class, if the bundle knows them: so this class loads it.

    Raises:
        BundleError: ``source.tensor`` if two tensors would have one name, or a name that safetensors can't hold.
    """
    wrong = next((tensor.name for tensor in restored if tensor.name in ("", "__metadata__")), None)
    if wrong is not None:
        raise refusal("source.tensor", "manifest.json", "a name that safetensors can hold", quoted(wrong))
    part = bundle.manifest.extensions.get("part")
    if part is None:
        return lambda tensor: tensor.name
    table = part.get("own_names") if isinstance(part, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        note("The tensors have the names of the whole source: the bundle doesn't know those of the part's own class.")
        return lambda tensor: tensor.name
    own = _own_names(table, len(bundle.architecture.layers))
    found: dict[str, str] = {}
    taken: set[str] = set()
    problems = []
    for tensor in restored:
        stated = tensor.name if tensor.entry is None else tensor.entry.source
        name = own.get(stated, stated)
        name = name if tensor.row is None else name.replace("{row}", str(tensor.row))
        if name in taken or name in ("", "__metadata__"):  # safetensors keeps the second name for itself
            problems.append(name)
        taken.add(name)
        found[tensor.name] = name
    if problems:
        got = ", ".join(map(quoted, problems[:MAX_PROBLEMS]))
        raise refusal("source.tensor", "manifest.json", "one tensor of each name", got, pointer="/extensions/part")
    return lambda tensor: found[tensor.name]


def _own_names(table: dict[str, str], layers: int) -> dict[str, str]:
    names: dict[str, str] = {}
    for source, own in table.items():
        for layer in range(layers) if "{layer}" in source else [0]:
            names[source.replace("{layer}", str(layer))] = own.replace("{layer}", str(layer))
    return names
