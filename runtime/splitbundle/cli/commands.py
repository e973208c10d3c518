"""The commands that need no converter: inspect, verify, generate."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from splitbundle.backends.registry import BACKENDS
from splitbundle.bundle import Bundle
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, MissingExtra, Problem, VerificationError
from splitbundle.format import names
from splitbundle.format.manifest.document import BOUNDARY_TENSORS
from splitbundle.opening import open_bundle
from splitbundle.records import as_dict

if TYPE_CHECKING:
    from splitbundle.text.huggingface import TextTokenizer


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")


def _inspect(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle)
    console.json(describe(bundle))
    model, architecture = bundle.manifest.model, bundle.architecture
    revision = f" at {model.revision}" if model.revision else ""
    console.text(f"{model.name}: {model.family}, {model.parameters:,} parameters in {bundle.manifest.storage.dtype}")
    console.text(f"  source       {model.source}{revision}{f', {model.license}' if model.license else ''}")
    console.text(
        f"  size         {len(architecture.layers)} layers, hidden {architecture.hidden_size}, "
        f"vocabulary {architecture.vocab_size:,}, context {model.context_length or 'not stated'}"
    )
    part = bundle.manifest.extensions.get("part")
    if isinstance(part, dict):
        out = [item.get("module") for item in part.get("left_out", []) if isinstance(item, dict)]
        left = f"; without {', '.join(map(str, out))}" if out else ""
        console.text(f"  part         {part.get('name')} of {part.get('of')}{left}")
    console.text(f"  bundle id    {bundle.id}")
    console.text(f"  fingerprint  {bundle.fingerprint}")
    console.text(f"  architecture {bundle.architecture_id}")
    text, vectors = bundle.manifest.text, bundle.manifest.vectors
    stops = f", stops at {', '.join(map(str, text.stop_ids))}" if text.stop_ids else ""
    console.text(f"  text         {text.tokenizer or 'no tokenizer'}{stops}")
    checked = "none" if vectors is None else f"sequences of {', '.join(map(str, vectors.lengths))} tokens"
    console.text(f"  vectors      {checked}")
    console.text("")
    console.text("shards")
    rows = [
        (
            s.name,
            f"[{s.layers[0]}, {s.layers[1]})",
            _parts(s.embeds, s.head),
            s.parameters,
            s.bytes,
            "-" if s.graph is None else s.graph.file,
        )
        for s in bundle.shards
    ]
    console.table(("name", "layers", "with", "parameters", "bytes", "graph"), rows)
    if bundle.manifest.cuts:
        console.text("")
        console.text("boundaries")
        shape = f"(batch, sequence, {architecture.hidden_size})"
        rows_ = [(f"at layer {cut}", f"hidden {shape}, past (batch), count (batch)") for cut in bundle.manifest.cuts]
        console.table(("where", "tensors"), rows_)
    console.text("")
    console.text("files")
    absent = set(bundle.absent())
    units = {path: unit for unit, paths in bundle.manifest.units.items() for path in paths}
    files = [
        (path, file.size, file.sha256[:16], units.get(path, ""), "absent" if path in absent else "")
        for path, file in bundle.manifest.files.items()
    ]
    console.table(("path", "bytes", "sha256", "unit", ""), files)
    return 0


def _parts(embeds: bool, head: bool) -> str:
    return " and ".join(part for part, there in (("embedding", embeds), ("head", head)) if there) or "-"


def describe(bundle: Bundle) -> dict[str, object]:
    """What ``inspect --json`` says: names are those of the manifest."""
    manifest = bundle.manifest
    model = manifest.model
    shapes = (["batch", "sequence", bundle.architecture.hidden_size], ["batch"], ["batch"])
    boundary = dict(zip(BOUNDARY_TENSORS, shapes, strict=True))
    return {
        "ok": True,
        "bundle_id": bundle.id,
        "fingerprint": bundle.fingerprint,
        "architecture_id": bundle.architecture_id,
        "model": {name: getattr(model, name) for name in type(model).__slots__},
        "architecture": bundle.architecture.as_json(),
        "storage": {"dtype": manifest.storage.dtype, "exceptions": manifest.storage.exceptions},
        "shards": [as_dict(shard) for shard in manifest.shards],
        "boundaries": [{"at": cut, "tensors": boundary} for cut in manifest.cuts],
        "units": {unit: list(paths) for unit, paths in manifest.units.items()},
        "text": {"tokenizer": manifest.text.tokenizer, "stop_ids": list(manifest.text.stop_ids)},
        "files": {path: {"size": file.size, "sha256": file.sha256} for path, file in manifest.files.items()},
        "absent": list(bundle.absent()),
        "vectors": None if manifest.vectors is None else list(manifest.vectors.lengths),
        "extensions": manifest.extensions,
    }


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument("--shard", metavar="NAME", help="only what this shard needs; the rest may be absent")
    parser.add_argument("--exact", action="store_true", help="refuse files that the manifest doesn't list")
    parser.add_argument(
        "--id", metavar="sha256:…", type=bundle_id, help="the bundle id that it must have, as inspect shows it"
    )
    parser.add_argument("--run", action="store_true", help="also compute the golden vectors of the original model")
    parser.add_argument(
        "--backend",
        choices=(*BACKENDS, "all"),
        help="--run with this one, by default what is installed; all: each, compared",
    )
    _strict_argument(parser)


def _verify(args: argparse.Namespace, console: Console) -> int:
    try:
        bundle = open_bundle(args.bundle, verify=_when(args), id=args.id)
        found = bundle.verify(args.shard, exact=args.exact, progress=console.progress)
    except BundleError as error:
        if error.codes == ("stage.name",) or error.problems[0].file == str(args.bundle):
            raise  # nothing was verified: there is no such bundle or shard
        raise VerificationError(error.problems) from error
    differences = []
    if args.run or args.backend is not None:
        try:
            differences = bundle.run_vectors(
                args.shard, backend=args.backend or _installed(), progress=console.progress
            )
        except (MissingExtra, VerificationError):
            raise
        except BundleError as error:
            raise VerificationError(error.problems) from error
    console.end_progress()
    for path in found.unlisted:
        console.note(f"not listed in the manifest, and never opened: {path}")
    what = f"{args.bundle}, shard {args.shard}" if args.shard else args.bundle
    console.text(f"{what}: {len(found.files)} files, {found.bytes:,} bytes, every size and digest as listed")
    for difference in differences:
        one, other = difference.between
        what = "the original model" if other == "original" else other
        console.text(
            f"  {difference.where:12} {one} differs from {what} by {difference.relative:.2g} of the largest value"
        )
    console.json(
        {
            "ok": True,
            "bundle_id": bundle.id,
            "files": list(found.files),
            "bytes": found.bytes,
            "unlisted": list(found.unlisted),
            "differences": [
                {"where": d.where, "between": d.between, "largest": d.largest, "scale": d.scale, "relative": d.relative}
                for d in differences
            ],
        }
    )
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument("prompt", nargs="?", help="the text to go on from; by default, or for -, standard input")
    parser.add_argument("--ids", metavar="1,2,3", type=integers, help="the prompt as token ids; ids come out")
    parser.add_argument(
        "--max-new-tokens", "-n", type=positive, metavar="N", help="by default 64, or what the model has positions for"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=positive, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--backend", choices=BACKENDS, help="by default torch, or onnxruntime if that alone is installed"
    )
    parser.add_argument("--device", help="as torch names it")
    parser.add_argument("--dtype", help="to compute in: float32, float16 or bfloat16; by default the stored one")
    _strict_argument(parser)


def _strict_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict", action="store_true", help="compute only on bytes read into memory, once, and hashed there"
    )


def _when(args: argparse.Namespace) -> Literal["never", "always"]:
    return "always" if args.strict else "never"


def integers(text: str) -> tuple[int, ...]:
    """``1,2,3``, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers with commas between them, got {text!r}") from None


