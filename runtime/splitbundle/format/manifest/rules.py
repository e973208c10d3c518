"""The rules between fields of the manifest and the architecture, which a schema can't express."""

from __future__ import annotations

import re
from math import prod
from typing import Final

from splitbundle.errors import quoted
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE_FILE
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.experts import EXTENSION as EXPERTS
from splitbundle.format.architecture.sizes import count
from splitbundle.format.dtypes import ITEM_SIZES
from splitbundle.format.encodings import COLUMNS, ROWS, is_matrix
from splitbundle.format.fields import Problems, escape
from splitbundle.format.graph import OPSET, VARIANTS, Graph, ports
from splitbundle.format.manifest.document import EMBEDDING, FILE, SOURCE, Manifest, Shard, expand, fingerprint
from splitbundle.format.manifest.row_names import ROW, named_twice
from splitbundle.format.text_document import FILE as TEXT
from splitbundle.format.text_document import MAX_BYTES as MAX_TEXT

MAX_BESIDE_DATA: Final = 2**25
"""The largest number of bytes of a weight file besides its data. Its reader limits the header to half of them."""
MAX_OTHER_FILE: Final = 2**28
MAX_CONFIGURATION: Final = 2**24
"""The largest size of a configuration file of the source, in bytes."""
_ROW_NAME = re.compile(r"([^{}]+\.)?\{row\}(\.[^{}]+)?")


def _check_text_file(manifest: Manifest, problems: Problems) -> None:
    pointer = "/model/text_file"
    if TEXT not in manifest.files:
        problems.add("manifest.files", pointer, "a path of /files", quoted(TEXT))
    elif manifest.files[TEXT].size > MAX_TEXT:
        got = f"{manifest.files[TEXT].size}"
        problems.add("manifest.files", f"/files/{TEXT}/size", f"at most {MAX_TEXT} bytes", got)
    if manifest.text.tokenizer is None:
        problems.add("manifest.files", pointer, "no text.json, as the bundle has no tokenizer", quoted(TEXT))


def _check_vector_file(path: str, member: str, taken: set[str], manifest: Manifest, problems: Problems) -> None:
    if path not in manifest.files or path in taken or not path.endswith(".safetensors"):
        wanted = "a .safetensors file of /files that nothing else names"
        problems.add("manifest.files", f"/vectors/{member}", wanted, quoted(path))


def check_files(manifest: Manifest, problems: Problems) -> None:
    """Check that every named file is listed, and that no two paths clash on any file system."""
    if ARCHITECTURE_FILE not in manifest.files:
        problems.add("manifest.files", "/files", f"an entry {quoted(ARCHITECTURE_FILE)}", "none")
    folded: dict[str, str] = {}
    directories = {path[:i].lower() for path in manifest.files for i, letter in enumerate(path) if letter == "/"}
    for path in sorted(manifest.files):  # the order of an object's members has no meaning
        other = folded.setdefault(path.lower(), path)
        if other != path or path.lower() in directories:
            at = f"/files/{escape(path)}"
            problems.add("manifest.files", at, "paths that differ in more than case", quoted(path))
    listed: set[str] = set()
    for unit, paths in manifest.units.items():
        for i, path in enumerate(paths):
            pointer = f"/units/{escape(unit)}/files/{i}"
            if path not in manifest.files or not path.endswith(".safetensors") or "/" in path:
                problems.add("manifest.files", pointer, "a .safetensors file of /files, at the top", quoted(path))
            elif path in listed:
                problems.add("manifest.files", pointer, "a file that no other unit has", quoted(path))
            listed.add(path)
    if manifest.text.tokenizer is not None and manifest.text.tokenizer not in manifest.files:
        problems.add("manifest.files", "/text/tokenizer", "a path of /files", quoted(manifest.text.tokenizer))
    configuration = manifest.model.source_configuration
    for name, path in {} if configuration is None else configuration.paths().items():
        pointer = f"/model/source_configuration/{name}"
        if path not in manifest.files or not path.startswith(SOURCE):
            problems.add("manifest.files", pointer, f"a path of /files in {SOURCE}", quoted(path))
        elif manifest.files[path].size > MAX_CONFIGURATION:
            got = f"{manifest.files[path].size}"
            problems.add("manifest.files", f"/files/{escape(path)}/size", f"at most {MAX_CONFIGURATION} bytes", got)
    if manifest.model.text_file is not None:
        _check_text_file(manifest, problems)
    vectors = manifest.vectors
    if vectors is not None:
        _check_vector_file(vectors.file, "file", listed, manifest, problems)
        if vectors.original is not None:
            _check_vector_file(vectors.original, "original", {*listed, vectors.file}, manifest, problems)
            if not (vectors.of_itself and manifest.storage.encodings):
                wanted = "no such field, unless weights are quantized and the vectors' origin is self"
                problems.add("manifest.vectors", "/vectors/original", wanted, quoted(vectors.original))
    graphs: set[str] = set()
    for i, shard in enumerate(manifest.shards):
        if shard.graph is not None:
            path, pointer = shard.graph.file, f"/shards/{i}/graph/file"
            if path not in manifest.files or not path.endswith(".onnx") or "/" in path:
                problems.add("manifest.files", pointer, "an .onnx file of /files, at the top", quoted(path))
            elif path in graphs:
                problems.add("manifest.files", pointer, "a file that no other shard has", quoted(path))
            graphs.add(path)


