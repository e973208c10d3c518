"""Fuzz the readers of bytes from strangers: documents, weight headers, graphs, tokenizers, archives, frames.

    python -m tests.support.fuzzing TARGET --seconds 600 [--corpus DIRECTORY]

The fuzzing is coverage-guided, with atheris (libFuzzer). A reader must accept any bytes or raise a BundleError with a
short text, within a minute and a gigabyte. Anything else ends the run, and leaves the bytes in a file. Each finding
becomes a case: a vector, or a line in ``tests/conformance/cases.py`` or ``tests/support/graph_cases.py``. Statistics
go to stderr, and the number of executions to stdout.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from splitbundle.storage import weight_headers
from tests.support.paths import ROOT, TESTS

BUNDLE: Final = TESTS / "conformance" / "bundles" / "tiny.splitbundle"
SECONDS_EACH: Final = 60
"""Wall-clock seconds, on machines that others may share. These inputs need milliseconds."""
MEBIBYTES: Final = 1024
"""A limit of data memory. libFuzzer's own limit is on the peak of resident memory, which includes its parent's."""
LENGTH: Final = 65536
TEXT: Final = "the cat\n s\u00e4t \U0001f642"
Target = Callable[[bytes], object]


def manifest_target() -> Target:
    """Read a manifest beside the architecture of its base."""
    from splitbundle.format.architecture.parser import parse_architecture
    from splitbundle.format.manifest import rules
    from splitbundle.format.manifest.parser import parse_manifest

    architecture = parse_architecture((BUNDLE / "architecture.json").read_bytes())

    def run(data: bytes) -> None:
        rules.check_against(parse_manifest(data), architecture)

    return run


def architecture_target() -> Target:
    from splitbundle.format.architecture.parser import parse_architecture

    return parse_architecture


def weights_target() -> Target:
    """Read a header whose listed digest is right, so that the code behind the digest check is reached."""
    import hashlib

    import splitbundle
    from splitbundle.format.manifest.document import File

    expected = splitbundle.open(BUNDLE).stored("layer-000")

    def run(data: bytes) -> None:
        length = 8 + int.from_bytes(data[:8], "little")
        listed = File(size=len(data), sha256="", header_sha256=hashlib.sha256(data[:length]).hexdigest())
        weight_headers.read_header(io.BytesIO(data), "fuzzed.safetensors", listed, expected)

    return run


def graph_target() -> Target:
    """Read a graph as the graph of each shard: an embedding alone, and a layer with the head."""
    import splitbundle
    from splitbundle import BundleError
    from splitbundle.verification import onnx_rules

    bundle = splitbundle.open(BUNDLE)
    shards = [
        (shard.graph, onnx_rules.used(shard, bundle.locate_tensors(shard)))
        for shard in bundle.shards
        if shard.graph is not None
    ]

    def run(data: bytes) -> None:
        refusals = []
        for graph, weights in shards:
            try:
                onnx_rules.check(data, graph, weights)
            except BundleError as error:
                refusals.append(error)
        if len(refusals) == len(shards):
            raise BundleError(problem for error in refusals for problem in error.problems)

    return run


def tokenizer_target() -> Target:
    """Read a tokenizer as a bundle's: text to ids and back, at once and in pieces.

    The library's panics must become BundleError.
    """
    from unittest import mock

    import splitbundle
    from splitbundle.text.huggingface import TextTokenizer
    from splitbundle.verification import tokenizer_rules

    bundle = splitbundle.open(BUNDLE)
    vocab_size = bundle.architecture.vocab_size

    def run(data: bytes) -> None:
        tokenizer_rules.check(data, "tokenizer.json", vocab_size)
        with mock.patch.object(tokenizer_rules, "read", return_value=data):
            text = TextTokenizer(bundle)
        ids = text.encode(TEXT)
        text.decode(ids)
        stream = text.stream(ids[:1])
        for token in ids[1:]:
            stream.piece(token)
        stream.rest()

    return run


def archive_target() -> Target:
    """Read the headers of an archive, and hold them against its manifest. Every checksum counts as right."""
    import tarfile
    from unittest import mock

    from splitbundle.format.manifest.parser import parse_manifest
    from splitbundle.sharing import archive, tar_members

    class _Anything:
        def __contains__(self, value: object) -> bool:
            return True

    def run(data: bytes) -> None:
        file = io.BytesIO(data)
        with mock.patch.object(tarfile, "calc_chksums", return_value=_Anything()):
            inside = archive._inside(tar_members.read_members(file, len(data), "x.tar"), "x.tar")
        manifest = parse_manifest(archive._manifest(file, inside["manifest.json"], "x.tar", None))
        archive._check_members(inside, manifest, "x.tar")

    return run


def signature_target() -> Target:
    """Read a signature and the statement in it. Every signature counts as one by the right key."""
    import splitbundle
    from splitbundle.format import signature_document

    bundle = splitbundle.open(BUNDLE)
    expected = signature_document.digests_of(bundle.manifest.files, bundle.id.removeprefix("sha256:"))

    def run(data: bytes) -> None:
        envelope = signature_document.parse_envelope(data, "signatures/x.sigstore.json")
        statement = signature_document.parse_statement(envelope.payload, "signatures/x.sigstore.json")
        signature_document.check_statement(statement, expected, "signatures/x.sigstore.json")

    return run


def frame_target() -> Target:
    """Read a frame by either way of reading a header, and write it again."""
    from splitbundle.wire import frames, headers

    def run(data: bytes) -> None:
        message, payload = frames.unpack(data, LENGTH)
        if headers._parse_any(data[frames.PREFIX : len(data) - len(payload)]) != message:
            raise AssertionError(f"only the fast way reads {message}")
        again, same = frames.unpack(frames.pack(message, [payload]))
        if (again, bytes(same)) != (message, bytes(payload)):
            raise AssertionError(f"{message} was written as {again}")

    return run


def service_target() -> Target:
    """Answer requests in order. Each line is a header; ``$session`` and ``$run`` in it are the last ids.

    A payload of the right size is added, so that the code behind the check of sizes is reached.
    """
    from splitbundle import BundleError
    from splitbundle.wire import frames, headers
    from tests.support import stand_in_stage

    def answered(data: bytes, ids: dict[bytes, bytes], to: Any) -> None:
        for name, value in ids.items():
            data = data.replace(name, value)
        try:
            size = frames.payload_size(headers.parse(data))
        except BundleError:
            size = 0
        frame = frames.MAGIC + len(data).to_bytes(4, "little") + data + bytes(min(size, LENGTH))
        try:
            answer, _ = frames.unpack(to.answer(frame, "alice" if len(data) % 8 else "bob"))
        except BundleError as error:
            raise AssertionError("an answer that is no frame") from error
        for name, member in ((b"$session", "session"), (b"$run", "run")):
            if hasattr(answer, member):
                ids[name] = getattr(answer, member).encode()

    def run(data: bytes) -> None:
        to, _, clock = stand_in_stage.service()
        ids: dict[bytes, bytes] = {}
        for line in data.split(b"\n")[:50]:
            answered(line, ids, to)
            clock.now += len(line) % 3
        to.stop()
        if len(to.sessions) or to.sessions.slots or to.sessions._kept_bytes:
            raise AssertionError("sessions are left")

    return run


def with_loop(data: bytes) -> bytes:
    """Return a graph with a loop, which the graphs of the small bundle don't have."""
    from onnx import ModelProto

    from tests.support.graph_case import written
    from tests.support.graph_loop_cases import add_loop

    model = ModelProto.FromString(data)
    add_loop(model)
    return written(model)


