"""Graphs with one fault each, from the files in ``graphs/``, and what onnxruntime-genai is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import HERE, Case, Draft, dump

GENAI = "genai_config.json"
Piece = list[int] | str | list[str | int]
Edit = Callable[[dict[str, Any]], object]


def rebuilt(good: bytes, pieces: list[Piece]) -> bytes:
    """Return the bytes of a graph that is made of pieces.

    A piece is a range of the bytes so far (those of the good graph, and then those of the pieces before), new bytes in
    hexadecimal, or bytes and how often they are repeated.
    """
    whole = bytearray(good)
    for piece in pieces:
        if isinstance(piece, str):
            whole += bytes.fromhex(piece)
        elif isinstance(piece[0], str):
            whole += bytes.fromhex(piece[0]) * int(piece[1])
        else:
            whole += whole[int(piece[0]) : int(piece[1])]
    return bytes(whole[len(good) :])


def graph_cases() -> Iterator[Case]:
    """Yield the good bundles and a case for each file."""
    for base in ("graphs", "quantized"):
        yield Case(
            name=f"graph/good-{base}",
            about="good graphs, listed anew: what the other cases start from",
            rules=("SB-O-007", "SB-O-008", "SB-O-015"),
            steps=("stage", "verify"),
            make=_writer(base, None),
        )
    for path in sorted((HERE / "graphs").glob("*.json")):
        vector = json.loads(path.read_text("ascii"))
        yield Case(
            name=f"graph/{path.stem}",
            about=vector["about"],
            rules=tuple(vector["rules"]),
            steps=("verify",),
            make=_writer(vector["base"], vector),
            code=vector["expect"]["code"],
            file=vector["file"],
        )


def _writer(base: str, vector: dict[str, Any] | None) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        draft = Draft(HERE / "bundles" / f"{base}.splitbundle")
        if vector is not None:
            data = rebuilt(draft.files[vector["file"]], vector["pieces"])
            if hashlib.sha256(data).hexdigest() != vector["sha256"]:
                raise ValueError(f"{vector['about']}: the pieces don't make the graph")
            draft.files[vector["file"]] = data
        draft.seal().write(root)

    return make


def genai_cases() -> Iterator[Case]:
    """Cases of rule SB-O-018: verification compares what onnxruntime-genai is told."""

    def put(pointer: str, value: object) -> Edit:
        def edit(document: dict[str, Any]) -> None:
            *way, last = pointer.split("/")[1:]
            for token in way:
                document = document[int(token)] if isinstance(document, list) else document[token]
            document[last] = value

        return edit

    def drop(pointer: str) -> Edit:
        def edit(document: dict[str, Any]) -> None:
            *way, last = pointer.split("/")[1:]
            for token in way:
                document = document[token]
            del document[last]

        return edit

    rows: list[tuple[str, str, Edit, str | None]] = [
        ("whole", "what the bundle says of itself", lambda d: None, None),
        ("search-other", "other numbers for the search", put("/search", {"max_length": 9, "do_sample": True}), None),
        ("search-text", "a text for the search", put("/search/more", "x"), "/search/more"),
        ("search-proto", "a text as __proto__", put("/search/__proto__", "x"), "/search/__proto__"),
        ("search-array", "an array for the search", put("/search", []), "/search"),
        ("more", "a member more", put("/engine", {}), "/engine"),
        ("more-in-model", "a library", put("/model/decoder/session_options/ep.lib", "x"), _OPTIONS + "/ep.lib"),
        ("without-type", "no type", drop("/model/type"), "/model"),
        ("without-search", "no search", drop("/search"), ""),
        ("without-inputs", "no inputs", drop("/model/decoder/inputs"), "/model/decoder"),
        ("vocabulary", "another vocabulary", put("/model/vocab_size", 25), "/model/vocab_size"),
        ("vocabulary-float", "24.0", put("/model/vocab_size", 24.0), "/model/vocab_size"),
        ("stop-id", "a single id", put("/model/eos_token_id", 2), "/model/eos_token_id"),
        ("tokenizer", "another directory", put("/model/tokenizer_dir", ".."), "/model/tokenizer_dir"),
        ("tokenizer-slash", "a slash at the end", put("/model/tokenizer_dir", "tokenizer/"), "/model/tokenizer_dir"),
        ("filename", "another graph", put(_STAGE + "/bottom/filename", "../x.onnx"), _STAGE + "/bottom/filename"),
        ("stage-more", "two stages in one", put(_STAGE + "/top", {}), _STAGE + "/top"),
        ("threads", "spinning threads", put(f"{_OPTIONS}/{_SPIN}", "1"), f"{_OPTIONS}/{_SPIN}"),
    ]
    for name, about, edit, pointer in rows:

        def make(root: Path, edit: Edit = edit) -> None:
            draft = Draft(HERE / "bundles" / "genai.splitbundle")
            document = json.loads(draft.files[GENAI])
            edit(document)
            draft.files[GENAI] = dump(document)
            draft.seal().write(root)

        yield _genai(name, about, make, pointer)

    def without_stop(root: Path) -> None:
        draft = Draft(HERE / "bundles" / "genai.splitbundle")
        draft.manifest["text"]["stop_ids"] = []
        draft.seal().write(root)

    def without(path: str) -> Callable[[Path], None]:
        def make(root: Path) -> None:
            draft = Draft(HERE / "bundles" / "genai.splitbundle")
            del draft.files[path], draft.manifest["files"][path]
            draft.seal().write(root)

        return make

    yield _genai("without-stop-id", "a bundle without an id that ends a text", without_stop, "")
    for path in ("genai.logits.onnx", GENAI):
        yield _genai(f"without-{Path(path).stem.replace('.', '-')}", f"{path} isn't listed", without(path), "")


_OPTIONS = "/model/decoder/session_options"
_SPIN = "session.intra_op.allow_spinning"
_STAGE = "/model/decoder/pipeline/1"


def _genai(name: str, about: str, make: Callable[[Path], None], pointer: str | None) -> Case:
    refused = pointer is not None
    return Case(
        name=f"genai/{name}",
        about=about,
        rules=("SB-O-018", "SB-E-003") if refused else ("SB-O-018",),
        steps=("verify",),
        make=make,
        code="genai.config" if refused else None,
        file=GENAI if refused else None,
        pointer=pointer,
        points=refused,
    )
