"""Compare a bundle's files for onnxruntime-genai with the manifest and the architecture of the bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.fields import escape
from splitbundle.format.genai import GENAI, configuration, graphs
from splitbundle.storage import files
from splitbundle.verification import onnx_rules

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader


def check(bundle: BundleReader) -> None:
    """Check the three files for onnxruntime-genai, if the manifest lists any of them.

    Raises:
        BundleError: ``genai.config``, ``graph.*``, ``file.*``, ``json.*``.
    """
    listed = bundle.manifest.files
    if not any(path in listed for path in GENAI):
        return
    absent = next((path for path in GENAI if path not in listed), None)
    if absent is not None or any(shard.graph is None for shard in bundle.shards):
        got = f"no {absent}" if absent is not None else "a shard without a graph"
        raise _problem("", f"{', '.join(GENAI)} together, and a graph a shard", got)
    if not bundle.manifest.text.stop_ids:
        raise _problem("", "a bundle with an id that ends a text", "none")
    limit = strict_json.MAX_BYTES
    found = strict_json.parse(files.read_listed(bundle.path, GENAI[0], listed[GENAI[0]], limit), GENAI[0])
    _compare(found, configuration(bundle.manifest, bundle.architecture), "")
    for graph in graphs(bundle.architecture):
        limit = onnx_rules.MAX_GRAPH
        onnx_rules.check(files.read_listed(bundle.path, graph.file, listed[graph.file], limit), graph, {})


def _compare(found: Any, expected: Any, pointer: str) -> None:
    """Raise unless a value equals the expected one. Under ``/search``, allow any numbers and booleans."""
    if pointer == "/search" and isinstance(found, dict):
        bad = next((name for name, value in found.items() if not isinstance(value, int | float)), None)
        if bad is not None:
            raise _problem(f"{pointer}/{escape(bad)}", "a number, true or false", type(found[bad]).__name__)
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in expected:
            if name not in found:
                raise _problem(pointer, f"a member {quoted(name)}", "an object without it")
        for name in found:
            if name not in expected:
                raise _problem(f"{pointer}/{escape(name)}", "no such member", "one")
        for name, value in expected.items():
            _compare(found[name], value, f"{pointer}/{escape(name)}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            _compare(one, other, f"{pointer}/{i}")
    elif type(found) is not type(expected) or found != expected:
        raise _problem(pointer, quoted(expected), quoted(found))


def _problem(pointer: str, expected: str, got: str) -> BundleError:
    hint = "splitbundle_converter.add_onnx with genai=True writes it again"
    return BundleError(
        Problem(code="genai.config", file=GENAI[0], pointer=pointer, expected=expected, got=got, hint=hint)
    )