def first_archive() -> bytes:
    import splitbundle

    with tempfile.TemporaryDirectory() as temporary:
        return splitbundle.open(BUNDLE).pack(Path(temporary) / "x.tar").path.read_bytes()


def first_signature() -> bytes:
    import splitbundle
    from splitbundle.format import signature_document

    bundle = splitbundle.open(BUNDLE)
    digests = signature_document.digests_of(bundle.manifest.files, bundle.id.removeprefix("sha256:"))
    return signature_document.make_envelope(signature_document.make_statement("x", digests), b"x" * 64, "0" * 64)


def wire_seeds(name: str) -> dict[str, bytes]:
    """Return the frames of the vectors of the protocol, or the requests of its dialogues, by the vectors' names."""
    found: dict[str, bytes] = {}
    for path in sorted((TESTS / "conformance" / "wire").glob("*/*.json")):
        vector = json.loads(path.read_text("utf-8"))
        if name == "service" and "steps" in vector:
            text = "\n".join(json.dumps(step["request"]) for step in vector["steps"] if "request" in step)
            for short, known in (("s", "session"), ("r", "run")):
                text = text.replace(f'"${short}"', f'"${known}"')
            found[path.stem] = text.encode()
        elif name == "frame" and "frame" in vector:
            found[f"{path.parent.name}-{path.stem}"] = bytes.fromhex(vector["frame"])
    return found


