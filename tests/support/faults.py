"""Test the commands that write: each system call fails, is interrupted, or ends the process.

    python -m tests.support.faults [--all | --every N] [--directory DIR] [SCENARIO ...]

A worker has imported everything, and runs a command again and again. ``syscalls`` puts a fault in place of one call at
a time, out of those that touch the directory of the bundle. After each fault, ``Judge`` checks the conditions that must
hold. The findings are printed as one JSON document. ``tests/converter/writing/test_faults.py`` runs this module. By
default, the errors take turns over the calls. With ``--all``, every error is tried at every call. With ``--every N``,
one fault of N is tried.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import itertools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from splitbundle.cli.console import Command, Console
from tests.support import fault_sharing, syscalls
from tests.support.fault_judges import (
    ArchiveJudge,
    CheckpointJudge,
    ExportJudge,
    Scenario,
    SignatureJudge,
    checkpointed_stage,
    state,
)
from tests.support.fault_points import points
from tests.support.syscalls import Call, Fault, Tracee

SECONDS: Final = 300
"""The seconds after which a command that hasn't ended is a finding."""


class Worker:
    """A process that runs commands, one at a time, on request."""

    def __init__(self, run: Callable[[Sequence[str]], int]) -> None:
        orders, self._order = os.pipe()
        self._reply, replies = os.pipe()
        self.until = replies
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._order)
            os.close(self._reply)
            _work(orders, replies, run)
        os.close(orders)
        os.close(replies)
        os.read(self._reply, 1)  # by now it has the handles that it keeps, and no others
        self._handles = self._count()

    def run(
        self, arguments: Sequence[str], root: Path, decide: Callable[[Call], Fault | None]
    ) -> dict[str, Any] | None:
        """Return the exit status of a command and its output; None if its process was ended."""
        tracee = Tracee(self.pid)
        os.write(self._order, json.dumps(arguments).encode() + b"\n")
        tracee.run(str(root), self.until, decide)
        if tracee.ended is not None:
            self._close()
            return None
        answer = self._answer()
        if self.alive and self._count() != self._handles:
            self.end()  # an interruption may come before a new handle is kept, and the handle would hold a lock
        return answer

    def _count(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def _answer(self) -> dict[str, Any]:
        said = b""
        while not said.endswith(b"\n"):
            if not select.select([self._reply], [], [], SECONDS)[0]:
                self.end()
                return {"status": None, "said": f"it hangs, for {SECONDS} s"}
            piece = os.read(self._reply, 2**16)
            if not piece:
                _, status = os.waitpid(self.pid, 0)
                self._close()
                return {"status": None, "said": f"the process ended with {os.waitstatus_to_exitcode(status)}"}
            said += piece
        answer: dict[str, Any] = json.loads(said)
        return answer

    @property
    def alive(self) -> bool:
        """Whether it can run another command."""
        return self.pid > 0

    def end(self) -> None:
        """End the process."""
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._close()

    def _close(self) -> None:
        self.pid = 0
        os.close(self._order)
        os.close(self._reply)


def _work(orders: int, replies: int, run: Callable[[Sequence[str]], int]) -> None:
    status: int | None
    os.write(replies, b".")
    try:
        for line in os.fdopen(orders, "rb"):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    status = run(json.loads(line))
                except BaseException:  # noqa: BLE001  # the command line is to let nothing through
                    status = None
                    traceback.print_exc(file=said)
            os.write(replies, json.dumps({"status": status, "said": said.getvalue()}).encode() + b"\n")
    finally:
        os._exit(0)


def put_back(template: Path, root: Path) -> None:
    """Make a directory hold the same files as another one, with their times."""
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(template, root, dirs_exist_ok=True)


def run_scenario(
    scenario: Scenario, directory: Path, run: Callable[[Sequence[str]], int], thorough: bool, every: int = 1
) -> dict[str, Any]:
    """Run all points of a scenario, or one in ``every``. Return their number, their outcomes, and the findings."""
    root, template = directory / "root", directory / "template"
    for path in (root, template):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    scenario.prepare(template)
    put_back(template, root)
    before = state(root)
    judge = scenario.judge(scenario, root, template, run)
    worker = Worker(run)
    for _ in range(2):  # the first run may import, and fill caches
        put_back(template, root)
        calls: list[Call] = []

        def reference(call: Call) -> Fault | None:
            calls.append(call)  # noqa: B023  # called within this round
            fault = scenario.always(call)
            return None if fault is None else fault

        answer = worker.run(scenario.arguments, root, reference)
        if answer is None or answer["status"] != 0:
            raise RuntimeError(f"{scenario.name} without a fault: {answer}")
    judge.new = judge.identity(root / scenario.target)
    outcomes: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    wrong = []
    same = () if thorough else scenario.same(calls)
    faulty = [call for call in calls if scenario.always(call) is None and call not in same]
    for point in itertools.islice(points(faulty, thorough), 0, None, every):
        if state(root) != before:
            put_back(template, root)
        if not worker.alive:
            worker = Worker(run)
        met = False

        def decide(call: Call) -> Fault | None:
            nonlocal met
            if call.number == point.call.number:  # noqa: B023
                met = call.name == point.call.name  # noqa: B023
                return point.fault  # noqa: B023
            if met and point.onward is not None and point.onward(call):  # noqa: B023
                return replace(point.fault, late=call.name == "close")  # noqa: B023
            return scenario.always(call)

        answer = worker.run(scenario.arguments, root, decide)
        if answer is None:
            wait_for_children(root)
        now, problems = judge.problems(point, answer)
        if not met:
            problems.append("the call didn't come")
        if answer is not None and answer["status"] is None:
            worker.end()
        kinds[point.what] += 1
        outcomes[f"{'killed' if answer is None else answer['status']}, {now}"] += 1
        if problems:
            where = f"{point.call.number} {point.call.name} {' '.join(point.call.paths)}".replace(str(root), "")
            wrong.append({"at": where, "what": point.what, "problems": problems})
    worker.end()
    return {
        "scenario": scenario.name,
        "new": judge.old() is None,
        "calls": len(faulty),
        "points": sum(kinds.values()),
        "kinds": dict(kinds),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
    }


def before_replacing(calls: Sequence[Call]) -> Sequence[Call]:
    """The calls before the old bundle is touched."""
    return calls[: next(i for i, call in enumerate(calls) if call.name == "renameat2")]


def after_beginning(calls: Sequence[Call]) -> Sequence[Call]:
    """The calls after the new bundle's directory was made."""
    return calls[next(i for i, call in enumerate(calls) if call.name == "mkdir" and ".tmp-" in call.paths[0]) + 1 :]


def around_graphs(calls: Sequence[Call]) -> Sequence[Call]:
    """The calls before the first graph, and those after the last one."""
    graphs = [i for i, call in enumerate(calls) if call.name == "openat" and ".onnx" in call.paths[0]]
    flushed = next(i for i, call in enumerate(calls) if call.name == "fsync")
    return [*calls[: graphs[0]], *calls[flushed:]]


def no_exchange(call: Call) -> Fault | None:
    """A file system that can't exchange two directories in one step."""
    return Fault(error=errno.EINVAL, last=False) if call.name == "renameat2" else None


def scenarios(sources: Path, root: Path, servers: fault_sharing.Servers | None = None) -> list[Scenario]:
    """Every command that writes, and every state that it may find. Those that share need servers."""
    made = sources / "bundles"
    target = "x.splitbundle"
    place = str(root / target)

    def nothing(template: Path) -> None:
        """No bundle is there."""

    def bundle(template: Path) -> None:
        shutil.copytree(made / "old", template / target)

    def interrupted(template: Path) -> None:
        shutil.copytree(made / "old", template / f".{target}.old")

    def standing(name: str) -> Callable[[Path], object]:
        """Another one of the bundles is there."""
        return lambda template: shutil.copytree(made / name, template / target)

    def exported(template: Path) -> None:
        shutil.copytree(sources / "exported", template / "checkpoint")

    def littered(template: Path) -> None:
        bundle(template)
        for name in ("old", "tmp-0123456789abcdef", "tmp-fedcba9876543210"):
            (template / f".{target}.{name}").mkdir()
            (template / f".{target}.{name}" / "manifest.json").write_text("{}")
        (template / f".{target}.tmp-0123456789abcdef.lock").touch()  # the other scenario's bundle was removed first

    def with_source(prepare: Callable[[Path], object]) -> Callable[[Path], object]:
        """The bundle or the archive that is read lies beside the target, so that reading meets faults too."""

        def both(template: Path) -> None:
            shutil.copytree(made / "parts", template / "parts")
            shutil.copy(sources / "parts.tar", template)
            prepare(template)

        return both

    convert = ("convert", str(sources / "source"), "-o", place, "--no-check", "--quiet")
    resplit = ("resplit", place, "--split", "1", "--quiet")
    pickles = ("convert", str(sources / "pickles"), "-o", place, "--no-check", "--quiet", "--allow-pickle")

    def scenario(name: str, arguments: tuple[str, ...], prepare: Callable[[Path], object], **more: Any) -> Scenario:
        return Scenario(name=name, arguments=arguments, target=target, prepare=prepare, **more)

    def export(name: str, arguments: tuple[str, ...], prepare: Callable[[Path], object], **more: Any) -> Scenario:
        return Scenario(name=name, arguments=arguments, target="checkpoint", prepare=prepare, judge=ExportJudge, **more)

    extract = ("extract", str(made / "parts"), "--shard", "trunk", "-o", place, "--quiet")
    merge = ("merge", str(made / "trunk"), str(made / "rest"), "-o", place, "--quiet")
    merge_over = ("merge", place, str(made / "rest"), "-o", place, "--force", "--quiet")
    cast = ("cast", str(made / "parts"), "--dtype", "bfloat16", "-o", place, "--threads", "1", "--quiet")
    cast_over = ("cast", place, *cast[2:], "--force")
    several = ("--max-shard-size", "300", "--quiet")  # three weight files and an index, in place of one file
    pack = ("pack", str(root / "parts"), "-o", str(root / "x.tar"), "--quiet")
    unpack = ("unpack", str(root / "parts.tar"), "-o", place, "--quiet")
    sign = ("sign", place, "--key", str(sources / "key.pem"), "--quiet")
    archive: dict[str, Any] = {"target": "x.tar", "judge": ArchiveJudge}
    exporting = ("export", str(made / "parts"), "-o", str(root / "checkpoint"), *several)
    elsewhere = ("resplit", str(made / "old"), "-o", place, "--split", "1", "--quiet")
    over = (*convert, "--split", "1", "--force")
    two_steps: dict[str, Any] = {"same": before_replacing, "always": no_exchange}
    mending: dict[str, Any] = {"same": after_beginning, "always": no_exchange}
    return [
        scenario("convert", convert, nothing),
        scenario("convert --force", over, bundle),
        scenario("convert --force, in two steps", over, bundle, **two_steps),
        scenario("convert --allow-pickle", pickles, nothing),
        scenario("add-onnx", ("add-onnx", place, "--quiet"), bundle, same=around_graphs),
        scenario("resplit", elsewhere, nothing),
        scenario("save_as", ("save-as", str(made / "old"), "-o", place, "--quiet"), nothing),
        Scenario(
            name="a training checkpoint",
            arguments=("save-checkpoint", str(made / "old"), str(root / "runs"), "--quiet", "--step=3"),
            target="runs",
            prepare=lambda template: _save_checkpoints(made / "old", template / "runs"),
            judge=CheckpointJudge,
        ),
        scenario("save_as over itself", ("save-as", place, "-o", place, "--force", "--quiet"), bundle),
        scenario("resplit --force", (*resplit, "--force"), bundle),
        scenario("resplit --force, after an interruption", (*resplit, "--force"), interrupted, **mending),
        scenario("resplit --force, after two killed writers", (*resplit, "--force"), littered, same=after_beginning),
        scenario("extract", extract, nothing),
        scenario("extract --force", (*extract, "--force"), standing("bottom"), same=before_replacing),
        scenario("merge", merge, nothing),
        scenario("merge --force, over a part", merge_over, standing("trunk")),
        scenario("cast", cast, nothing),
        scenario("cast over itself", cast_over, standing("parts"), same=before_replacing),
        Scenario(name="pack", arguments=pack, prepare=with_source(nothing), **archive),
        Scenario(
            name="pack --force",
            arguments=(*pack, "--force"),
            prepare=with_source(lambda template: shutil.copy(sources / "old.tar", template / "x.tar")),
            **archive,
        ),
        scenario("unpack", unpack, with_source(nothing)),
        scenario("unpack --force", (*unpack, "--force"), with_source(standing("old"))),
        scenario("sign", sign, standing("parts"), judge=SignatureJudge),
        *fault_sharing.scenarios(made, root, servers),
        export("export", exporting, nothing),
        export("export --force", (*exporting, "--force"), exported),
        export("export --force, in two steps", (*exporting, "--force"), exported, **two_steps),
    ]


def make_sources(directory: Path) -> None:
    """Make a checkpoint of one layer, the same checkpoint as a pickle, bundles of it, and an export of one.

    The bundle ``parts`` has three shards and golden vectors. ``bottom``, ``trunk`` and ``rest`` are parts of it.
    """
    import torch
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from transformers import LlamaConfig, LlamaForCausalLM

    import splitbundle
    import splitbundle_converter

    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(**sizes, vocab_size=8, max_position_embeddings=8, tie_word_embeddings=True)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory / "source")
    (directory / "pickles").mkdir()
    shutil.copy(directory / "source" / "config.json", directory / "pickles")
    torch.save(model.state_dict(), directory / "pickles" / "pytorch_model.bin")
    made = directory / "bundles"
    splitbundle_converter.convert(directory / "source", made / "old", check=False)
    splitbundle_converter.convert(directory / "source", made / "parts", split=(0, 1))
    parts = splitbundle.open(made / "parts")
    for name, shards in {"bottom": ["bottom"], "trunk": ["trunk"], "rest": ["bottom", "top"]}.items():
        parts.extract(made / name, *shards)
    splitbundle_converter.export(parts, directory / "exported")
    parts.pack(directory / "parts.tar")
    splitbundle.open(made / "old").pack(directory / "old.tar")
    key = Ed25519PrivateKey.generate()  # its signatures are the same each time
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "key.pem").write_bytes(data)


