"""Adapters of this project's readers for the kit: ``python adapters.py NAME STEP BUNDLE``.

README.md has the protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Verdict = dict[str, Any]
"""``verdict``: accepted, refused (with ``problems``) or unable (with ``reason``)."""


def _runtime(backend: str) -> Callable[[str, str], Verdict]:
    """The runtime, called as an app calls it, with one of its backends."""

    def judge(step: str, path: str) -> Verdict:
        import splitbundle

        try:
            bundle = splitbundle.open(path)
            if step == "stage":
                bundle.pipeline(backend=backend, **({"threads": 1} if backend == "onnxruntime" else {}))
            elif step != "open":
                bundle.verify(exact=step == "exact")
        except splitbundle.BundleError as error:
            return {"verdict": "refused", "problems": [problem.as_json() for problem in error.problems]}
        return {"verdict": "accepted"}

    return judge


COMMANDS = {
    "open": ("inspect",),
    "stage": ("generate", "--ids", "0", "--max-new-tokens", "1"),
    "verify": ("verify",),
    "exact": ("verify", "--exact"),
}


def _command(step: str, path: str) -> Verdict:
    """The command line, with ``--json``."""
    from splitbundle.cli import main

    out, err = io.StringIO(), io.StringIO()
    name, *options = COMMANDS[step]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.main([name, path, *options, "--json"])
    said = json.loads(out.getvalue().splitlines()[-1])
    if said.get("ok", True) != (status == 0) or "Traceback" in err.getvalue():
        raise RuntimeError(f"exit status {status}, and {out.getvalue()[:200]} {err.getvalue()[:200]}")
    return {"verdict": "accepted"} if status == 0 else {"verdict": "refused", "problems": said["problems"]}


def _schemas(step: str, path: str) -> Verdict:
    """The JSON Schemas. They check only the two documents, and have no codes."""
    import jsonschema

    import splitbundle_schemas

    if step != "open":
        return {"verdict": "unable", "reason": "a schema judges documents"}
    problems = []
    for kind in ("manifest", "architecture"):
        place = Path(path, f"{kind}.json")
        if not place.is_file():  # reading a pipe would wait
            return {"verdict": "unable", "reason": f"{kind}.json is no file"}
        try:
            value = json.loads(place.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            return {"verdict": "unable", "reason": f"{kind}.json: {type(error).__name__}"}
        validator = jsonschema.Draft202012Validator(splitbundle_schemas.load(kind))
        problems += [{"file": f"{kind}.json", "got": error.message[:200]} for error in validator.iter_errors(value)]
    return {"verdict": "refused", "problems": problems} if problems else {"verdict": "accepted"}


def _numbers(step: str, path: str) -> Verdict:
    """The results of calls, by the stages of torch in float32."""
    import torch

    import splitbundle

    bundle = splitbundle.open(Path(path, "model.splitbundle"))
    cases = json.loads(Path(path, "calls.json").read_text("ascii"))["cases"]
    with torch.inference_mode():
        return {"verdict": "computed", "cases": [_results(torch, splitbundle, bundle, case) for case in cases]}


def _results(torch: Any, splitbundle: Any, bundle: Any, case: Any) -> list[Any]:
    layers = len(bundle.architecture.layers)
    ends = [0, *case["cuts"], layers]
    parts = [
        bundle.stage(layers=(start, stop), embeds=i == 0, head=i == len(ends) - 2, dtype="float32", threads=1)
        for i, (start, stop) in enumerate(itertools.pairwise(ends))
    ]
    caches = [part.cache(len(case["calls"][0]["past"]), CAPACITY) for part in parts]
    return [_call(torch, splitbundle, parts, caches, call) for call in case["calls"]]


def _call(torch: Any, splitbundle: Any, parts: list[Any], caches: list[Any], call: Any) -> Any:
    rows, past = call["rows"], call["past"]
    count = [len(row) for row in rows]
    longest = max(count)
    given: Any = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    states = []
    try:
        for part, cache in zip(parts, caches, strict=True):
            given = part(given, past=past, count=count, cache=cache)
            states.append([row[:n].tolist() for row, n in zip(given, count, strict=True)])
    except splitbundle.BundleError as error:
        return {"code": error.problems[0].code}
    return {"hidden": states[:-1], "logits": states[-1]}


def _wire(step: str, path: str) -> Verdict:
    """Frames, and the payloads of one row of tokens."""
    import numpy

    from splitbundle.backends.onnxruntime import payloads
    from splitbundle.errors import BundleError
    from splitbundle.records import as_dict
    from splitbundle.wire import frames
    from splitbundle.wire.messages import PROTOCOL

    files = {place.name: place.read_bytes() for place in Path(path).iterdir()}

    def numbers(payload: bytes, encoding: str, tokens: int, width: int) -> str:
        found = payloads.decode(memoryview(payload), encoding, (tokens,), max(tokens, 1), width)
        return found[0, :tokens].astype("<f4").tobytes().hex()

    try:
        if step == "frame":
            message, payload = frames.unpack(files["frame"], int(files["limit"]))
            header = json.loads(json.dumps({"op": message.op, **as_dict(message)}))
            if header.get("protocol", PROTOCOL) != PROTOCOL:  # of another protocol, only the number is known
                header = {name: header[name] for name in ("op", "protocol")}
            found: Verdict = {"verdict": "accepted", "header": header}
            if hasattr(message, "encoding"):
                tokens = sum(message.count) if hasattr(message, "count") else message.tokens
                found["numbers"] = numbers(bytes(payload), message.encoding, tokens, message.width)
            return found
        encoding, width = files["encoding"].decode(), int(files["width"])
        if step == "encode":
            given = numpy.frombuffer(files["numbers"], "<f4").reshape(1, -1, width)
            made = b"".join(bytes(piece) for piece in payloads.encode(given, (given.shape[1],), encoding))
            return {"verdict": "accepted", "payload": made.hex()}
        size = {"float32": 4 * width, "int8": 4 + width}.get(encoding, 2 * width)
        tokens = len(files["payload"]) // size
        return {"verdict": "accepted", "numbers": numbers(files["payload"], encoding, tokens, width)}
    except BundleError as error:
        return {"verdict": "refused", "problems": [problem.as_json() for problem in error.problems]}


def _with_more(judge: Callable[[str, str], Verdict]) -> Callable[[str, str], Verdict]:
    """Answer the steps of ``--wire`` and ``--numbers`` too."""

    def answer(step: str, path: str) -> Verdict:
        return _numbers(step, path) if step == "numbers" else _wire(step, path) if step in WIRE else judge(step, path)

    return answer


CAPACITY = 40
"""Slots of a cache: more than the calls of the kit need."""
WIRE = ("frame", "encode", "decode")
ADAPTERS: dict[str, Callable[[str, str], Verdict]] = {
    "torch": _with_more(_runtime("torch")),
    "onnxruntime": _runtime("onnxruntime"),
    "command": _command,
    "schemas": _schemas,
}


def main() -> int:
    """Print one verdict."""
    parser = argparse.ArgumentParser(prog="adapters.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=ADAPTERS)
    parser.add_argument("step", choices=(*COMMANDS, *WIRE, "numbers"))
    parser.add_argument("bundle")
    args = parser.parse_args()
    print(json.dumps(ADAPTERS[args.name](args.step, args.bundle)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