def first_frame() -> bytes:
    return wire_seeds("frame")["accept-run-all"]


def first_dialogue() -> bytes:
    return wire_seeds("service")["training"]


MADE: Final[dict[str, Callable[[], bytes]]] = {
    "archive": first_archive,
    "signature": first_signature,
    "frame": first_frame,
    "service": first_dialogue,
}
"""Name -> the function that makes the input that fuzzing begins with, where the small bundle has no file for it."""
TARGETS: Final[dict[str, tuple[Callable[[], Target], str]]] = {
    "manifest": (manifest_target, "manifest.json"),
    "architecture": (architecture_target, "architecture.json"),
    "weights": (weights_target, "*.safetensors"),
    "graph": (graph_target, "*.onnx"),
    "tokenizer": (tokenizer_target, "tokenizer/tokenizer.json"),
    "archive": (archive_target, "*.tar"),
    "signature": (signature_target, "signatures/*.json"),
    "frame": (frame_target, "*.frame"),
    "service": (service_target, "*.frame"),
}
"""Name -> the function that makes the reader, and the files of the small bundle that fuzzing begins with."""
ANSWERS: Final = {"service"}
"""Targets that answer whatever comes, and refuse by an answer."""


def seeds(name: str, directory: Path) -> None:
    """Write the first inputs: the small bundle's own files, and the conformance vectors of the kind."""
    if name in MADE:
        (directory / "made").write_bytes(MADE[name]())
    for stem, data in wire_seeds(name).items():
        (directory / stem).write_bytes(data[:LENGTH])
    for path in BUNDLE.glob(TARGETS[name][1]):
        (directory / path.name).write_bytes(path.read_bytes()[:LENGTH])
        if name == "graph":
            (directory / f"loop-{path.name}").write_bytes(with_loop(path.read_bytes()))
    for path in (TESTS / "conformance").glob("*/*.json"):
        vector: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if vector.get("document") == name and ("text" in vector or "hex" in vector):
            text = bytes.fromhex(vector["hex"]) if "hex" in vector else vector["text"].encode()
            (directory / f"{path.parent.name}-{path.stem}").write_bytes(text)


def fuzz(name: str, arguments: list[str]) -> None:
    """Run until libFuzzer ends this process."""
    import resource

    import atheris

    resource.setrlimit(resource.RLIMIT_DATA, (MEBIBYTES * 2**20, MEBIBYTES * 2**20))
    with atheris.instrument_imports(include=["splitbundle"]):
        target = TARGETS[name][0]()
    from splitbundle import BundleError

    def once(data: bytes) -> None:
        try:
            target(data)
        except BundleError as error:
            if len(str(error)) > 100_000:
                raise AssertionError(f"a text of {len(str(error))} characters") from error

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def run(name: str, seconds: int, corpus: str | None = None, before: str = "", runs: int = -1) -> int:
    """Fuzz in a separate process, which runs the program ``before`` first. Return the number of executions.

    Args:
        name: The target.
        seconds: The most seconds.
        corpus: Where to begin, and to keep what reaches further; by default nowhere.
        before: A program.
        runs: The most executions; by default any number.

    Raises:
        RuntimeError: a finding, with libFuzzer's last words.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(corpus or temporary)
        directory.mkdir(exist_ok=True, parents=True)
        seeds(name, directory)
        limits = [f"-timeout={SECONDS_EACH}", "-rss_limit_mb=0", f"-max_len={LENGTH}"]
        arguments = [*limits, f"-max_total_time={seconds}", f"-runs={runs}", "-print_final_stats=1", str(directory)]
        program = f"{before}\nfrom tests.support import fuzzing; fuzzing.fuzz({name!r}, {arguments!r})"
        path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", program],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=seconds + 600,
        )
    found = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"{name}: exit status {done.returncode}\n{done.stderr[-4000:]}")
    return int(found[1])


def main() -> int:
    """Fuzz one target, or each in turn."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.fuzzing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("target", choices=(*TARGETS, "all"))
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default: %(default)s)")
    parser.add_argument("--corpus", help="where to begin, and to keep what reaches further; by default nowhere")
    args = parser.parse_args()
    for name in TARGETS if args.target == "all" else [args.target]:
        print(f"{name}: {run(name, args.seconds, args.corpus):,} executions, nothing found", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
