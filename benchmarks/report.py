"""Write the results: a JSON file for each case, a page for each set, and one page with all goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, pictures
from benchmarks.goals import spread, times_as_fast
from benchmarks.processes import say
from benchmarks.sets import LIMIT

_TIMED: Final = "Of the calls in one process, a prompt's figure is the least, a token's the median."
_ABOUT: Final = {
    "import": "Seconds from the start of a process to its end.",
    "size": "Bytes of the weight files beside those of the parameters' tensors.",
    "resplit": "Seconds for copying a bundle to other cuts, and hashing every copied file, in memory already.",
    "verify": "Seconds for hashing all files of a bundle, in memory already.",
    "convert": "Seconds from the start of a process to its end; nothing is compared with the original.",
    "cold": "Seconds from the start of a process to its first token, and of them for importing the libraries.",
    "load": "Seconds until it can compute, without imports and with; to the first token; private memory (RssAnon).",
    "prefill": f"Milliseconds a token of a prompt, with the last position's logits alone. {_TIMED}",
    "decode": f"Milliseconds a token after the prompt. {_TIMED}",
    "long": f"Milliseconds a token after prompts of three lengths, and of the prompt in the middle. {_TIMED}",
    "batch": f"Milliseconds a token and row, for one row and for eight. {_TIMED}",
    "shards": f"Milliseconds a token, for one shard and for three that are chained. {_TIMED}",
    "memory": "The most private memory (RssAnon) while generating, beyond the imports'.",
    "quantized": "Milliseconds a token, of a prompt of 256 and after it, with weights in 8 and 4 bits.",
    "experts": "Milliseconds a token of a Qwen 3 with 48 experts a layer, of which a token uses 8.",
    "contention": "Milliseconds a token after a prompt of 64, quiet and beside processes that loop in Python. Each is "
    "the median of the calls in one process. The command lets threads sleep after a fifth of a millisecond, and "
    "computes with fewer of them where that is faster.",
}
_KEYS: Final = {"set", "model", "dtype", "threads", "rounds", "reference", "goals", "runs", "machine", "figures"} | {
    "left out",
    "differences",
}
"""The keys of all documents, including those of older versions, which lack the other keys."""


def write(document: dict[str, Any], results: Path) -> None:
    """Write the JSON file of one case. It replaces only results of the same processor."""
    results.mkdir(parents=True, exist_ok=True)
    path = _path(document, results)
    temporary = path.with_name(f"{path.name}.writing")  # an interruption does not damage the old file
    temporary.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def _path(document: dict[str, Any], results: Path) -> Path:
    """Return the file of a case, whose name has the processor. Files of older versions lack it, and keep their name."""
    name = "-".join(part for part in (document["set"], document["model"], document["dtype"]) if part)
    old, own = results / f"{name}.json", machine.tag(document["machine"])
    there = _read(old) if old.exists() else None
    return old if there and machine.tag(there["machine"]) == own else results / f"{name}.{own}.json"


def write_pages(results: Path) -> None:
    """Write all pages, and a picture for each set, from all JSON files in the directory."""
    if not results.is_dir():
        return
    by_set: dict[str, list[dict[str, Any]]] = {name: [] for name in _ABOUT}
    for path in sorted(results.glob("*.json")):
        if (document := _read(path)) is not None:
            by_set[document["set"]].append(document)
    index = ["# Benchmarks", "", "Written by `python -m benchmarks`; what is compared, and how, is told there.", ""]
    goals: dict[str, list[str]] = {place: [] for place in _places([each for own in by_set.values() for each in own])}
    index += [f"Measured on {'; '.join(goals)}.", ""] if goals else []
    pages = []
    for name, own in by_set.items():
        if not own:
            continue
        own.sort(key=lambda each: (each["model"], each["dtype"], _place(each)))
        drawn = pictures.draw(own, results / f"{name}.svg")
        against = " or ".join(dict.fromkeys(each["reference"] for each in own))
        shown = f"\n![How many times as fast as {against} each contender is]({name}.svg)\n" if drawn else ""
        head = f"# {name}\n\nMeasured on {'; '.join(_places(own))}.\n\n{_ABOUT[name]}\n"
        (results / f"{name}.md").write_text(f"{head}{shown}\n{markdown(own)}", "utf-8")
        pages.append(f"[{name}]({name}.md)")
        for document in own:
            for goal in document["goals"]:
                model = f"{document['model']} {document['dtype']}".strip()
                cells = [f"[{name}]({name}.md)", model, _rounds(document), goal["what"], *_goal(goal, document)]
                goals[_place(document)].append(f"| {' | '.join(cells)} |")
    for place, rows in goals.items():
        table = ["| set | model | rounds | goal | bound | came | |", "|---|---|---|---|---|---|---|"]
        index += [f"## {place}", "", *(table + rows if rows else ["No set with goals ran here."]), ""]
    (results / "README.md").write_text("\n".join([*index, f"Figures: {', '.join(pages)}.", ""]), "utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    """Return the document in a file. For a file of another kind, print a line on stderr and return None."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError:
        document = None
    if isinstance(document, dict) and document.keys() >= _KEYS and document["set"] in _ABOUT:
        return document
    say(f"ignored: {path} isn't what a run of the benchmark writes")
    return None