def check_shards(manifest: Manifest, boundaries: list[tuple[int, int]], problems: Problems) -> None:
    """Check that the shards tile the model in order, and that there is a boundary between adjacent shards."""
    seen: set[str] = set()
    start = 0
    for i, shard in enumerate(manifest.shards):
        at = f"/shards/{i}"
        if shard.name in seen:
            problems.add("manifest.shards", f"{at}/name", "a name that no other shard has", quoted(shard.name))
        seen.add(shard.name)
        first, last = i == 0, i == len(manifest.shards) - 1
        if shard.layers[0] != start:
            problems.add(
                "manifest.layers",
                f"{at}/layers/0",
                f"{start}, where the shard before ends",
                str(shard.layers[0]),
            )
        # Only the first and the last shard may have no layers: they may be the embedding or the head alone.
        if shard.layers[1] < shard.layers[0] + (0 if first or last else 1):
            problems.add("manifest.layers", f"{at}/layers/1", f"more than {shard.layers[0]}", str(shard.layers[1]))
        start = shard.layers[1]
        for name, value, expected in (("embeds", shard.embeds, first), ("head", shard.head, last)):
            if value is not expected:
                which = "first" if name == "embeds" else "last"
                problems.add("manifest.shards", f"{at}/{name}", f"true only for the {which} shard", quoted(value))
    cuts = list(manifest.cuts)
    if [cut for cut, _ in boundaries] != cuts:
        problems.add("manifest.boundaries", "/boundaries", f"one at each cut, {cuts}", f"{[b for b, _ in boundaries]}")
    for i, (_, width) in enumerate(boundaries[1:], 1):
        if width != boundaries[0][1]:
            pointer = f"/boundaries/{i}/tensors/hidden/shape/2"
            problems.add("manifest.boundaries", pointer, str(boundaries[0][1]), str(width))


def check_against(manifest: Manifest, architecture: Architecture) -> None:
    """Check the rules that need both documents.

    Raises:
        BundleError: every rule of ``manifest.json`` that the architecture breaks.
    """
    problems = Problems(FILE)
    units = architecture.unit_tensors()
    shapes = architecture.tensors()
    total = len(architecture.layers)
    for name in architecture.extensions:
        if name not in manifest.features:
            problems.add("manifest.requires", "/requires", f"{quoted(name)}, which the architecture has", "none")
    missing = [unit for unit in units if unit not in manifest.units]
    extra = [unit for unit in manifest.units if unit not in units]
    if missing or extra:
        got = f"missing {quoted(missing)}, extra {quoted(extra)}"
        problems.add("manifest.units", "/units", f"the {len(units)} units of the architecture", got)
    if manifest.shards[-1].layers[1] != total:
        at = f"/shards/{len(manifest.shards) - 1}/layers/1"
        problems.add("manifest.layers", at, f"{total}, the number of layers", str(manifest.shards[-1].layers[1]))
    if manifest.hidden_size not in (None, architecture.hidden_size):
        at = "/boundaries/0/tensors/hidden/shape/2"
        expected = f"hidden_size of the architecture, {architecture.hidden_size}"
        problems.add("manifest.boundaries", at, expected, str(manifest.hidden_size))
    for name in manifest.storage.exceptions:
        if name not in shapes:
            at = f"/storage/exceptions/{escape(name)}"
            problems.add("manifest.storage", at, "names of logical tensors", quoted(name))
    _check_encodings(manifest, shapes, problems)
    for i, stop in enumerate(manifest.text.stop_ids):
        if stop >= architecture.vocab_size:
            at, below = f"/text/stop_ids/{i}", f"an id below vocab_size ({architecture.vocab_size})"
            problems.add("manifest.text", at, below, str(stop))
    limit = architecture.position_limit
    for i, length in enumerate(() if manifest.vectors is None else manifest.vectors.lengths):
        if limit is not None and length > limit:
            problems.add("manifest.vectors", f"/vectors/lengths/{i}", f"at most {limit}, the positions", str(length))
    if manifest.model.parameters != count(shapes):
        problems.add("manifest.model", "/model/parameters", str(count(shapes)), str(manifest.model.parameters))
    problems.raise_if_any()
    for i, shard in enumerate(manifest.shards):
        _check_shard_totals(manifest, architecture, units, shard, f"/shards/{i}", problems)
    _check_sizes(manifest, architecture, units, problems)
    _check_source_names(manifest, shapes, total, problems)
    known = fingerprint(manifest.files, manifest.weight_files())
    for key, expected in (
        ("architecture", f"sha256:{manifest.files[ARCHITECTURE_FILE].sha256}"),
        ("fingerprint", known),
    ):
        got = getattr(manifest.model, key)
        if got != expected:
            problems.add("manifest.ids", f"/model/{key}", f"{expected}, by the digests in /files", got)
    problems.raise_if_any()


