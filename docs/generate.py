"""Generate the parts of the reference that the code and the specification already say.

``conf.py`` calls ``write`` before each build. The pages of ``docs/reference`` include the files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from itertools import groupby
from pathlib import Path
from typing import Final

from splitbundle.cli.commands import COMMANDS

# The one place where the documentation names modules of the packages.
from splitbundle.cli.main import build_parsers
from splitbundle_converter.families import summary
from splitbundle_converter.families.composites import COMPOSITES

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import machine  # noqa: E402  # they lie beside docs/, and are in no package
from benchmarks.goals import times_as_fast  # noqa: E402

COMMON: Final = ("--help", "--json", "--quiet", "--debug")
"""Options of every command: the page names them once."""
GROUPS: Final = {
    "json": "Strict JSON",
    "field": "Fields",
    "format": "The format's version",
    "manifest": "The manifest",
    "architecture": "The architecture",
    "graph": "Graphs",
    "genai": "The configuration of onnxruntime-genai",
    "file": "Files",
    "sums": "SHA256SUMS",
    "weights": "Weight files",
    "vectors": "Golden vectors",
    "stage": "Stages",
    "backend": "Backends",
    "pipeline": "Pipelines",
    "input": "Inputs of a call",
    "session": "Sessions",
    "wire": "Frames and payloads of stages on other machines",
    "peer": "Servers of stages",
    "server": "What a server of a stage answers",
    "cluster": "Clusters of Ray",
    "train": "Training over a network",
    "checkpoint": "Training checkpoints",
    "adapter": "Adapters",
    "signature": "Signatures",
    "keys": "Certificates and keys",
    "archive": "Archives",
    "text": "Text",
    "source": "Checkpoints",
    "output": "Outputs",
    "network": "Other machines",
    "remote": "What other machines have",
    "usage": "Arguments",
    "": "Other codes",
}
"""The part of a code before its dot -> a heading."""


def write(directory: Path) -> None:
    """Write every generated page into a directory, and leave a page alone that is up to date."""
    directory.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        path, text = directory / name, page()
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def commands() -> str:
    """Return the commands of the command line with their options."""
    found = {entry.name: entry.load() for entry in entry_points(group="splitbundle.commands")}
    _, parsers = build_parsers([*(found[name] for name in sorted(found)), *COMMANDS])
    parts = [_command(name, each) for name, each in parsers.items()]
    common = next(iter(parsers.values()))
    parts.append("\n".join(["## Options of every command", "", *_options(common, lambda option: option in COMMON)]))
    return "\n\n".join(parts) + "\n"


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    said = parser.description or ""
    head = [f"## splitbundle {name}", "", f"{said[:1].upper()}{said[1:]}.", "", "```text", *_wrapped(usage), "```", ""]
    return "\n".join([*head, *_options(parser, lambda option: option not in COMMON)])


def _wrapped(usage: str) -> Iterator[str]:
    """Break a usage line between its options."""
    line = ""
    for part in re.findall(r"\[[^\]]*\]|\S+", usage):
        if line and len(line) + len(part) > 90:
            yield line
            line = "   "
        line += f" {part}" if line else part
    yield line


def _options(parser: argparse.ArgumentParser, wanted: Callable[[str], bool]) -> Iterator[str]:
    rows = list(_rows(parser, wanted))
    yield from ("| argument | meaning |", "|---|---|", *rows) if rows else ("It has no arguments of its own.",)


def _rows(parser: argparse.ArgumentParser, wanted: Callable[[str], bool]) -> Iterator[str]:
    for action in parser._actions:
        name = max(action.option_strings, key=len, default=str(action.metavar or action.dest))
        if not wanted(name):
            continue
        value = ""
        if action.option_strings and action.nargs != 0:
            value = " " + str(
                action.metavar or (action.choices and "|".join(map(str, action.choices))) or action.dest.upper()
            )
        spellings = ", ".join(f"`{option}{value}`" for option in action.option_strings) or f"`{name}`"
        said = parser._get_formatter()._expand_help(action) if action.help else ""
        yield "| {} | {} |".format(*(cell.replace("|", r"\|") for cell in (spellings, said)))


def error_codes() -> str:
    """Return the tables of the specification's section "Errors" as one table for each kind of code."""
    text = (ROOT / "spec" / "v1" / "bundle.md").read_text("utf-8")
    tables = text.split("\n| code | step | meaning |\n|---|---|---|\n")[1:]
    found = [row for table in tables for row in table.partition("\n\n")[0].splitlines()]
    rows = sorted(found, key=lambda row: list(GROUPS).index(_group(row)))
    parts = []
    for group, members in groupby(rows, _group):
        heading = f"## {GROUPS[group]}" + (f" (`{group}.*`)" if group else "")
        parts.append("\n".join([heading, "", "| code | step | meaning |", "|---|---|---|", *members]))
    return "\n\n".join(parts) + "\n"


def _group(row: str) -> str:
    found = re.match(r"\| `(?:([a-z]+)\.)?[a-z-]+` \|", row)
    if found is None:
        raise ValueError(f"spec/v1/bundle.md: no error code in {row!r}")
    return found[1] or ""


def families() -> str:
    """Return the table of families, each from the facts of its default configuration."""
    return summary.markdown() + "\n"


def language_parts() -> str:
    """Return the model types of which ``--part language`` converts the language model."""
    rows = [f"| {model_type} | {composite.text_type} |" for model_type, composite in COMPOSITES.items()]
    return (
        "\n".join(["| model_type | language model, unless the configuration names another |", "|---|---|", *rows])
        + "\n"
    )


_FIGURES: Final = {
    "first token": "process start to first token",
    "prefill 256": "prompt of 256",
    "prefill 1024": "prompt of 1,024",
    "decode 256": "a token after 256",
}
"""What a picture calls a figure -> what the page of speeds calls it."""
_BESIDE: Final = {
    "transformers": "transformers",
    "llama.cpp": "llama.cpp",
    "the machine's limit": "the machine's limit",
}


def speed() -> str:
    """Return a table for each processor of the stored results, with the ratios of both backends."""
    tables: dict[str, list[str]] = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        if document["set"] not in ("cold", "prefill", "decode"):
            continue
        place = f"{machine.processor(document['machine'])}, {document['threads']} threads"
        for figure in [each for each in document["figures"] if each in _FIGURES]:
            for backend in ("torch", "onnxruntime"):
                row = [times_as_fast(document["runs"], figure, f"splitbundle {backend}", other) for other in _BESIDE]
                cells = ["" if each is None else f"{each['median']:.2f}" for each in row]
                if any(cells):
                    model = f"{document['model']} {document['dtype']}"
                    names = [_FIGURES[figure], model, backend, *cells]
                    tables.setdefault(place, []).append(f"| {' | '.join(names)} |")
    heads = " | ".join(["", "model", "backend", *_BESIDE])
    head = [f"|{heads} |", f"|{'---|' * (3 + len(_BESIDE))}"]
    return "\n".join("\n".join([f"### {place}", "", *head, *rows, ""]) for place, rows in tables.items())


PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "commands.md": commands,
    "error-codes.md": error_codes,
    "families.md": families,
    "language-parts.md": language_parts,
    "speed.md": speed,
}
