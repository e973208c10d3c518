"""Draw a set: how many times as fast as the reference each contender was, with its spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from benchmarks import machine
from benchmarks.goals import times_as_fast

_OURS: Final = "#1b6ca8"
_PEERS: Final = "#b0b7bd"
_TIMES: Final = ("prefill", "decode", "load", "import", "first token", "process", "files")
"""The beginnings of the names of times. Other figures are not drawn."""


def draw(documents: list[dict[str, Any]], path: Path) -> bool:
    """Write an SVG with a panel for each case and figure. Return False without matplotlib or without figures."""
    several = len({machine.processor(document["machine"]) for document in documents}) > 1
    panels = [panel for document in documents for panel in _panels(document, several)]
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    if not panels:
        return False
    heights = [len(bars) + 1.5 for _, _, bars in panels]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 0.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, reference, bars) in zip(axes, panels, strict=True):
        names, ratios = [name for name, _ in bars], [ratio for _, ratio in bars]
        medians = [ratio["median"] for ratio in ratios]
        below = [ratio["median"] - ratio["least"] for ratio in ratios]
        above = [ratio["greatest"] - ratio["median"] for ratio in ratios]
        error = [below, above] if any(below + above) else None  # one round has no spread
        colours = [_OURS if name.startswith("splitbundle") or "verify" in name else _PEERS for name in names]
        axis.barh(names, medians, color=colours, xerr=error, error_kw={"elinewidth": 1, "capsize": 2}, height=0.7)
        axis.bar_label(axis.containers[-1], [f" {median:.2f}" for median in medians], padding=6, fontsize=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(f"{title}: times as fast as {reference}", fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    # The file has no date and no random ids, so the same figures give the same file.
    with rc_context({"svg.hashsalt": "splitbundle"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _panels(document: dict[str, Any], several: bool) -> list[tuple[str, str, list[tuple[str, dict[str, float]]]]]:
    """Return the title, the reference and the bars of each panel. With several processors, titles name them."""
    place = machine.processor(document["machine"]) if several else ""
    runs, reference = document["runs"], document["reference"]
    found = []
    for figure in document["figures"]:
        names = dict.fromkeys(name for run in runs for name in run if figure in run[name])
        if not figure.startswith(_TIMES) or reference not in names:
            continue
        ratios = ((name, times_as_fast(runs, figure, name, reference)) for name in names)
        bars = [(name, ratio) for name, ratio in ratios if ratio is not None]
        title = " ".join(part for part in (document["model"], document["dtype"], figure, place) if part)
        found.append((title, reference, bars))
    return found