def _place(document: dict[str, Any]) -> str:
    """Return the processor and the number of threads of a document."""
    threads = document["threads"]
    return f"{machine.processor(document['machine'])}, {threads} thread{'s' if threads > 1 else ''}"


def _places(documents: list[dict[str, Any]]) -> list[str]:
    return sorted({_place(document) for document in documents})


def markdown(documents: list[dict[str, Any]]) -> str:
    """Return tables of some cases in Markdown, each with its goals and its machine."""
    return "\n".join(line for document in documents for line in _case(document))


def _case(document: dict[str, Any]) -> list[str]:
    runs, reference = document["runs"], document["reference"]
    rounds = _rounds(document)
    title = " ".join(part for part in (document["set"], document["model"], document["dtype"]) if part)
    counted = f"{'medians of ' if len(runs) > 1 else ''}{rounds} round{'' if rounds in ('1', '1 of 1') else 's'}"
    lines = [f"## {title}: {_place(document)}, {counted}", ""]
    lines += ["It was interrupted after these rounds.", ""] if document.get("interrupted") else []
    lines += ["One round has no spread.", ""] if len(runs) == 1 else []
    columns = document.get("columns") or {}  # documents of older versions lack it
    lines += _beside(columns, runs, reference) if columns else []
    for figure in document["figures"]:
        lines += [] if figure in columns.values() else _figure(figure, runs, reference)
    lines += [_outcome(goal, document) for goal in document["goals"]]
    lines += [""] if document["goals"] else []
    if rates := [run["the machine"] for run in runs if "the machine" in run]:
        each = (f"{name} {_rate(name, [rate[name] for rate in rates])}" for name in rates[0])
        lines += [f"The machine, in the same run: {'; '.join(each)}.", ""]
        shares = [times_as_fast(runs, figure, name, LIMIT) for figure in document["figures"] for name in runs[0]]
        if any(share["median"] > 1.03 for share in shares if share):
            lines += ["More than the limit came, so others used the machine while it was measured: run this again.", ""]
    if differences := document["differences"]:
        greatest = max(differences, key=lambda name: differences[name])
        told = f"{differences[greatest]:.2g} of the largest logit ({greatest})"
        lines += [f"Logits differ from transformers' by {told} at most.", ""]
    lines += [f"Left out: {name}: {why}." for name, why in document["left out"].items()]
    lines += [""] if document["left out"] else []
    lines += [f"Not run: {', '.join(document['not run'])}.", ""] if document.get("not run") else []
    return [*lines, f"{machine.text(document['machine'])}.", ""]


