"""The links of Markdown pages: where they lead, and which anchors a page has."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tests.support.paths import ROOT

_FENCE: Final = re.compile(r"^([ ]*)(```+|~~~+).*?^\1\2[`~]*$", re.MULTILINE | re.DOTALL)
_CODE: Final = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_INLINE: Final = re.compile(r"\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+\"[^\"]*\")?\s*\)")
_DEFINITION: Final = re.compile(r"^\[[^\]]+\]:\s+<?(\S+?)>?$", re.MULTILINE)
_AUTOMATIC: Final = re.compile(r"<(https?://[^>\s]*)>")
_BARE: Final = re.compile(r"(?<![\w<(\[])(https?://[^\s<>)\]]+)")
_INCLUDE: Final = re.compile(r"^```\{include\} (\S+)\n```", re.MULTILINE)
_HEADING: Final = re.compile(r"^#{1,4} (.+?)(?: #+)?$", re.MULTILINE)
_SKIPPED: Final = {"build", "dist", "shared", "generated", "node_modules"}
"""Folders that hold no page of the repository."""


def pages() -> Iterator[Path]:
    """Yield every Markdown file of the checkout, but for what is built and what is hidden."""
    for directory, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        yield from (Path(directory, name) for name in sorted(names) if name.endswith(".md"))


def prose(text: str) -> str:
    """Return a page without its blocks of code and its code in lines."""
    return _CODE.sub("`code`", _FENCE.sub("", text))


def targets(text: str) -> list[str]:
    """Return what the links of a page lead to, in no particular order. Links in code don't count."""
    plain = prose(text)
    found = [*_INLINE.findall(plain), *_DEFINITION.findall(plain), *_AUTOMATIC.findall(plain)]
    rest = _DEFINITION.sub("", _INLINE.sub("]", plain))
    return [*found, *_BARE.findall(rest)]


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and MyST make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """Return the anchors of a page. What it includes from ``docs/generated`` is generated here."""
    text = page.read_text("utf-8")
    text = _INCLUDE.sub(lambda found: _generated(Path(found[1]).name), text)
    named = re.findall(r"^\(([\w.-]+)\)=$|<a (?:id|name)=\"([^\"]+)\"", text, re.MULTILINE)
    found = [each for pair in named for each in pair if each]
    counts: dict[str, int] = {}
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        own = slug(heading)
        counts[own] = counts.get(own, -1) + 1
        found.append(f"{own}-{counts[own]}" if counts[own] else own)
    return frozenset(found)


@functools.cache
def _generated(name: str) -> str:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError("docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text: str = module.PAGES[name]()
    return text


def fault(page: Path, target: str) -> str | None:
    """Return what is wrong with a link of a page, or None."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return _fault_of_address(target)
    place = (page.parent / parts.path).resolve() if parts.path else page
    if not place.exists():
        return "there is no such file"
    if not place.is_relative_to(ROOT):
        return "it leaves the repository"
    if not parts.fragment:
        return None
    if place.suffix != ".md":
        return "only pages have anchors"
    if parts.fragment not in anchors(place):
        return f"{place.relative_to(ROOT)} has no heading #{parts.fragment}"
    return None


def _fault_of_address(target: str) -> str | None:
    parts = urlsplit(target)
    if parts.scheme not in ("https", "mailto"):
        return "an address begins with https://"
    if parts.scheme == "mailto":
        return None if "@" in parts.path else "no address of mail"
    if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc):
        return "the host isn't one of the internet"
    if re.search(r"[^!#$%&'*+,/:;=?@\w.~()\[\]-]|[.,;:]$", target, re.ASCII):
        return "it has a character that an address can't have, or ends with a mark"
    return None
