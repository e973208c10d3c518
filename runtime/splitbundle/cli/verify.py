"""The command ``verify``: check a bundle's files, and compute its golden vectors."""

from __future__ import annotations

import argparse
from typing import Final

from splitbundle.backends.registry import BACKENDS, installed_backend
from splitbundle.bundle import Bundle
from splitbundle.cli.arguments import add_strict_argument, add_threads_argument, bundle_id, verify_when
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, MissingExtra, VerificationError
from splitbundle.opening import open_bundle, pull_bundle
from splitbundle.records import members
from splitbundle.stages.golden import ITSELF, described, side
from splitbundle.storage.signature_files import signature_files


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument(
        "--shard", metavar="NAME", help="check only the files that this shard needs; the others may be missing"
    )
    parser.add_argument(
        "--exact", action="store_true", help="refuse a file or an empty directory that the manifest doesn't list"
    )
    parser.add_argument("--whole", action="store_true", help="refuse a partial bundle")
    parser.add_argument("--id", metavar="sha256:…", type=bundle_id, help="the expected bundle id, as inspect shows it")
    parser.add_argument(
        "--public-key",
        metavar="FILE",
        action="append",
        help="a public key in PEM; the bundle must be signed by it, or by one of several",
    )
    parser.add_argument(
        "--signature", metavar="FILE", help="with --public-key: the signature, if it isn't in the bundle's directory"
    )
    parser.add_argument("--run", action="store_true", help="also compute the golden vectors of the original model")
    parser.add_argument(
        "--backend",
        choices=(*BACKENDS, "all"),
        help="the backend for --run, by default an installed one; all runs and compares both",
    )
    parser.add_argument(
        "--require-original",
        action="store_true",
        help="with --run: refuse golden vectors that a changed bundle made of itself, as they prove no parity",
    )
    add_threads_argument(parser)
    add_strict_argument(parser)


_NOT_ABOUT_THE_BUNDLE: Final = ("network", "remote.", "usage.", "output.", "input.", "signature.key")
"""The codes of errors that say nothing about a bundle: the network, the cache, the arguments, a key."""


def _remote_shard(args: argparse.Namespace) -> str | None:
    """Return the only shard to pull, if the bundle is on another machine."""
    return args.shard if "://" in args.bundle else None


def _run(args: argparse.Namespace, console: Console) -> int:
    if args.signature is not None and args.public_key is None:
        args.parser.error("argument --signature: it needs --public-key, the key to check it with")
    signature = None
    try:
        bundle = open_bundle(
            args.bundle, verify=verify_when(args), id=args.id, shard=_remote_shard(args), progress=console.transfer
        )
        if args.public_key is not None:
            if args.signature is None and "://" in args.bundle and not signature_files(bundle.path):
                pull_bundle(args.bundle, shards=[])  # it may have been signed since it was pulled
            signature = bundle.verify_signature(args.public_key, signature=args.signature)
        found = bundle.verify(args.shard, exact=args.exact, whole=args.whole, progress=console.progress)
    except MissingExtra:
        raise
    except BundleError as error:
        if error.codes == ("stage.name",) or error.problems[0].file in (args.bundle, *(args.public_key or ())):
            raise  # nothing was verified, as the bundle, the shard or the key doesn't exist
        if all(code.startswith(_NOT_ABOUT_THE_BUNDLE) for code in error.codes):
            raise  # nothing was verified, as the bundle didn't come here
        raise VerificationError(error.problems) from error
    differences = []
    if args.run or args.require_original or args.backend is not None:
        try:
            differences = bundle.run_vectors(
                args.shard,
                backend=args.backend or installed_backend(),
                threads=args.threads,
                require_original=args.require_original,
                progress=console.progress,
            )
        except (MissingExtra, VerificationError):
            raise
        except BundleError as error:
            raise VerificationError(error.problems) from error
    texts = 0
    needed = {bundle.manifest.model.text_file, bundle.manifest.text.tokenizer}
    if args.shard is None and None not in needed and not needed & set(found.absent):
        texts = _check_texts(bundle, console)
    console.end_progress()
    for path in found.unlisted:
        console.note(f"not listed in the manifest, and never opened: {path}")
    what = f"{args.bundle}, shard {args.shard}" if args.shard else args.bundle
    partial, whole = bool(bundle.absent()), bundle.whole_shards()
    if partial:
        console.note(f"The bundle is partial. These shards have all their files: {', '.join(whole) or 'none'}.")
    files = f"{len(found.files)} of {len(bundle.manifest.files)} files" if found.absent else f"{len(found.files)} files"
    console.text(f"{what}: {files}, {found.bytes:,} bytes, every size and digest as listed")
    if signature is not None:
        console.text(f"  signed by {signature.public_key}, {signature.key}, in {signature.path}")
    elif there := len(signature_files(bundle.path)):
        signatures = "a signature" if there == 1 else f"{there} signatures"
        console.note(f"The bundle has {signatures}, not checked: --public-key checks who signed it.")
    if texts:
        console.text(f"  {texts} golden texts and chats have the ids of the source's tokenizer")
    for difference in differences:
        one, other = difference.between
        what = described(other)
        console.text(
            f"  {difference.where:12} {one} differs from {what} by {difference.relative:.2g} of the largest value"
        )
        for tie in difference.ties:
            console.note(
                f"The router of layer {tie.layer} has a near tie for token {tie.token} of case {tie.case}: here it "
                f"chooses {_numbers(tie.chosen)}, in the original {_numbers(tie.original)}. A rounding decides, and "
                "with the original's choice the results agree. So each layer was compared alone."
            )
    itself = bool(differences) and side(bundle) == ITSELF
    distances = bundle.distances(backend=args.backend) if differences else []
    for distance in distances:
        console.text(f"  {distance.where:12} quantization moved it by {distance.relative:.2g} of the largest value")
    if differences and bundle.manifest.storage.encodings:
        console.note(
            "Products with quantized weights were computed without rounding their other factor, to judge the weights. "
            "By default a stage rounds it, and is faster: docs/guides/quantize.md says how far that moves results."
        )
    if itself:
        console.note(
            "The weights of this bundle were changed, and its golden vectors are its own results. So this proves that "
            "they are reproduced here, and not parity with an original model."
        )
    console.json(
        {
            "ok": True,
            "bundle_id": bundle.id,
            "files": list(found.files),
            "bytes": found.bytes,
            "unlisted": list(found.unlisted),
            "absent": list(bundle.absent()),
            "partial": partial,
            "golden_texts": texts,
            "signature": None if signature is None else members(signature),
            "whole_shards": list(whole),
            "distances": [
                {"where": d.where, "largest": d.largest, "scale": d.scale, "relative": d.relative} for d in distances
            ],
            "proves": "reproduction" if itself else "parity" if differences else None,
            "differences": [
                {"where": d.where, "between": d.between, "largest": d.largest, "scale": d.scale, "relative": d.relative}
                for d in differences
            ],
            "router_ties": [members(tie) for d in differences for tie in d.ties],
        }
    )
    return 0


def _numbers(experts: tuple[int, ...]) -> str:
    return "expert " + ", ".join(map(str, experts))


def _check_texts(bundle: Bundle, console: Console) -> int:
    """Return the number of golden texts and chats that have the right ids, and 0 where the libraries are missing."""
    try:
        return bundle.check_texts()
    except MissingExtra as error:
        console.note(f"The golden texts weren't checked. {error}")
        return 0
    except BundleError as error:
        raise VerificationError(error.problems) from error


COMMAND: Final = Command(
    name="verify", help="check a bundle's files, and compute its golden vectors", configure=_add_arguments, run=_run
)