def _check_encodings(manifest: Manifest, shapes: dict[str, tuple[int, ...]], problems: Problems) -> None:
    storage, pointer = manifest.storage, "/storage/encodings"
    for name in storage.encodings:
        encoding, at = storage.encoding_of(name), f"{pointer}/{escape(name)}"
        if name not in shapes or not is_matrix(name) or name in storage.exceptions:
            wanted = "names of weights of linear layers, of experts or of the token table that aren't exceptions"
            problems.add("manifest.storage", at, wanted, quoted(name))
        elif encoding is not None and not encoding.fits(shapes[name]):
            columns = f"a multiple of {encoding.block or COLUMNS} columns"
            wanted = columns if encoding.block is None else f"{columns}, and of {ROWS} rows"
            problems.add("manifest.storage", at, f"{encoding.name} for {wanted}", f"{list(shapes[name])}")
    for name in storage.extensions:
        if name not in manifest.features:
            problems.add("manifest.requires", "/requires", f"{quoted(name)}, which storage has", "none")


def _check_shard_totals(
    manifest: Manifest,
    architecture: Architecture,
    units: dict[str, dict[str, tuple[int, ...]]],
    shard: Shard,
    at: str,
    problems: Problems,
) -> None:
    if shard.graph is not None:
        _check_graph(shard.graph, manifest, architecture, shard, f"{at}/graph", problems)
    needed = architecture.units_of(shard.layers, embeds=shard.embeds, head=shard.head)
    if shard.units != needed:
        problems.add("manifest.shards", f"{at}/units", ", ".join(needed), ", ".join(map(quoted, shard.units)))
        return
    size = sum(manifest.files[path].size for unit in needed for path in manifest.units[unit])
    parameters = sum(count(units[unit]) for unit in needed)
    for key, expected in (("bytes", size), ("parameters", parameters)):
        if getattr(shard, key) != expected:
            problems.add("manifest.shards", f"{at}/{key}", str(expected), str(getattr(shard, key)))


