"""How signals end a command that serves: it drains, and a second one ends it at once, also while it starts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

import splitbundle
from splitbundle import BundleError
from tests.support.paths import TESTS

BUNDLE = str(TESTS / "golden" / "v1.0" / "gpt2.splitbundle")
SERVE = ["serve-stage", BUNDLE, "trunk", "--listen", "127.0.0.1:0", "--json", "--grace", "600"]
SLOW = f"""
import sys, time
import splitbundle.backends.torch.served as served
from splitbundle.__main__ import run
def work(*_, **__):
    print("computing", flush=True)
    time.sleep(600)
served.ServedStage.run = work
sys.argv = ["splitbundle", *{SERVE!r}]
sys.exit(run())
"""
"""A server whose steps take ten minutes."""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
NUMBERS = [signal.SIGINT, signal.SIGTERM]


def started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


@contextlib.contextmanager
def draining(number: signal.Signals, grace: int) -> Iterator[subprocess.Popen[str]]:
    """A server that has got a signal in the middle of a step. Afterwards it is gone, and its client knows."""
    process = started("-c", SLOW.replace("'600'", f"'{grace}'"))
    assert process.stdout is not None
    assert process.stderr is not None
    stage = splitbundle.open(BUNDLE).stage("trunk", remote=json.loads(process.stdout.readline())["url"], timeout=1)
    found: list[BundleError] = []

    def compute() -> None:
        with pytest.raises(BundleError) as raised, torch.no_grad():
            stage(torch.zeros(1, 2, stage.architecture.hidden_size))
        found.append(raised.value)

    client = threading.Thread(target=compute)
    client.start()
    assert process.stdout.readline() == "computing\n"
    process.send_signal(number)
    assert process.stderr.readline().startswith("ending: ")
    yield process
    client.join(60)
    assert found[0].codes == ("peer.unreachable",)


@pytest.mark.parametrize("number", NUMBERS)
def test_while_it_drains(number: signal.Signals) -> None:
    with draining(number, 600) as process:
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert errors == "splitbundle: [interrupted] expected to finish, got a second interruption\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_step_is_given_up_after_the_grace(number: signal.Signals) -> None:
    with draining(number, 1) as process:
        out, errors = process.communicate(timeout=60)  # the step itself would take ten minutes
    assert (process.returncode, out) == (0, "")
    assert errors == "the step that is computed takes longer than --grace 1: it is given up\n"


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("wait", [0.0, 0.02, 0.1, 0.5])
def test_while_torch_is_imported(number: signal.Signals, wait: float) -> None:
    code = f"import sys, splitbundle.__main__ as m; sys.argv = ['splitbundle', *{SERVE!r}]; print(1, flush=True); "
    process = started("-c", code + "sys.exit(m.run())")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(1.2 * wait + 0.3)
    for _ in range(2):
        process.send_signal(number)
        time.sleep(wait)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert [json.loads(line)["problems"][0]["code"] for line in out.splitlines()] == ["interrupted"]
