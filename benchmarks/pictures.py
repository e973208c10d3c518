"""Draw a set: how many times as fast as the reference each contender was, with its spread, on one scale.

    python -m benchmarks.pictures

draws the pictures of all result files anew. They are SVG that is written here and by no library. So the same results
give the same bytes on every machine, and a test compares them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import machine
from benchmarks.goals import times_as_fast
from benchmarks.processes import ROOT

_TIMES: Final = ("prefill", "decode", "load", "import", "first token", "process", "files")
"""The beginnings of the names of times. Other figures are not drawn."""
_PLOT, _VALUES, _ROW, _HEAD, _GAP, _LETTER, _MARGIN = 400, 130, 18, 22, 12, 6.2, 16
"""Widths of the bars' area and of the column of numbers; heights of a row, of a title, and between panels; the width of
a letter in 11 px; the margin. All in px."""
_STYLE: Final = """
  svg { font: 11px sans-serif; }
  .ground { fill: #ffffff; } text { fill: #1f2328; } .quiet { fill: #59636e; } .title { font-weight: bold; }
  .grid { stroke: #d8dee4; } .one { stroke: #59636e; } .spread { stroke: #1f2328; }
  .ours { fill: #1b6ca8; } .peer { fill: #98a2ac; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #14181d; } text { fill: #e6edf3; } .quiet { fill: #9aa5b1; }
    .grid { stroke: #2f363e; } .one { stroke: #9aa5b1; } .spread { stroke: #e6edf3; }
    .ours { fill: #4a9fd8; } .peer { fill: #66717c; }
  }
"""


class _Bar(NamedTuple):
    name: str
    ratio: dict[str, float]
    """``least``, ``median`` and ``greatest`` of the rounds."""


class _Panel(NamedTuple):
    title: str
    reference: str
    rounds: int
    bars: list[_Bar]


def draw(documents: list[dict[str, Any]], path: Path) -> bool:
    """Write an SVG with a panel for each case and figure. Return False if nothing was compared."""
    text = picture(documents)
    if text is None:
        return False
    path.write_text(text, "utf-8")
    return True


def picture(documents: list[dict[str, Any]]) -> str | None:
    """Return the SVG of some cases, or None if nothing was compared.

    A bar begins at 1, where the reference is, and the scale doubles in equal steps. So twice as fast and half as fast
    are bars of one length. All panels have the same scale.
    """
    panels = [panel for document in documents for panel in _panels(document)]
    if not panels:
        return None
    bars = [bar for panel in panels for bar in panel.bars]
    low = math.floor(min(0, *(math.log2(bar.ratio["least"]) for bar in bars)) - 0.01)
    high = math.ceil(max(0, *(math.log2(bar.ratio["greatest"]) for bar in bars)) + 0.01)
    left = _MARGIN + max(len(bar.name) for bar in bars) * _LETTER + 8
    width = left + _PLOT + _VALUES + _MARGIN

    def x(ratio: float) -> float:
        return left + _PLOT * (math.log2(ratio) - low) / (high - low)

    body, y = list(_notes(panels, 2 ** _step(low, high))), 58.0
    for panel in panels:
        body.append(_text(_MARGIN, y + 14, panel.title, "title"))
        top = y + _HEAD
        bottom = top + _ROW * len(panel.bars)
        body += [_line(x(2.0**tick), top, bottom, "grid") for tick in _ticks(low, high) if tick]
        for row, bar in enumerate(panel.bars):
            body += _bar(bar, x, left, top + _ROW * row, panel.rounds)
        body += [_line(x(1), top, bottom, "one")]
        body += [_text(x(2.0**tick), bottom + 12, _times(tick), "quiet", "middle") for tick in _ticks(low, high)]
        y = bottom + 14 + _GAP
    size = f'width="{width:.0f}" height="{y:.0f}" viewBox="0 0 {width:.0f} {y:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title about">',
            f'<title id="title">Times as fast as {escape(_references(panels))}</title>',
            f'<desc id="about">{escape(" ".join(_told(panel) for panel in panels))}</desc>',
            f"<style>{_STYLE}</style>",
            '<rect class="ground" width="100%" height="100%"/>',
            *body,
            "</svg>\n",
        ]
    )


def _panels(document: dict[str, Any]) -> Iterator[_Panel]:
    runs, reference, threads = document["runs"], document["reference"], document["threads"]
    place = f"{machine.processor(document['machine'])}, {threads} thread{'s' if threads > 1 else ''}"
    for figure in document["figures"]:
        names = dict.fromkeys(name for run in runs for name in run if figure in run[name])
        if not figure.startswith(_TIMES) or reference not in names:
            continue
        ratios = ((name, times_as_fast(runs, figure, name, reference)) for name in names)
        bars = [_Bar(name, ratio) for name, ratio in ratios if ratio and 0 < ratio["least"] <= ratio["greatest"] < 1e9]
        what = " ".join(part for part in (document["model"], document["dtype"], figure) if part)
        counted = f"{len(runs)} round{'s' if len(runs) > 1 else ''}"
        yield _Panel(f"{what}: {place}, {counted}", reference, len(runs), bars)


def _notes(panels: list[_Panel], factor: int) -> Iterator[str]:
    yield _text(_MARGIN, 22, f"Times as fast as {_references(panels)}", "title")
    spread = "Bar: median of the rounds. Line across it: least to greatest round."
    yield _text(_MARGIN, 37, spread if any(panel.rounds > 1 for panel in panels) else "One round.", "quiet")
    scale = (
        f"Right of 1 is faster, left of 1 is slower. All panels have one scale; a step of it is a factor of {factor}."
    )
    yield _text(_MARGIN, 51, scale, "quiet")


def _references(panels: list[_Panel]) -> str:
    return " or ".join(dict.fromkeys(panel.reference for panel in panels))


def _bar(bar: _Bar, x: Any, left: float, top: float, rounds: int) -> Iterator[str]:
    least, median, greatest = (bar.ratio[key] for key in ("least", "median", "greatest"))
    kind = "ours" if "splitbundle" in bar.name or "verify" in bar.name else "peer"
    start, end = sorted((x(1), x(median)))
    middle = top + _ROW / 2
    yield _text(left - 8, middle + 4, bar.name, anchor="end")
    shape = f'x="{start:.1f}" y="{top + 3:.1f}" width="{max(end - start, 1):.1f}" height="{_ROW - 6}"'
    yield f'<rect class="{kind}" {shape}/>'
    if rounds > 1:
        ends = (f"M{x(each):.1f} {middle - 3:.1f}v6" for each in (least, greatest))
        across = f"M{x(least):.1f} {middle:.1f}H{x(greatest):.1f}"
        yield f'<path class="spread" d="{" ".join((*ends, across))}"/>'
    yield _text(left + _PLOT + 10, middle + 4, _number(bar.ratio, rounds))


def _number(ratio: dict[str, float], rounds: int) -> str:
    least, median, greatest = (
        f"{ratio[key]:{'.0f' if ratio[key] >= 100 else '.2f' if ratio[key] >= 0.1 else '.2g'}}"
        for key in ("least", "median", "greatest")
    )
    return f"{median} ({least} to {greatest})" if rounds > 1 else median


def _told(panel: _Panel) -> str:
    """Return the numbers of a panel as a sentence, for those who can't see it."""
    return f"{panel.title}: {'; '.join(f'{bar.name} {_number(bar.ratio, panel.rounds)}' for bar in panel.bars)}."


def _ticks(low: int, high: int) -> list[int]:
    """Return the powers of 2 that the scale names, at most nine, among them 0."""
    return [tick for tick in range(low, high + 1) if tick % _step(low, high) == 0]


def _step(low: int, high: int) -> int:
    return math.ceil((high - low) / 8)


def _times(tick: int) -> str:
    return f"1/{2**-tick}" if tick < 0 else str(2**tick)


def _text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}{place}>{escape(said)}</text>'


def _line(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>'


def main() -> None:
    """Write the pages and pictures of a directory of results anew, from its JSON files."""
    from benchmarks import report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    report.write_pages(parser.parse_args().results)


if __name__ == "__main__":
    main()
