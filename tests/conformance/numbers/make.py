"""Computes what the original classes give for calls with padding, in pieces and after a rollback.

    python tests/conformance/numbers/make.py [NAME …]

It writes ``NAME/model.splitbundle`` and ``NAME/calls.json``: a small random model, and what a reader must give for it.
Nothing of the runtime computes here: the classes of transformers do, row by row and without padding (SB-B-006).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

import torch
from torch import Tensor

import splitbundle_converter
from conformance.case import Draft, dump
from conformance.numbers.models import MODELS, Model
from splitbundle_converter.families.table import FAMILIES
from tests.support.models import BY_PIECES, CONFIGURATIONS, load_original, make_model

VOCABULARY, LAYERS = 31, 2
LENGTH = 24
"""The length of the longest row: past the thresholds of all scalings, windows and chunks of these models."""
Row = list[int]


def main() -> None:
    """Write the models that are named, or all."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        write(name, MODELS[name])
        size = sum(path.stat().st_size for path in (HERE / name).rglob("*") if path.is_file())
        print(f"{name}: {size} bytes")


def write(name: str, model: Model) -> None:
    """Make a model's checkpoint, convert it, and compute its calls."""
    place = HERE / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, name)
        made = make_model(model.configuration, **changes(model))
        made.to(torch.bfloat16).save_pretrained(source)
        splitbundle_converter.convert(source, place / "model.splitbundle", split=[1], check=False)
        original = load_original(source)
    if model.position:
        reposition(place / "model.splitbundle", model.position)
    layers = FAMILIES[CONFIGURATIONS[model.configuration][0]].modules
    by_pieces = model.configuration in BY_PIECES
    cases = [padded(original, layers, by_pieces), in_pieces(original, layers, by_pieces)]
    if not by_pieces:  # a rollback there is refused, or has no meaning in the original (SB-C-031)
        cases.append(rolled_back(original, layers))
    cases += model.more
    document = {"about": model.about, "rules": list(model.rules), "cases": cases}
    (place / "calls.json").write_text(json.dumps(document, separators=(",", ":")) + "\n", "ascii")


def reposition(place: Path, members: Mapping[str, float]) -> None:
    """Replace members of each layer's ``attention.position`` in a bundle."""
    draft = Draft(place)
    architecture = json.loads(draft.files["architecture.json"])
    for kind in architecture["layer_kinds"].values():
        kind["attention"]["position"].update(members)
    draft.files["architecture.json"] = dump(architecture)
    draft.seal().write(place)


def changes(model: Model) -> dict[str, Any]:
    """Return the fields that make a model of the tests smaller: two layers, and few tokens."""
    _, fields = CONFIGURATIONS[model.configuration]
    shorter: dict[str, Any] = {"vocab_size": VOCABULARY}
    for field, value in fields.items():
        if field in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            shorter[field] = LAYERS
        elif isinstance(value, list) and len(value) == 2 * LAYERS:
            shorter[field] = value[:LAYERS]
    return shorter | model.changes


def tokens(*lengths: int, seed: int) -> list[Row]:
    """Return random rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def padded(original: Any, layers: str, by_pieces: bool) -> dict[str, Any]:
    """Three rows of different lengths, and a second call in which one of them brings nothing."""
    first, second = tokens(11, 3, 6, seed=1), tokens(2, 0, 4, seed=2)
    results = [results_of(original, layers, (a, b), by_pieces) for a, b in zip(first, second, strict=True)]
    return {
        "about": "rows of different lengths, and then one that rests",
        "cuts": [1],
        "calls": [
            call([0, 0, 0], first, [row[0] for row in results], [1]),
            call([11, 3, 6], second, [row[1] for row in results], [1]),
        ],
    }


def in_pieces(original: Any, layers: str, by_pieces: bool) -> dict[str, Any]:
    """One row in three pieces."""
    pieces = tokens(7, 1, LENGTH - 8, seed=3)
    results = results_of(original, layers, pieces, by_pieces)
    starts = [0, 7, 8]
    calls = [call([start], [piece], [result], []) for start, piece, result in zip(starts, pieces, results, strict=True)]
    return {"about": "one row in three pieces", "cuts": [], "calls": calls}


def rolled_back(original: Any, layers: str) -> dict[str, Any]:
    """One row whose last tokens are exchanged."""
    (row, other) = tokens(10, 5, seed=4)
    (whole,) = results_of(original, layers, (row,), False)
    again = results_of(original, layers, (row[:6], other), False)[1]
    return {
        "about": "a rollback to six positions, and other tokens",
        "cuts": [1],
        "calls": [call([0], [row], [whole], [1]), call([6], [other], [again], [1])],
    }


Result = tuple[list[Tensor], Tensor]
"""The hidden states before the first layer and after each, each (sequence, hidden), and logits, (sequence, vocab)."""


def results_of(original: Any, layers: str, pieces: Sequence[Row], by_pieces: bool) -> list[Result]:
    """Return the original's results for the pieces of one row.

    If pieces matter, the original gets them with its own cache. Otherwise it gets the row as a whole: no token sees
    those after it.
    """
    if by_pieces:
        past, given = None, []
        for piece in pieces:
            if piece:
                result, past = run(original, layers, piece, past, cached=True)
            given.append(result if piece else nothing(original))
        return given
    hidden, logits = run(original, layers, [token for piece in pieces for token in piece], None, cached=False)[0]
    lengths = [len(piece) for piece in pieces]
    parts = [state.split(lengths) for state in hidden]
    return [([part[i] for part in parts], each) for i, each in enumerate(logits.split(lengths))]


def nothing(original: Any) -> Result:
    """Return the results for no tokens."""
    width = original.get_input_embeddings().weight.shape[1]
    return [torch.zeros(0, width)] * (LAYERS + 1), torch.zeros(0, VOCABULARY)


def run(original: Any, layers: str, row: Row, past: Any, *, cached: bool) -> tuple[Result, Any]:
    """Run the original class on one row, and take its hidden states at every layer."""
    modules = original.get_submodule(layers)
    hidden: list[Tensor] = []

    def before_first(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
        hidden.append((output[0] if isinstance(output, tuple | list) else output)[0].clone())

    hooks = [modules[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        with torch.no_grad():
            out = original(input_ids=torch.tensor([row]), past_key_values=past, use_cache=cached, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    return (hidden, out.logits[0]), getattr(out, "past_key_values", None)


def call(past: list[int], rows: list[Row], results: list[Result], cuts: list[int]) -> dict[str, Any]:
    """Return a call, and what must come: at each cut and in the logits, row by row, the tokens' numbers."""
    expect = {
        "hidden": [[numbers(hidden[cut]) for hidden, _ in results] for cut in cuts],
        "logits": [numbers(logits) for _, logits in results],
    }
    return {"past": past, "rows": rows, "expect": expect}


def numbers(tensor: Tensor) -> list[list[float]]:
    """Return numbers with the nine digits that tell every float32 from its neighbors."""
    return [[float(f"{number:.9g}") for number in line] for line in tensor.tolist()]


if __name__ == "__main__":
    main()