def _check_sizes(
    manifest: Manifest, architecture: Architecture, units: dict[str, dict[str, tuple[int, ...]]], problems: Problems
) -> None:
    """Limit the size of each file by the architecture. A sparse file can be huge and still cost its author nothing."""
    groups = [
        (paths, sum(each.size for name, s in units[unit].items() for each in manifest.storage.stored(name, s).values()))
        for unit, paths in manifest.units.items()
    ]
    if manifest.vectors is not None:
        each = ITEM_SIZES["int64"] + ITEM_SIZES["float32"] * architecture.hidden_size * (len(architecture.layers) + 1)
        last = ITEM_SIZES["float32"] * architecture.vocab_size
        for path in manifest.vectors.files:
            groups.append(((path,), sum(each * n + last for n in manifest.vectors.lengths)))
    limits = dict.fromkeys(manifest.files, MAX_OTHER_FILE)
    for paths, data in groups:
        limit = data + MAX_BESIDE_DATA * len(paths)
        fits = sum(manifest.files[path].size for path in paths) <= limit
        limits |= {path: limit if fits else limit // len(paths) for path in paths}
    for path, limit in limits.items():
        if manifest.files[path].size > limit:
            got = str(manifest.files[path].size)
            problems.add("manifest.files", f"/files/{escape(path)}/size", f"at most {limit} bytes", got)


def _check_graph(
    graph: Graph, manifest: Manifest, architecture: Architecture, shard: Shard, at: str, problems: Problems
) -> None:
    if graph.opset != OPSET:
        problems.add("manifest.graphs", f"{at}/opset", str(OPSET), str(graph.opset))
    dtype, variants = VARIANTS[graph.variant], manifest.storage.graph_variants
    if graph.variant not in variants:
        expected_variant = f"{' or '.join(variants)}, which these weights allow"
        problems.add("manifest.graphs", f"{at}/variant", expected_variant, graph.variant)
    expected = ports(architecture, shard.layers, embeds=shard.embeds, head=shard.head, dtype=dtype)
    for which, wanted, found in zip(("inputs", "outputs"), expected, (graph.inputs, graph.outputs), strict=True):
        for i, port in enumerate(wanted):
            if i >= len(found):
                problems.add("manifest.graphs", f"{at}/{which}", f"also {port}", f"{len(found)} of them")
                break
            if found[i] != port:
                problems.add("manifest.graphs", f"{at}/{which}/{i}", str(port), f"{found[i]}")
                break
        if len(found) > len(wanted):
            problems.add("manifest.graphs", f"{at}/{which}", f"{len(wanted)} of them", str(len(found)))


def _check_source_names(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]], layers: int, problems: Problems
) -> None:
    """Check that the table of source names can be applied.

    It must have every logical tensor, and no source tensor twice.
    """
    sources: dict[str, int] = {}  # its name, or that of those of all matrix rows -> how many it stands for
    covered: set[str] = set()
    for i, entry in enumerate(manifest.source_names):
        at = f"/source_names/{i}"
        if any(("{layer}" in name) != ("{layer}" in entry.source) for name in entry.tensors):
            problems.add(
                "manifest.sources",
                f"{at}/tensors",
                "{layer} in all names of an entry or in none",
                quoted(entry.tensors),
            )
            continue
        for expanded in expand(entry, layers):
            if expanded.source in sources:
                problems.add(
                    "manifest.sources",
                    f"{at}/source",
                    "a source tensor that no other entry has",
                    quoted(expanded.source),
                )
            unknown = [name for name in expanded.tensors if name not in shapes]
            if unknown:
                problems.add("manifest.sources", f"{at}/tensors", "names of logical tensors", quoted(unknown[0]))
                break
            axis, first = expanded.axis, shapes[expanded.tensors[0]]
            if axis >= len(first) or (axis and EXPERTS not in manifest.features):
                wanted = f"a dimension of the tensors, and 0 unless requires names {EXPERTS}"
                problems.add("manifest.sources", f"{at}/axis", wanted, str(axis))
                break
            others = {
                (shapes[name][:axis], shapes[name][axis + 1 :], manifest.storage.dtype_of(name))
                for name in expanded.tensors
            }
            if len(others) > 1:
                which = ("first", "second", "third")[axis]
                wanted = f"tensors of one dtype that can be concatenated along their {which} dimension"
                problems.add("manifest.sources", f"{at}/tensors", wanted, quoted(expanded.tensors))
                break
            numbers = sum(prod(shapes[name]) for name in expanded.tensors)
            if expanded.shape is not None and (
                prod(expanded.shape) != numbers or ROW in expanded.source or EXPERTS not in manifest.features
            ):
                wanted = f"a shape of {numbers} numbers, without {ROW}, if requires names {EXPERTS}"
                problems.add("manifest.sources", f"{at}/shape", wanted, quoted(expanded.shape))
                break
            if any(shapes[name][axis] % expanded.groups for name in expanded.tensors):
                wanted = "a divisor of every tensor's rows" if axis == 0 else "a divisor of that dimension"
                problems.add("manifest.sources", f"{at}/groups", wanted, str(expanded.groups))
                break
            if expanded.transposed and len(first) not in (2, 3):
                wanted = "false, as the tensors don't have two dimensions or three"
                problems.add("manifest.sources", f"{at}/transposed", wanted, "true")
                break
            plain = len(expanded.tensors) == 1 and len(first) > 1 and expanded.groups == 1 and not expanded.transposed
            if ROW in expanded.source and not (plain and _ROW_NAME.fullmatch(expanded.source)):
                wanted = (
                    f"{ROW} once, between dots, and one tensor of at least two dimensions, not grouped or transposed"
                )
                problems.add("manifest.sources", f"{at}/source", wanted, quoted(expanded.source))
                break
            again = [name for name in expanded.tensors if name in covered and name != EMBEDDING]
            if again or len(set(expanded.tensors)) != len(expanded.tensors):
                wanted = f"tensors that no other source tensor holds, except {EMBEDDING}"
                problems.add("manifest.sources", f"{at}/tensors", wanted, quoted(expanded.tensors))
                break
            sources[expanded.source] = first[0]
            covered.update(expanded.tensors)
    if (twice := named_twice(sources)) is not None:
        problems.add("manifest.sources", "/source_names", "a source tensor that no other entry has", quoted(twice))
    left = shapes.keys() - covered
    if left and not problems.found:
        problems.add(
            "manifest.sources",
            "/source_names",
            "an entry for every logical tensor",
            f"none for {quoted(min(left))}",
        )
