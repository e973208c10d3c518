"""The converter's commands. A command imports the libraries that it needs when it runs, not when it prints help."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import splitbundle_converter
from splitbundle.backends import registry
from splitbundle.bundle import Bundle
from splitbundle.cli.arguments import add_cut_arguments, add_threads_argument, integers, size
from splitbundle.cli.console import Command, Console
from splitbundle.errors import MissingExtra
from splitbundle_converter.checkpoint.directory import local_name
from splitbundle_converter.example_checkpoints import DEFAULT, EXAMPLES, copy_example
from splitbundle_converter.families.composites import EXTENSION, LANGUAGE
from splitbundle_converter.options import CHECKS, DTYPES, QUANTIZED

_CHECKED: Final = {
    "whole": "checked against the original model",
    "layers": "checked against the original model, layer by layer",
    "none": "not checked",
}
"""What the command says about each check."""
LIBRARIES: Final = ("torch", "transformers", "safetensors", "jsonschema", "huggingface_hub", "numpy", "tokenizers")


def _shard_arguments(parser: argparse.ArgumentParser, uncut: str) -> None:
    cuts = parser.add_mutually_exclusive_group()
    cuts.add_argument(
        "--split", type=integers, metavar="2,10", help=f"cut before these layers; by default there are no cuts{uncut}"
    )
    add_cut_arguments(cuts, "cut into")
    parser.add_argument(
        "--names",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B,C",
        help="the names of the shards; by default bottom, trunk, top",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle once the new one is complete")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a checkpoint directory, a GGUF file, or a hub id")
    parser.add_argument(
        "--output", "-o", metavar="NAME.splitbundle", help="the new bundle; by default the model's name"
    )
    parser.add_argument("--revision", help="the branch, tag or commit of a hub id")
    parser.add_argument("--part", metavar=LANGUAGE, help="convert only the language part of a multimodal checkpoint")
    _shard_arguments(parser, ", or the cuts of the source, if it consists of parts")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="accept weights in pickles (.bin, .pt); only tensors are read, in a separate process",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="keep",
        help="the dtype of the stored weights; keep, the default, changes none",
    )
    parser.add_argument(
        "--quantize",
        choices=QUANTIZED,
        help="store the matrices in 8 or 4 bits, after the check; the command quantize has more options",
    )
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument(
        "--check",
        choices=CHECKS,
        default=CHECKS[0],
        help="compare the bundle with the original model, and store its results as golden vectors: whole, the default, "
        "has the whole original in memory; layers has one layer at a time; none is --no-check",
    )
    checks.add_argument(
        "--no-check",
        dest="check",
        action="store_const",
        const="none",
        help="do not run the original model, and store no golden vectors",
    )
    parser.add_argument(
        "--max-file-size",
        type=size,
        metavar="SIZE",
        help="split units that are larger than this into several files; a file with one tensor may still be larger",
    )
    parser.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        help="convert without the tokenizer; the bundle then has no text",
    )
    parser.add_argument("--onnx", action="store_true", help="add a graph for onnxruntime to each shard")
    parser.add_argument(
        "--variant",
        help="add graphs of this variant: standard computes in float32, float16 in the weights' float16, and "
        "matmul_nbits over weights of 4 bits; by default the one that fits the weights",
    )
    parser.add_argument(
        "--genai",
        action="store_true",
        help="add graphs, and the configuration that onnxruntime-genai needs to run them",
    )
    add_threads_argument(parser)


def _convert(args: argparse.Namespace, console: Console) -> int:
    output = args.output or f"{local_name(Path(args.source))[0].rpartition('/')[2]}.splitbundle"
    notes: list[str] = []
    with libraries(), _threads(args):
        bundle = splitbundle_converter.convert(
            args.source,
            output,
            split=args.split,
            equal=args.equal,
            max_shard_size=args.max_shard_size,
            names=args.names,
            dtype=args.dtype,
            revision=args.revision,
            part=args.part,
            check=args.check,
            force=args.force,
            max_file_size=args.max_file_size,
            onnx=args.variant or args.onnx,
            genai=args.genai,
            allow_pickle=args.allow_pickle,
            tokenizer=args.tokenizer,
            quantize=args.quantize,
            notes=console.collect(notes),
            progress=console.progress,
        )
    checked = _CHECKED[args.check] + (f", and then quantized to {args.quantize}" if args.quantize else "")
    return _report(bundle, output, console, checked, bundle.manifest.extensions.get(EXTENSION), notes)


def _resplit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a whole .splitbundle directory")
    parser.add_argument(
        "--output", "-o", metavar="NAME.splitbundle", help="the new bundle; by default the bundle itself, with --force"
    )
    _shard_arguments(parser, "")
    _no_check_argument(parser)


def _no_check_argument(parser: argparse.ArgumentParser) -> None:
    add_threads_argument(parser)
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="do not verify the copied files, and do not compare new graphs with the golden vectors",
    )


def _refuse_remote_output(args: argparse.Namespace) -> None:
    """End with a usage error if a bundle of another machine would be replaced."""
    if args.output is None and "://" in args.bundle:
        args.parser.error("argument --output/-o: it is needed for a bundle on another machine")


def _resplit(args: argparse.Namespace, console: Console) -> int:
    output = args.output or args.bundle
    _refuse_remote_output(args)
    with libraries("onnx", "cut bundles again"):
        bundle = splitbundle_converter.resplit(
            args.bundle,
            output,
            split=args.split or (),
            equal=args.equal,
            max_shard_size=args.max_shard_size,
            names=args.names,
            check=args.check,
            force=args.force,
            threads=args.threads,
            progress=console.progress,
        )
    return _report(bundle, output, console, _checked(args, bundle))


def _add_onnx_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a whole .splitbundle directory")
    parser.add_argument(
        "--output", "-o", metavar="NAME.splitbundle", help="the new bundle; by default the bundle itself"
    )
    parser.add_argument(
        "--variant",
        help="standard computes in float32, float16 in float16, and matmul_nbits over weights of 4 bits; by default "
        "that of the present graphs, or the one that fits the weights",
    )
    _no_check_argument(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing bundle at --output")
    parser.add_argument(
        "--genai",
        action="store_true",
        default=None,
        help="also add the configuration that onnxruntime-genai needs to run the graphs",
    )


def _add_onnx(args: argparse.Namespace, console: Console) -> int:
    _refuse_remote_output(args)
    with libraries("onnx", "add graphs"):
        bundle = splitbundle_converter.add_onnx(
            args.bundle,
            args.output,
            variant=args.variant,
            check=args.check,
            force=args.force,
            genai=args.genai,
            threads=args.threads,
            progress=console.progress,
        )
    return _report(bundle, args.output or args.bundle, console, _checked(args, bundle))


def _checked(args: argparse.Namespace, bundle: Bundle) -> str:
    """Say what was checked of a bundle that was made of another one."""
    if not args.check:
        return "not checked"
    graphs = bundle.manifest.vectors is not None and any(shard.graph is not None for shard in bundle.shards)
    return "files verified, graphs checked against the golden vectors" if graphs else "files verified"


def _families_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no arguments of its own."""


