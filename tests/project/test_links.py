"""Every link of every page leads to a file and to a heading of it; addresses are well formed. Nothing is fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import links
from tests.support.paths import ROOT


def test_every_link_of_every_page_leads_somewhere() -> None:
    checked, faults = 0, []
    for page in links.pages():
        for target in links.targets(page.read_text("utf-8")):
            checked += 1
            if (fault := links.fault(page, target)) is not None:
                faults.append(f"{page.relative_to(ROOT)}: {target}: {fault}")
    assert faults == []
    assert checked > 500


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("nothing.md", "there is no such file"),
        ("README.md#nothing", "README.md has no heading #nothing"),
        ("LICENSE#nothing", "only pages have anchors"),
        ("../..", "it leaves the repository"),
        ("http://example.org/", "an address begins with https://"),
        ("https://localhost/", "the host isn't one of the internet"),
        ("https://example.org/a b", "it has a character that an address can't have, or ends with a mark"),
        ("https://example.org/a.", "it has a character that an address can't have, or ends with a mark"),
        ("README.md#quick-start", None),
        ("docs/reference/commands.md#splitbundle-verify", None),
        ("https://example.org/a_b/%20?c=d#e", None),
    ],
)
def test_a_link_that_leads_nowhere_is_found(target: str, fault: str | None) -> None:
    assert links.fault(ROOT / "README.md", target) == fault


def test_links_in_code_do_not_count(tmp_path: Path) -> None:
    text = "# A `b` c\n\n[a](b.md) `[c](d.md)`\n\n```text\n[e](f.md)\n```\n\n"
    text += "<https://g.org> https://h.org/i\n\n[j]: k.md\n## A b c\n"
    assert sorted(links.targets(text)) == ["b.md", "https://g.org", "https://h.org/i", "k.md"]
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    assert links.anchors(page) == {"a-b-c", "a-b-c-1"}


def test_a_dead_link_of_the_built_pages_is_found(tmp_path: Path) -> None:
    """``make docs`` runs this on what it builds."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="top">B</h1><a href="../a.html#here">a</a>', "utf-8")
    good = '<p id="here"><a href="sub/b.html#top"></a><a href="#here"></a><a href="https://c.org/d"></a>'
    command = [sys.executable, ROOT / "docs" / "check_links.py", tmp_path]
    for text, lost in (
        (good, []),
        (
            f'{good}<a href="e.html"></a><a href="sub/b.html#f"></a><img src="g.svg">',
            ["e.html", "g.svg", "sub/b.html#f"],
        ),
    ):
        (tmp_path / "a.html").write_text(text, "utf-8")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr.splitlines() == [f"dead link: a.html: {target}" for target in lost]
        assert done.returncode == (1 if lost else 0)
    assert "docs/check_links.py build/docs" in (ROOT / "Makefile").read_text("utf-8")
