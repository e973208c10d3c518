"""Adapters of this project's readers for the kit: ``python adapters.py NAME STEP BUNDLE``.

README.md has the protocol.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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


ADAPTERS: dict[str, Callable[[str, str], Verdict]] = {
    "torch": _runtime("torch"),
    "onnxruntime": _runtime("onnxruntime"),
    "command": _command,
    "schemas": _schemas,
}


def main() -> int:
    """Print one verdict."""
    parser = argparse.ArgumentParser(prog="adapters.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=ADAPTERS)
    parser.add_argument("step", choices=COMMANDS)
    parser.add_argument("bundle")
    args = parser.parse_args()
    print(json.dumps(ADAPTERS[args.name](args.step, args.bundle)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
