"""The command ``export``: write a bundle as a checkpoint that other libraries load."""

from __future__ import annotations

import argparse
from typing import Final

import splitbundle_converter
from splitbundle.cli.arguments import size
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, Problem
from splitbundle_converter.commands import libraries
from splitbundle_converter.options import MAX_SHARD_SIZE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory with all weights")
    parser.add_argument(
        "--to",
        choices=("hf", "gguf"),
        default="hf",
        help="the form: hf, the default, is Hugging Face's; gguf is llama.cpp's",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="PATH",
        required=True,
        help="the directory of the new checkpoint, or the new GGUF file",
    )
    parser.add_argument("--adapter", metavar="DIRECTORY", help="merge this LoRA into the weights first")
    parser.add_argument("--config", metavar="FILE", help="write this config.json in place of the one in the bundle")
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="write quantized weights as plain numbers, and not as compressed-tensors or blocks",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="write larger weights of hf as several files with an index, as in 2GB; by default 5GB",
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false", help="do not verify the weight files of the bundle"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that was exported before, or a GGUF file"
    )


def _run(args: argparse.Namespace, console: Console) -> int:
    noted: list[str] = []
    with libraries("torch", "export weights"):
        path = splitbundle_converter.export(
            args.bundle,
            args.output,
            to=args.to,
            adapter=args.adapter,
            config=args.config,
            dequantize=args.dequantize,
            max_shard_size=args.max_shard_size,
            check=args.check,
            force=args.force,
            notes=console.collect(noted),
            progress=console.progress,
        )
    console.end_progress()
    try:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in files}
    except OSError as error:
        expected, hint = "a directory that can be listed", "The new directory is in place. Look at it yourself"
        got = f"{error.strerror}"
        problem = Problem(code="file.unreadable", file=args.output, expected=expected, got=got, hint=hint)
        raise BundleError(problem) from error
    console.text(f"{args.output}: {len(sizes)} file{'s' if len(sizes) > 1 else ''}, {sum(sizes.values()):,} bytes")
    for name in sorted(sizes):
        console.text(f"  {name}")
    console.json({"ok": True, "path": str(args.output), "files": dict(sorted(sizes.items())), "notes": noted})
    return 0


EXPORT: Final = Command(
    name="export", help="write a bundle as a Hugging Face checkpoint or a GGUF file", configure=_add_arguments, run=_run
)
