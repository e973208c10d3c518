"""What was measured, for people: a JSON file for each case, a page for each set, and one page of goals over all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, plot
from benchmarks.goals import spread, times_as_fast
from benchmarks.sets import LIMIT

_ABOUT: Final = {
    "import": "Seconds from the start of a process to its end.",
    "size": "Bytes of the weight files beside those of the parameters' tensors.",
    "verify": "Seconds for hashing all files of a bundle, in memory already.",
    "convert": "Seconds from the start of a process to its end; nothing is compared with the original.",
    "cold": "Seconds from the start of a process to its first token, and of them for importing the libraries.",
    "load": "Seconds until it can compute, without imports and with; to the first token; private memory (RssAnon).",
    "prefill": "Milliseconds a token of a prompt, with the last position's logits alone.",
    "decode": "Milliseconds a token after the prompt.",
    "long": "Milliseconds a token after prompts of three lengths, and of the prompt in the middle.",
    "batch": "Milliseconds a token and row, for one row and for eight.",
    "shards": "Milliseconds a token, for one shard and for three that are chained.",
    "memory": "The most private memory (RssAnon) while generating, beyond the imports'.",
}


def write(document: dict[str, Any], results: Path) -> None:
    """Writes one case's JSON."""
    results.mkdir(parents=True, exist_ok=True)
    name = "-".join(part for part in (document["set"], document["model"], document["dtype"]) if part)
    (results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def write_pages(results: Path) -> None:
    """Writes the pages anew, and a plot for each set, of all JSON that is there."""
    if not results.is_dir():
        return
    documents = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))]
    by_set: dict[str, list[dict[str, Any]]] = {name: [] for name in _ABOUT}
    for document in documents:
        by_set[document["set"]].append(document)
    index = ["# Benchmarks", "", "Written by `python -m benchmarks`; what is compared, and how, is told there.", ""]
    index += ["| set | model | goal | bound | came | |", "|---|---|---|---|---|---|"]
    pages = []
    for name, own in by_set.items():
        if not own:
            continue
        picture = plot.draw(own, results / f"{name}.svg")
        shown = f"\n![Ratios of the set {name}]({name}.svg)\n" if picture else ""
        (results / f"{name}.md").write_text(f"# {name}\n\n{_ABOUT[name]}\n{shown}\n{markdown(own)}", "utf-8")
        pages.append(f"[{name}]({name}.md)")
        for document in own:
            for goal in document["goals"]:
                model = f"{document['model']} {document['dtype']}".strip()
                index.append(f"| [{name}]({name}.md) | {model} | {goal['what']} | {' | '.join(_goal(goal))} |")
    (results / "README.md").write_text("\n".join([*index, "", f"Figures: {', '.join(pages)}.", ""]), "utf-8")


def markdown(documents: list[dict[str, Any]]) -> str:
    """Tables of some cases, each with what was reached, and of what machine it is."""
    return "\n".join(line for document in documents for line in _case(document))


def _case(document: dict[str, Any]) -> list[str]:
    runs, reference = document["runs"], document["reference"]
    threads, rounds = document["threads"], document["rounds"]
    title = " ".join(part for part in (document["set"], document["model"], document["dtype"]) if part)
    lines = [f"## {title}: {threads} threads, medians of {rounds} round{'s' if rounds > 1 else ''}", ""]
    for figure in document["figures"]:
        lines += _figure(figure, runs, reference)
    lines += [_outcome(goal) for goal in document["goals"]]
    lines += [""] if document["goals"] else []
    if rates := [run["the machine"] for run in runs if "the machine" in run]:
        each = (f"{name} {_rate(name, spread([rate[name] for rate in rates]))}" for name in rates[0])
        lines += [f"The machine, in the same run: {'; '.join(each)}.", ""]
        shares = [times_as_fast(runs, figure, name, LIMIT) for figure in document["figures"] for name in runs[0]]
        if any(share["median"] > 1.03 for share in shares if share):
            lines += ["More than the limit came, so others used the machine while it was measured: run this again.", ""]
    if differences := document["differences"]:
        greatest = max(differences, key=lambda name: differences[name])
        told = f"{differences[greatest]:.1g} of the largest logit ({greatest})"
        lines += [f"Logits differ from transformers' by {told} at most.", ""]
    lines += [f"Left out: {name}: {why}." for name, why in document["left out"].items()]
    lines += [""] if document["left out"] else []
    return [*lines, f"{machine.text(document['machine'])}.", ""]


def _figure(figure: str, runs: list[dict[str, Any]], reference: str) -> list[str]:
    names = [name for name, own in runs[0].items() if figure in own]
    values = {name: spread([run[name][figure] for run in runs]) for name in names}
    limited, compared = LIMIT in values, reference in values
    unit, factor = unit_of(figure)
    heads = [f"{figure}, {unit}", "median", "least to greatest"]
    heads += [f"{reference} ÷ this (spread)"] if compared else []
    heads += ["of the limit"] if limited else []
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, value in values.items():
        low, middle, high = (f"{_short(value[key] * factor)}" for key in ("least", "median", "greatest"))
        cells = [name, middle, f"{low} to {high}"]
        if compared and (ratio := times_as_fast(runs, figure, name, reference)):
            cells.append(f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f})")
        if limited and (share := times_as_fast(runs, figure, name, LIMIT)):
            cells.append(f"{share['median']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def unit_of(figure: str) -> tuple[str, float]:
    """In which unit a figure is shown, and by what its value is multiplied for that."""
    if figure.startswith(("prefill", "decode")):
        return "ms a token", 1e3
    if figure.startswith("private"):
        return "MiB", 2**-20
    return ("bytes", 1) if figure == "bytes" else ("s", 1)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _rate(name: str, found: dict[str, float]) -> str:
    unit = "GFLOP/s" if name.startswith("multiply") else "GB/s"
    low, middle, high = (f"{found[key] / 1e9:.3g}" for key in ("least", "median", "greatest"))
    return f"{middle} {unit} ({low} to {high})"


def _goal(goal: dict[str, Any]) -> tuple[str, str, str]:
    """A goal's bound, what came, and whether that is enough."""
    unit = goal["unit"]
    bound = f"≥ {goal['at_least']:g} {unit}" if "at_least" in goal else f"≤ {goal['at_most']:g} {unit}"
    if goal["median"] is None:
        return bound, f"not measured: {goal['missing']}", "–"
    digits = 4 if bound.startswith("≤ 1.00") else 3 if goal["unit"] == "s" or bound.startswith("≤ 1.0") else 2
    middle, low, high = (f"{goal[key]:.{digits}f}" for key in ("median", "least", "greatest"))
    return bound, f"{middle} ({low} to {high})", "reached" if goal["reached"] else "**missed**"


def _outcome(goal: dict[str, Any]) -> str:
    bound, came, verdict = _goal(goal)
    return f"- {goal['what']}: goal {bound}, came {came}: {verdict}"
