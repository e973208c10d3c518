"""Bugs to plant in the JavaScript reader: documents and files."""

from __future__ import annotations

from typing import Final

from tests.support.seeded_bugs import bug

READER: Final = "runtime/browser/reader"
NODE: Final = "runtime/browser/sources/node.js"

READING: Final = (
    # JSON.
    bug(
        "an integer may be 1.0",
        f"{READER}/json.js",
        "return new Fraction(value);",
        "return Number.isInteger(value) ? value : new Fraction(value);",
        "manifest-size-float",
        "architecture-version-float",
    ),
    bug(
        "a key twice is overlooked",
        f"{READER}/json.js",
        "if (members.has(key)) {",
        "if (members.has(key) && level > 64) {",
        "json-duplicate",
    ),
    bug("65 levels", f"{READER}/json.js", "const MOST_LEVELS = 64;", "const MOST_LEVELS = 65;", "json-depth-65"),
    bug(
        "surrogates are overlooked", f"{READER}/json.js", "if (this.lone !== null) {", "if (!this.text) {", "surrogate"
    ),
    bug(
        "integers up to 2^53",
        f"{READER}/json.js",
        "if (!Number.isSafeInteger(value)) {",
        "if (!(Math.abs(value) <= 2 ** 53)) {",
        "2-to-the-53",
    ),
    bug(
        "a byte order mark is overlooked",
        f"{READER}/json.js",
        "if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) {\n    refuse(",
        "if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) {\n    if (!file) refuse(",
        "json-bom",
    ),
    bug(
        "all objects are plain objects",
        f"{READER}/json.js",
        'the end of the object");\n    }\n    return members;',
        'the end of the object");\n    }\n    const own = {};\n'
        "    members.forEach((member, key) => (own[key] = member));\n"
        "    return new Map(Object.entries(own));",
        "reject/manifest-proto",
        "reject/architecture-proto",
    ),
    # Documents.
    bug(
        "lengths of strings in UTF-16",
        f"{READER}/fields.js",
        "return count > most;",
        "return text.length > most;",
        "manifest-string-of-code-points",
    ),
    bug(
        "lengths of strings in bytes",
        f"{READER}/fields.js",
        "return count > most;",
        "return new TextEncoder().encode(text).length > most;",
        "manifest-string-of-code-points",
    ),
    bug(
        "true is an integer",
        f"{READER}/fields.js",
        'if (typeof value !== "number") {',
        'if (typeof value !== "number" && value !== true) {',
        "size-true",
    ),
    bug(
        "files in a plain object",
        f"{READER}/fields.js",
        "const result = Object.create(null);\n    for (const [key, member] of value) {",
        "const result = {};\n    for (const [key, member] of value) {",
        "manifest-tokenizer-constructor",
        "architecture-layers-constructor",
    ),
    bug(
        "kinds of layers in a plain object",
        f"{READER}/architecture.js",
        "rule(name in kinds,",
        "rule(name in { ...kinds },",
        "architecture-layers-constructor",
    ),
    bug(
        "extensions in a plain object",
        f"{READER}/manifest.js",
        "const known = (own) => KNOWN_EXTENSIONS.has(own);",
        "const known = (own) => own in Object.fromEntries([...KNOWN_EXTENSIONS].map((each) => [each, true]));",
        "manifest-requires-constructor",
    ),
    bug(
        "a digest and a line feed",
        f"{READER}/manifest.js",
        "/^[0-9a-f]{64}$/.test",
        "/^[0-9a-f]{64}$/m.test",
        "manifest-digest-newline",
    ),
    bug(
        "units above 1,000 with three digits",
        f"{READER}/logical_tensors.js",
        "this.#digits = Math.max(3, String(this.layers - 1).length);",
        "this.#digits = 3;",
        "large/units-1001",
    ),
    bug(
        "parameters wrap at 2^64",
        f"{READER}/cross_rules.js",
        "if (BigInt(model.parameters) !== all) {",
        "if (BigInt(model.parameters) !== BigInt.asUintN(64, all)) {",
        "large/parameters-wrapped",
    ),
    bug(
        "parameters wrap at 2^53",
        f"{READER}/cross_rules.js",
        "if (BigInt(model.parameters) !== all) {",
        "if (BigInt(model.parameters) !== BigInt.asUintN(53, all)) {",
        "large/parameters-wrapped",
    ),
    bug(
        "graphs in float16 over exceptions",
        f"{READER}/cross_rules.js",
        'plain.every((name) => name === "float16")',
        'storage.dtype === "float16"',
        "graph-float16",
    ),
    bug(
        "a graph's missing input",
        f"{READER}/cross_rules.js",
        "} else if (own.length !== wanted.length) {",
        "} else if (own.length > wanted.length) {",
        "manifest-graph-missing-input",
    ),
    bug(
        "paths that differ in case alone",
        f"{READER}/manifest.js",
        "const own = path.toLowerCase();",
        "const own = path;",
        "manifest-path-case",
    ),
    bug("names that Windows reserves", f"{READER}/paths.js", "con|prn|aux|nul", "con|prn|nul", "manifest-path-aux"),
    # The table back to the source.
    bug(
        "the number of matrix rows is ignored",
        f"{READER}/source_names.js",
        "this.addRow(name, shapes[0][0]);",
        "this.addRow(name, Infinity);",
        "source-rows",
    ),
    bug(
        "names of two tables of rows are never compared",
        f"{READER}/source_names.js",
        "if (met.some((other) => other.later !== later",
        "if (met.some((other) => other === own && other.later !== later",
        "source-rows-cross",
    ),
    bug(
        "a number with a leading zero is a row",
        f"{READER}/source_names.js",
        "(?:0|[1-9][0-9]{0,9})",
        "[0-9]{1,10}",
        "source-rows",
    ),
    bug(
        "a row that has another entry's name",
        f"{READER}/source_names.js",
        "if (number < (known.get(key(before, after)) ?? 0)) {",
        "if (number < (known.get(key(before, after)) ?? 0) - Infinity) {",
        "source-rows-again",
    ),
    bug(
        "no copies of the token table",
        f"{READER}/source_names.js",
        "if (this.named.has(name) && name !== KEPT_AGAIN) {",
        "if (this.named.has(name)) {",
        "manifest-source-t",
    ),
    bug(
        "the token table twice in an entry",
        f"{READER}/source_names.js",
        "if (new Set(names).size < names.length) {",
        "if (names.length < 1) {",
        "manifest-source-t",
    ),
    # Files.
    bug(
        "half of the digits of the manifest's line",
        f"{READER}/sums.js",
        "if (differing > DIGITS / 2) {",
        "if (differing >= DIGITS / 2) {",
        "directory/sums-",
    ),
    bug(
        "a header's digest is never compared",
        f"{READER}/weight_file.js",
        "if (sha256(begin) !== listedDigest) {",
        "if (!listedDigest) {",
        "directory/layer-header",
        "directory/mixed",
    ),
    bug(
        "the architecture's digest is never compared",
        f"{READER}/bundle.js",
        "await files.bytes(ARCHITECTURE)",
        "await files.read(ARCHITECTURE, 0, manifest.files[ARCHITECTURE].size)",
        "directory/architecture-digest",
    ),
    bug(
        "a file that is longer than listed",
        f"{READER}/files.js",
        "return found.size === size ? null :",
        "return found.size >= size ? null :",
        "directory/layer-longer",
    ),
    bug(
        "links are followed",
        NODE,
        "const found = await lstat(join(this.directory, path));",
        'const found = await (await import("node:fs/promises")).stat(join(this.directory, path));',
        "directory/link-layer",
        "directory/hanging-link",
    ),
    bug(
        "links on the way are followed",
        NODE,
        'if (above?.kind !== "directory") {',
        "if (above === null) {",
        "directory/link-on-the-way",
    ),
    bug(
        "links that aren't listed",
        f"{READER}/verify.js",
        "return !listed.has(path) && !signatures.has(path);",
        'return kind === "file" && !listed.has(path) && !signatures.has(path);',
        "directory/unlisted-hanging-link-exact",
    ),
    bug(
        "parts in any order",
        f"{READER}/weight_file.js",
        "const own = tensors.slice(first, first + count);",
        "const own = tensors.filter(({ name }) => header.entries.has(name));",
        "parts/",
    ),
    bug(
        "a part without a tensor",
        f"{READER}/weight_file.js",
        "if (headers.length > 1 && (count < 1 || header.entries.size < 1)) {",
        "if (headers.length < 1) {",
        "parts/empty",
    ),
    bug(
        "bytes after the last tensor",
        f"{READER}/weight_file.js",
        "if (dataStart + offset !== header.size) {",
        "if (dataStart + offset > header.size) {",
        "header/appended",
    ),
    bug(
        "a header in any form",
        f"{READER}/weight_file.js",
        "if (padded !== text.length || other >= 0 ||",
        "if (padded !== text.length ||",
        "header/order",
        "header/swapped",
    ),
    bug(
        "a page of padding too many",
        f"{READER}/weight_file.js",
        "if (padded !== text.length || other >= 0 ||",
        "if (other >= 0 ||",
        "header/padding",
    ),
    bug(
        "padding that isn't spaces",
        f"{READER}/weight_file.js",
        "rest.some((byte) => byte !== SPACE)",
        "rest.some((byte) => byte > SPACE)",
        "header/padding-tab",
    ),
    bug(
        "a header's tensors in a plain object",
        f"{READER}/weight_file.js",
        "const value = parseJson(text.subarray(0, end), path);",
        "const parsed = parseJson(text.subarray(0, end), path);\n  const plain = {};\n"
        "  for (const [name, member] of parsed instanceof Map ? parsed : []) plain[name] = member;\n"
        "  const value = parsed instanceof Map ? new Map(Object.entries(plain)) : parsed;",
        "header/proto",
    ),
    bug(
        "a scale may be NaN",
        f"{READER}/weight_file.js",
        "(bytes[i - 1] & 0x80) !== 0",
        "bytes[i - 1] === 0x80",
        "encoding/scale",
    ),
    bug(
        "a scale may be minus infinity",
        f"{READER}/weight_file.js",
        "(bytes[i] & 0x7f) === 0x7f",
        "bytes[i] === 0x7f",
        "encoding/scale",
    ),
)