def _save_as_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--force", action="store_true")


def _save_as(args: argparse.Namespace, console: Console) -> int:
    """Set the first number of each matrix of the first layer. So a second run makes the same bundle."""
    import torch

    import splitbundle

    bundle = splitbundle.open(args.bundle)
    stage = bundle.stage(layers=(0, 1), embeds=False, head=False)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.view(-1)[0] = 0.5
    bundle.save_as(args.output, stage, force=args.force)
    return 0


def _save_checkpoints(bundle: Path, directory: Path, steps: Sequence[int] = (1, 2)) -> None:
    """Save checkpoints in which the first number is the step."""
    import torch

    from splitbundle.training import Checkpoints

    stage = checkpointed_stage(bundle)
    for step in steps:
        with torch.no_grad():
            next(stage.parameters()).flatten()[0] = step
        Checkpoints(directory, keep=2).save(step, stage)


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle")
    parser.add_argument("directory")
    parser.add_argument("--step", type=int)


def _save_checkpoint(args: argparse.Namespace, console: Console) -> int:
    _save_checkpoints(Path(args.bundle), Path(args.directory), [args.step])
    return 0


SAVE_CHECKPOINT: Final = Command(
    name="save-checkpoint", help="save a checkpoint", configure=_checkpoint_arguments, run=_save_checkpoint
)
SAVE_AS: Final = Command(name="save-as", help="save a stage", configure=_save_as_arguments, run=_save_as)
"""``Bundle.save_as`` as a command, so that a signal ends it as it ends the others."""
CHILD: Final = """
import json, shutil, sys
with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
for number, (_, target) in enumerate(request["files"]):
    print(json.dumps({"reading": number}), flush=True)
    shutil.copyfile(SOURCE, target)
print(json.dumps({"done": len(request["files"])}), flush=True)
"""
"""Stands in for the child that reads pickles: its result is ready. Importing torch would take seconds each time."""