def _figure(figure: str, runs: list[dict[str, Any]], reference: str) -> list[str]:
    names = [name for name, own in runs[0].items() if figure in own]
    if not names:
        return []  # this system does not tell the figure
    values = {name: spread([run[name][figure] for run in runs]) for name in names}
    limited, compared, several = LIMIT in values, reference in values, len(runs) > 1
    unit, factor = unit_of(figure)
    heads = [f"{figure}, {unit}", *(["median", "least to greatest"] if several else ["came"])]
    heads += [f"{reference} ÷ this{' (spread)' if several else ''}"] if compared else []
    heads += ["of the limit"] if limited else []
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, value in values.items():
        low, middle, high = (f"{_short(value[key] * factor)}" for key in ("least", "median", "greatest"))
        cells = [name, middle, *([f"{low} to {high}"] if several else [])]
        if compared and (ratio := times_as_fast(runs, figure, name, reference)):
            cells.append(_spread(ratio, ".2f", several))
        if limited and (share := times_as_fast(runs, figure, name, LIMIT)):
            cells.append(f"{share['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _beside(columns: dict[str, str], runs: list[dict[str, Any]], reference: str) -> list[str]:
    """Return a table of the figures that were measured beside busy processes, and one of their ratios."""
    first, several = next(iter(columns.values())), len(runs) > 1
    unit, factor = unit_of(first)
    names = [name for name, own in runs[0].items() if own.keys() >= {*columns.values()}]
    lines = [f"| {' | '.join([f'{first}, {unit}', *columns])} |", f"|---|{'---|' * len(columns)}"]
    for name in names:
        found = [spread([run[name][figure] * factor for run in runs]) for figure in columns.values()]
        lines.append(f"| {' | '.join([name, *(_spread(each, '.3g', several) for each in found)])} |")
    if reference not in names:
        return [*lines, ""]
    lines += ["", f"| {' | '.join([f'{reference} ÷ this', *columns])} |", f"|---|{'---|' * len(columns)}"]
    for name in names:
        ratios = [times_as_fast(runs, figure, name, reference) for figure in columns.values()]
        lines.append(f"| {' | '.join([name, *(_spread(each, '.2f', several) for each in ratios if each)])} |")
    return [*lines, ""]


def unit_of(figure: str) -> tuple[str, float]:
    """Return the unit of a figure in tables, and the factor that converts its value to this unit."""
    if figure.startswith(("prefill", "decode")):
        return "ms a token", 1e3
    if figure.startswith("private"):
        return "MiB", 2**-20
    return ("bytes", 1) if figure == "bytes" else ("s", 1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(found: dict[str, float], form: str, several: bool, unit: str = "") -> str:
    """Return the median, and with several rounds also the least and the greatest value."""
    low, middle, high = (f"{found[key]:{form}}" for key in ("least", "median", "greatest"))
    return f"{middle}{unit} ({low} to {high})" if several else f"{middle}{unit}"


def _rounds(document: dict[str, Any]) -> str:
    """Return the number of rounds that ran and the number of the set. Documents of older versions lack the latter."""
    own = document.get("rounds of the set")
    return str(document["rounds"]) if own is None else f"{document['rounds']} of {own}"


def _rate(name: str, found: list[float]) -> str:
    unit = " GFLOP/s" if name.startswith("multiply") else " GB/s"
    return _spread(spread([rate / 1e9 for rate in found]), ".3g", len(found) > 1, unit)


def _missing(goal: dict[str, Any], document: dict[str, Any]) -> str:
    """Return the reasons why a goal was not measured, as far as they are known."""
    reasons = []
    for term in goal["missing"].split(", "):
        name = term.partition(" of ")[2]
        if name in document["left out"]:
            reasons.append(f"{document['left out'][name]} ({name})")
        else:
            reasons.append(f"{name} wasn't run" if name in document.get("not run", ()) else term)
    return ", ".join(dict.fromkeys(reasons))


def _goal(goal: dict[str, Any], document: dict[str, Any]) -> tuple[str, str, str]:
    """Return the bound of a goal, the measured value, and whether the goal was reached."""
    unit = goal["unit"]
    bound = f"≥ {goal['at_least']:g} {unit}" if "at_least" in goal else f"≤ {goal['at_most']:g} {unit}"
    if goal["median"] is None:
        return bound, f"not measured: {_missing(goal, document)}", "–"
    digits = 4 if bound.startswith("≤ 1.00") else 3 if goal["unit"] == "s" or bound.startswith("≤ 1.0") else 2
    came = _spread(goal, f".{digits}f", document["rounds"] > 1)
    return bound, came, "reached" if goal["reached"] else "**missed**"


def _outcome(goal: dict[str, Any], document: dict[str, Any]) -> str:
    bound, came, verdict = _goal(goal, document)
    if goal["median"] is None:
        return f"- {goal['what']}: goal {bound}, {came}"
    return f"- {goal['what']}: goal {bound}, came {came}: {verdict}"