def bundle_id(text: str) -> str:
    """``sha256:`` and 64 digits, for argparse."""
    if not text.startswith("sha256:") or not names.SHA256.fullmatch(text.removeprefix("sha256:")):
        raise argparse.ArgumentTypeError(f"expected sha256: and 64 digits of 0-9a-f, got {text!r}")
    return text


def positive(text: str) -> int:
    """A number from 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text!r}")
    return int(text)


def _generate(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, verify=_when(args))
    text = None
    if args.ids is None:
        tokenizer = _tokenizer(bundle)
        ids = tokenizer.encode(_prompt(args.prompt))
        text = tokenizer.stream(ids)
    else:
        if args.prompt is not None:
            raise _usage("text or --ids", "both")
        ids = list(args.ids)
        last = bundle.architecture.vocab_size - 1
        if wrong := [token for token in ids if not 0 <= token <= last]:
            raise _usage(f"token ids from 0 to {last}", str(wrong[0]))
    if not ids:
        raise _usage("a prompt of at least one token", "none")
    tokens: list[int] = []
    pieces: list[str] = []
    for token in _tokens(bundle, ids, args):
        tokens.append(token)
        pieces.append(f"{',' * (len(tokens) > 1)}{token}" if text is None else text.piece(token))
        console.stream(pieces[-1])
    pieces.append("" if text is None else text.rest())
    console.stream(pieces[-1] + "\n")
    result: dict[str, object] = {"ok": True, "prompt_ids": ids, "ids": tokens}
    console.json(result | ({} if text is None else {"text": "".join(pieces)}))
    return 0


def _usage(expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="usage.prompt", argument="PROMPT", expected=expected, got=got))


def _prompt(text: str | None) -> str:
    """The prompt, be it an argument or standard input: UTF-8, whatever the locale says."""
    try:
        if text is not None and text != "-":
            return os.fsencode(text).decode("utf-8")
        return sys.stdin.buffer.read().decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise _usage("text in UTF-8", "bytes that aren't") from None


def _tokenizer(bundle: Bundle) -> TextTokenizer:
    if bundle.manifest.text.tokenizer is None:
        hint = "Give the prompt as token ids: --ids 1,2,3"
        raise BundleError(
            Problem(
                code="text.none", file=str(bundle.path), expected="a tokenizer", got="a bundle without one", hint=hint
            )
        )
    try:
        from splitbundle.text.huggingface import TextTokenizer
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise MissingExtra.of("tokenizers", "text", "turn text into token ids (or give --ids)") from None
    return TextTokenizer(bundle)


def _installed() -> str:
    """The backend that is there; the first one where all are, or none is."""
    return next((backend for backend in BACKENDS if importlib.util.find_spec(backend) is not None), BACKENDS[0])


def _tokens(bundle: Bundle, ids: list[int], args: argparse.Namespace) -> Iterator[int]:
    pipeline = bundle.pipeline(backend=args.backend or _installed(), device=args.device, dtype=args.dtype)
    given = pipeline.token_ids([ids])
    limit = bundle.architecture.position_limit
    room = 64 if limit is None else max(1, min(64, limit - len(ids) + 1))
    stop = bundle.manifest.text.stop_ids
    for drawn in pipeline.generate(
        given,
        max_new_tokens=args.max_new_tokens or room,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=stop,
    ):
        token = int(drawn[0])
        if token in stop:
            return
        yield token


COMMANDS = (
    Command(name="inspect", help="show a bundle's model, shards and files", configure=_inspect_arguments, run=_inspect),
    Command(
        name="verify", help="check a bundle's files, and what they compute", configure=_verify_arguments, run=_verify
    ),
    Command(
        name="generate",
        help="go on from a prompt, through all shards",
        configure=_generate_arguments,
        run=_generate,
    ),
)