def command(sources: Path) -> Callable[[Sequence[str]], int]:
    """The command line, with every import that a command needs. The metadata that names commands isn't read."""
    from splitbundle.cli import archives, cache, cast, main, parts, share, sign
    from splitbundle_converter.checkpoint import pickles
    from splitbundle_converter.commands import ADD_ONNX, CONVERT, RESPLIT
    from splitbundle_converter.export_command import EXPORT

    found = [CONVERT, RESPLIT, ADD_ONNX, EXPORT, parts.EXTRACT, parts.MERGE, cast.COMMAND, SAVE_AS, SAVE_CHECKPOINT]
    found += [archives.PACK, archives.UNPACK, sign.COMMAND, cache.COMMAND, share.PULL, share.PUSH]
    vars(main)["_commands"] = lambda arguments: found
    vars(pickles)["CHILD_CODE"] = CHILD.replace("SOURCE", repr(str(sources / "source" / "model.safetensors")))
    return main.main


def wait_for_children(root: Path) -> None:
    """Wait until no process has its working directory here: a child may outlive its killed parent a little."""
    while any(_stands_in(process, root) for process in Path("/proc").iterdir() if process.name.isdecimal()):
        time.sleep(0.001)


def _stands_in(process: Path, root: Path) -> bool:
    try:
        return (process / "cwd").readlink().is_relative_to(root)
    except OSError:
        return False


