"""Hostile chat templates end with an error, soon and in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from typing import Final

import pytest

from splitbundle import BundleError
from splitbundle.text.chat_template import ChatTemplate
from splitbundle.text.template_limits import WORK, LimitReached, budget, spend
from tests.support.hostile_templates import HOSTILE, LARGE
from tests.support.paths import ROOT
from tests.support.yardsticks import at_most, parsing

SOON: Final = 10
"""How many times longer than parsing 16 MiB of JSON a template may take. That is about two seconds."""
SLOW: Final = (
    *("long: cases", "long: fat loop", "long: fat macro", "long: fat test", "long: macro tree", "long: sorting often"),
    *("long: shared dicts written", "long: shared lists as JSON", "long: shared lists compared", "long: index"),
    *("deep: lists", "deep: key", "deep: some elifs"),
)
"""The templates that take the longest."""


def refusal(source: str) -> str:
    """Return what is wrong with a template that must be refused."""
    with pytest.raises(BundleError) as caught:
        ChatTemplate(source, file="chat_template.jinja", variables={}).render([{"role": "user", "content": "hi"}])
    (problem,) = caught.value.problems
    assert (problem.code, problem.file) == ("text.template", "chat_template.jinja")
    assert problem.hint
    return problem.got


def tiered(name: str) -> object:
    return pytest.param(name, marks=pytest.mark.long) if name in SLOW else name


@pytest.mark.parametrize("name", [tiered(name) for name in HOSTILE])
def test_a_hostile_template_ends_soon(name: str) -> None:
    with at_most(SOON, parsing, 2**24):
        got = refusal(HOSTILE[name])
    assert len(got) < 400
    if name.startswith(("large", "long")):
        asked = ("more work than", "more than", "isn't simple", "is a number of")
        assert any(words in got for words in asked), got


MEASURED = """
import json, pathlib, re, sys
from splitbundle import BundleError
from splitbundle.text.chat_template import ChatTemplate
codes = []
for source in json.load(sys.stdin):
    try:
        ChatTemplate(source, file="x", variables={}).render([{"role": "user", "content": "hi"}])
    except BundleError as error:
        codes += error.codes
# Not ru_maxrss: it keeps what the parent had when it forked.
print(json.dumps([codes, int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much memory it took")
def test_templates_that_ask_for_much_get_little_memory() -> None:
    """All of them in one process, which holds the greatest amount that any of them took: at most 256 MiB."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MEASURED]
    ran = subprocess.run(
        command,
        input=json.dumps([*LARGE.values()]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=True,
    )
    codes, kibibytes = json.loads(ran.stdout)
    assert codes == ["text.template"] * len(LARGE)
    assert kibibytes < 256 * 1024


def test_the_limits_hold_in_threads() -> None:
    """No signal is used, which only the main thread may have, and each thread spends its own budget."""
    found: list[str] = []
    source = HOSTILE["large: text doubled by +"]
    threads = [threading.Thread(target=lambda: found.append(refusal(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["line 1: more work than rendering these messages may take"] * 4


def test_a_budget_is_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(n) %}{{ [i, i]|length }}{% endfor %}", file="x", variables={})
    rounds = 20_000
    first = template.render([], n=rounds)
    for _ in range(8):  # together they spend more than one budget
        assert template.render([], n=rounds) == first == "2" * rounds
    with budget(0):
        spend(WORK)
        with budget(0):
            spend(WORK)
        with pytest.raises(LimitReached):
            spend(1)


def test_a_larger_input_has_a_larger_budget() -> None:
    """A template that copies each message some times works for messages of any size."""
    template = ChatTemplate(
        "{% for m in messages %}{{ ('<' + m.content | trim + '>' ~ m.content)|replace('x', 'y') }}{% endfor %}",
        file="x",
        variables={},
    )
    for size in (10, WORK):
        got = template.render([{"role": "user", "content": "a" * size}])
        assert got == "<" + "a" * size + ">" + "a" * size