def _families(args: argparse.Namespace, console: Console) -> int:
    with libraries("convert", "list the families"):
        from splitbundle_converter.families import summary

        rows = list(summary.details())
    console.table(summary.COLUMNS, [[row[column] for column in summary.COLUMNS] for row in rows])
    console.json({"ok": True, "families": rows})
    return 0


def _example_arguments(parser: argparse.ArgumentParser) -> None:
    known = "; ".join(f"{name}: {what}" for name, what in EXAMPLES.items())
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        default=DEFAULT,
        help=f"the example; by default {DEFAULT}. The known names: {known}",
    )
    parser.add_argument("--output", "-o", metavar="DIRECTORY", help="the new directory; by default NAME")


def _example(args: argparse.Namespace, console: Console) -> int:
    output = args.output or args.name
    directory = copy_example(args.name, output)
    total = sum(path.stat().st_size for path in directory.iterdir())
    console.text(f"{output}: {args.name}, {total:,} bytes")
    console.json({"ok": True, "path": str(output), "name": args.name, "bytes": total})
    return 0


def _report(
    bundle: Bundle,
    output: str,
    console: Console,
    checked: str,
    part: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> int:
    console.end_progress()
    shards = ", ".join(f"{shard.name} [{shard.layers[0]}, {shard.layers[1]})" for shard in bundle.shards)
    console.text(f"{output}: {shards}; {checked}")
    console.text(f"  fingerprint {bundle.fingerprint}")
    console.text(f"  bundle id   {bundle.id}")
    if part is not None:
        _report_part(part, console)
    ids = {"bundle_id": bundle.id, "fingerprint": bundle.fingerprint}
    noted = {"notes": list(notes)} if notes else {}
    console.json({"ok": True, "path": str(output), **ids} | noted | ({} if part is None else {"part": part}))
    return 0


def _report_part(part: dict[str, Any], console: Console) -> None:
    """Print which parts of the checkpoint the bundle leaves out."""
    for item in part["left_out"]:
        many = "tensor" if item["tensors"] == 1 else "tensors"
        console.text(f"  left out    {item['module']}: {item['tensors']:,} {many}, {item['parameters']:,} parameters")
    for field, value in part["not_applied"].items():
        console.text(f"  left out    the head's {field} ({value:g}), which {part['class']} doesn't apply either")


@contextmanager
def libraries(extra: str = "convert", purpose: str = "convert checkpoints") -> Iterator[None]:
    """Raise ``MissingExtra`` with the install command if a library is missing. Some are imported only when needed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in LIBRARIES:
            raise
        raise MissingExtra.of(error.name, extra, purpose) from None


@contextmanager
def _threads(args: argparse.Namespace) -> Iterator[None]:
    """Compute the block with the number of threads that ``--threads`` says, or with torch's own."""
    import torch  # noqa: F401  # if it is missing, the error names the extra that converting needs

    threads = registry.module("torch", "threads")
    with threads.using(threads.checked(args.threads)):
        yield


CONVERT: Final = Command(
    name="convert", help="convert a checkpoint into a bundle", configure=_convert_arguments, run=_convert
)
RESPLIT: Final = Command(
    name="resplit", help="cut a bundle into other shards", configure=_resplit_arguments, run=_resplit
)
ADD_ONNX: Final = Command(
    name="add-onnx", help="add a graph for onnxruntime to each shard", configure=_add_onnx_arguments, run=_add_onnx
)
FAMILIES: Final = Command(
    name="families", help="list the families that can be converted", configure=_families_arguments, run=_families
)
EXAMPLE: Final = Command(
    name="example", help="copy the trained example checkpoint", configure=_example_arguments, run=_example
)
