"""Bugs to plant in the JavaScript reader: graphs, what onnxruntime-genai is told, tokenizers."""

from __future__ import annotations

from typing import Final

from tests.support.seeded_bugs import bug

READER: Final = "runtime/browser/reader"

JUDGING: Final = (
    # Graphs, and what onnxruntime-genai is told.
    bug(
        "an initializer that nothing takes",
        f"{READER}/onnx_graph.js",
        "if (!this.taken.has(name)) {",
        "if (!known.has(name)) {",
        "graph/constant-unused",
    ),
    bug(
        "the offset of a weight",
        f"{READER}/onnx_graph.js",
        'number("offset") === tensor.offset &&',
        'number("offset") >= 0 &&',
        "graph/offset-one-on",
    ),
    bug(
        "offsets in any form of a number",
        f"{READER}/onnx_graph.js",
        'DIGITS.test(entries.get(key) ?? "") ? Number(entries.get(key)) : null',
        "entries.has(key) ? Number(entries.get(key)) : null",
        "graph/offset-",
    ),
    bug(
        "numbers in more bytes than they need",
        f"{READER}/onnx_messages.js",
        "if ((i > 0 && byte === 0) || (i === 9 && byte > 1)) {",
        "if (i === 9 && byte > 1) {",
        "number-in-two-bytes",
        "tag-in-two-bytes",
    ),
    bug(
        "numbers of 32 bits",
        f"{READER}/onnx_messages.js",
        "exact(BigInt.asIntN(64, value))",
        "exact(BigInt.asIntN(32, value))",
        "graph/constant-overflow-to-a-size",
    ),
    bug(
        "values that come later",
        f"{READER}/onnx_graph.js",
        'if (!known.has(name)) {\n          this.refuse("values", "values that stand',
        'if (name === "") {\n          this.refuse("values", "values that stand',
        "graph/nodes-turned-round",
    ),
    bug(
        "a loop that ends by any number",
        f"{READER}/onnx_graph.js",
        'if (this.makers.get(count) !== "Size") {',
        "if (!values.has(count)) {",
        "graph/loop-",
    ),
    bug(
        "loops in loops",
        f"{READER}/onnx_graph.js",
        'opType === LOOP && domain === "" && !inBody',
        'opType === LOOP && domain === ""',
        "graph/loop-in-a-loop",
    ),
    bug(
        "dtypes of inputs",
        f"{READER}/onnx_graph.js",
        "elemType === ELEMENT_TYPES[port.dtype] &&",
        "elemType > 0 &&",
        "graph/input-dtype",
        "graph/output-dtype",
    ),
    bug(
        "another directory of the tokenizer",
        f"{READER}/genai.js",
        '.slice(0, -1).join("/")',
        '.slice(0, -1).join("/") + "/"',
        "genai/tokenizer",
        "genai/whole",
    ),
    bug(
        "a bundle without an id that ends a text",
        f"{READER}/genai.js",
        "if (!complete || text.stop_ids.length === 0) {",
        "if (!complete) {",
        "genai/without-stop-id",
    ),
    bug(
        "a member more for genai", f"{READER}/genai.js", "if (more !== undefined) {", "if (more === 0) {", "genai/more"
    ),
    bug(
        "a member less for genai",
        f"{READER}/genai.js",
        "if (missing !== undefined) {",
        "if (missing === 0) {",
        "genai/without-type",
        "genai/without-search",
    ),
    bug(
        "numbers of genai as 24.0",
        f"{READER}/genai.js",
        "} else if (own !== wanted) {",
        "} else if ((own?.fraction ?? own) !== wanted) {",
        "genai/vocabulary-float",
    ),
    bug(
        "the search of genai in a plain object",
        f"{READER}/genai.js",
        "for (const [name, value] of search) {",
        "const plainly = {};\n  for (const [name, value] of search) plainly[name] = value;\n"
        "  for (const [name, value] of Object.entries(plainly)) {",
        "genai/search",
    ),
    # Text.
    bug(
        "special tokens without ids",
        f"{READER}/tokenizer_rules.js",
        'list(token instanceof Map ? token.get("ids") : undefined)',
        'token.get("ids")',
        "tokenizer/special-tokens",
    ),
    bug(
        "special tokens at the top alone",
        f"{READER}/tokenizer_rules.js",
        'of objects(processor, "/post_processor")) {',
        'of processor instanceof Map ? [["/post_processor", processor]] : []) {',
        "tokenizer/id-deep",
        "tokenizer/template",
    ),
    bug(
        "ids of special tokens that no template uses",
        f"{READER}/tokenizer_rules.js",
        "if (used.has(name)) {",
        "if (ids.length) {",
        "tokenizer/template-unused",
    ),
    bug(
        "steps that make a text longer",
        f"{READER}/tokenizer_rules.js",
        "product > MOST_GROWTH) {",
        "product > MOST_GROWTH ** 9) {",
        "tokenizer/growth",
    ),
    bug(
        "steps that insert between all characters",
        f"{READER}/tokenizer_rules.js",
        ": characters(content) + 1;",
        ": characters(content);",
        "tokenizer/growth-empty",
    ),
    bug(
        "types of steps in a plain object",
        f"{READER}/tokenizer_rules.js",
        '(GROWTHS.get(value.get("type")) ?? 1)',
        '(Object.fromEntries(GROWTHS)[value.get("type")] ?? 1)',
        "tokenizer/growth",
    ),
    bug(
        "a vocabulary in a plain object",
        f"{READER}/tokenizer_rules.js",
        "for (const [token, id] of vocabulary) {",
        "const plain = {};\n  for (const [token, id] of vocabulary) plain[token] = id;\n"
        "  for (const [token, id] of Object.entries(plain)) {",
        "tokenizer/proto",
    ),
    bug(
        "two tokens of one id",
        f"{READER}/tokenizer_rules.js",
        "if (owners.has(id)) {",
        "if (owners.has(token)) {",
        "tokenizer/id-twice",
    ),
    bug(
        "two templates of one name",
        f"{READER}/text_document.js",
        "if (names.has(name)) {",
        "if (names.has(i)) {",
        "text/template-twice",
    ),
)