def main() -> int:
    """Run the scenarios, and print the findings as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scenario", nargs="*", help="its name; by default all")
    parser.add_argument("--all", action="store_true", help="every error at every call")
    parser.add_argument("--every", type=int, default=1, help="one fault in so many (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="where to make bundles; by default in memory, where that can be")
    parser.add_argument("--cpu", type=int, help="run on one alone: who traces and who is traced take turns anyway")
    args = parser.parse_args()
    names = [scenario.name for scenario in scenarios(Path(), Path())]
    for name in args.scenario:
        if name not in names:
            parser.error(f"no scenario {name!r}; there are: {'; '.join(names)}")
    reason = syscalls.unavailable()
    if reason is not None:
        json.dump({"unavailable": reason}, sys.stdout)
        return 0
    if args.cpu is not None:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[args.cpu % len(cpus)]})
    import torch

    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    place = args.directory or (memory if os.access(memory, os.W_OK) else None)
    with tempfile.TemporaryDirectory(prefix="splitbundle-faults-", dir=place) as made:
        directory = Path(made).resolve()
        with contextlib.redirect_stdout(sys.stderr):
            make_sources(directory)
        run = command(directory)
        found = []
        os.environ["SPLITBUNDLE_CACHE"] = str(directory / "root" / "cache")
        with fault_sharing.servers(directory / "bundles") as servers:
            for scenario in scenarios(directory, directory / "root", servers):
                if not args.scenario or scenario.name in args.scenario:
                    found.append(run_scenario(scenario, directory, run, args.all, args.every))
        json.dump({"scenarios": found}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
