"""Bugs that a reader can have, to be planted in a copy of one: the conformance kit must find each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FORMAT: Final = "runtime/splitbundle/format"
TORCH: Final = "runtime/splitbundle/backends/torch"
AT_MOST: Final = 'if len(self.value) > maximum:\n            self.refuse(f"at most {maximum} characters")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A change of one place in the source, and the cases of the kit that are asked."""

    name: str
    file: str
    good: str
    bad: str
    cases: tuple[str, ...]


def _bug(name: str, file: str, good: str, bad: str, *cases: str) -> Bug:
    return Bug(name=name, file=file, good=good, bad=bad, cases=cases)


PYTHON: Final = (
    # Documents.
    _bug(
        "lengths of strings in UTF-16",
        f"{FORMAT}/fields.py",
        AT_MOST,
        AT_MOST.replace("len(self.value)", 'len(self.value.encode("utf-16-le")) // 2'),
        "manifest-string-of-code-points",
    ),
    _bug(
        "lengths of strings in bytes",
        f"{FORMAT}/fields.py",
        AT_MOST,
        AT_MOST.replace("len(self.value)", "len(self.value.encode())"),
        "manifest-string-of-code-points",
    ),
    _bug(
        "an integer may be 1.0",
        f"{FORMAT}/fields.py",
        'if type(self.value) is not int:\n            self.refuse("an integer"',
        'if type(self.value) is not int and self.value != 1.0:\n            self.refuse("an integer"',
        "manifest-size-float",
        "architecture-version-float",
    ),
    _bug(
        "true is an integer",
        f"{FORMAT}/fields.py",
        'if type(self.value) is not int:\n            self.refuse("an integer"',
        'if not isinstance(self.value, int):\n            self.refuse("an integer"',
        "size-true",
    ),
    _bug(
        "a key twice is overlooked",
        f"{FORMAT}/strict_json.py",
        "if len(members) != len(pairs):",
        "if len(members) > len(pairs):",
        "json-duplicate",
    ),
    _bug("65 levels", f"{FORMAT}/strict_json.py", "MAX_DEPTH: Final = 64", "MAX_DEPTH: Final = 65", "json-depth-65"),
    _bug(
        "surrogates are overlooked",
        f"{FORMAT}/strict_json.py",
        "_check_texts(value, refuse)\n    return value",
        "pass\n    return value",
        "surrogate",
    ),
    _bug("integers up to 2^53", f"{FORMAT}/strict_json.py", "2**53 - 1", "2**53", "2-to-the-53"),
    _bug(
        "units above 1,000 with three digits",
        f"{FORMAT}/architecture/decoder.py",
        "0{max(3, len(str(len(self.layers) - 1)))}d",
        "03d",
        "large/units-1001",
    ),
    _bug(
        "parameters wrap at 2^64",
        f"{FORMAT}/architecture/sizes.py",
        "return sum(math.prod(shape) for shape in shapes.values())",
        "return sum(math.prod(shape) for shape in shapes.values()) % 2**64",
        "large/parameters-wrapped",
    ),
    _bug(
        "the number of matrix rows is ignored",
        f"{FORMAT}/manifest/row_names.py",
        'if number < by_row.get(".".join(template), 0):',
        'if ".".join(template) in by_row:',
        "source-rows",
    ),
    _bug(
        "names of two tables of rows are never compared",
        f"{FORMAT}/manifest/row_names.py",
        "if enough < len(least) and least[enough] < own_rows:",
        "if enough > len(least):",
        "source-rows",
    ),
    _bug(
        "a number with a leading zero is a row",
        f"{FORMAT}/manifest/row_names.py",
        'and (component == "0" or component[0] != "0")',
        "",
        "source-rows",
    ),
    _bug(
        "no copies of the token table",
        f"{FORMAT}/manifest/rules.py",
        "if name in covered and name != EMBEDDING]",
        "if name in covered]",
        "manifest-source-t",
    ),
    _bug(
        "the token table twice in an entry",
        f"{FORMAT}/manifest/rules.py",
        "if again or len(set(expanded.tensors)) != len(expanded.tensors):",
        "if again:",
        "manifest-source-t",
    ),
    _bug(
        "graphs in float16 over exceptions",
        f"{FORMAT}/manifest/document.py",
        'if self.dtypes == ("float16",) and',
        'if self.dtype == "float16" and',
        "graph-float16",
    ),
    _bug(
        "a graph's missing input",
        f"{FORMAT}/manifest/rules.py",
        "if i >= len(found):\n                problems.add(",
        "if i >= len(found):\n                break\n                problems.add(",
        "manifest-graph-missing-input",
    ),
    _bug(
        "paths that differ in case alone",
        f"{FORMAT}/manifest/rules.py",
        "folded.setdefault(path.lower(), path)",
        "folded.setdefault(path, path)",
        "manifest-path-case",
    ),
    _bug("names that Windows reserves", f"{FORMAT}/names.py", "con|prn|aux|nul", "con|prn|nul", "manifest-path-"),
    # Files.
    _bug(
        "half of the digits of the manifest's line",
        "runtime/splitbundle/storage/documents.py",
        "strict=True)) > 32",
        "strict=True)) > 31",
        "directory/sums-",
    ),
    _bug(
        "a manifest that is a hanging link is missing",
        "runtime/splitbundle/storage/documents.py",
        "os.lstat(root / document.FILE)",
        "os.stat(root / document.FILE)",
        "directory/hanging-link",
    ),
    _bug(
        "links are followed",
        "runtime/splitbundle/storage/files.py",
        "status = os.lstat(place)",
        "status = os.stat(place)",
        "directory/link-",
    ),
    _bug(
        "a header's digest is never compared",
        "runtime/splitbundle/storage/weight_headers.py",
        "if digest != listed.header_sha256:",
        "if not digest:",
        "directory/layer-header",
        "directory/mixed",
    ),
    _bug(
        "parts in any order",
        f"{FORMAT}/weight_layout.py",
        "expected = dict(islice(expected.items(), len(found)))",
        "expected = {name: tensor for name, tensor in expected.items() if name in found}",
        "parts/",
    ),
    _bug(
        "a part without a tensor",
        f"{FORMAT}/weight_layout.py",
        "if not expected and (part or more):",
        "if not expected and not part:",
        "parts/",
    ),
    _bug(
        "bytes after the last tensor",
        f"{FORMAT}/weight_layout.py",
        "if size != end:",
        "if size < end:",
        "header/appended",
        "header/byte-short",
    ),
    _bug(
        "a header in any form",
        f"{FORMAT}/weight_layout.py",
        "if raw != canonical:",
        "if len(raw) != len(canonical):",
        "header/",
    ),
    _bug(
        "a scale may be NaN",
        "runtime/splitbundle/storage/scales.py",
        "def check_scales(",
        "def check_scales(*_: object) -> None:\n    pass\n\n\ndef _unused(",
        "encoding/scale",
    ),
    # Graphs, and what onnxruntime-genai is told.
    _bug(
        "an initializer that nothing takes",
        "runtime/splitbundle/verification/onnx_rules.py",
        "if unused := initializers - self.taken:",
        "if unused := initializers - initializers:",
        "graph/constant-unused",
    ),
    _bug(
        "the offset of a weight",
        "runtime/splitbundle/verification/onnx_rules.py",
        'b"offset": str(stored.offset),',
        "",
        "graph/offset-one-on",
        "graph/good-graphs",
    ),
    _bug(
        "numbers in more bytes than they need",
        "runtime/splitbundle/verification/onnx_reader.py",
        "if (shift and not last) or at >= stop",
        "if at >= stop",
        "number-in-two-bytes",
        "tag-in-two-bytes",
    ),
    _bug(
        "another directory of the tokenizer",
        "runtime/splitbundle/format/genai.py",
        'text.tokenizer.rpartition("/")[0]',
        'text.tokenizer.rpartition("/")[0] + "/"',
        "genai/tokenizer",
        "genai/whole",
    ),
    _bug(
        "a bundle without an id that ends a text",
        "runtime/splitbundle/verification/genai_rules.py",
        "if not bundle.manifest.text.stop_ids:",
        "if bundle.manifest.text.stop_ids is None:",
        "genai/without-stop-id",
    ),
    # Text.
    _bug(
        "special tokens without ids",
        "runtime/splitbundle/verification/tokenizer_rules.py",
        'ids = _items(entry.get("ids") if isinstance(entry, dict) else None)',
        'ids = entry["ids"]',
        "tokenizer/special-tokens",
    ),
    _bug(
        "steps that make a text longer",
        "runtime/splitbundle/verification/tokenizer_rules.py",
        "if growth > MAX_GROWTH:",
        "if growth > MAX_GROWTH**9:",
        "tokenizer/growth",
    ),
    # Numbers.
    _bug(
        "ALiBi as if heads were a power of two",
        f"{TORCH}/positions.py",
        "powers = torch.cat((powers[1::2], powers[::2]))[:heads]",
        "powers = powers[:heads]",
        "numbers/alibi",
    ),
    _bug(
        "a window that is one too wide",
        f"{TORCH}/positions.py",
        "allowed &= keys > queries - span.window",
        "allowed &= keys >= queries - span.window",
        "numbers/window",
    ),
    _bug(
        "chunks are ignored",
        f"{TORCH}/positions.py",
        "allowed &= keys // span.chunk == queries // span.chunk",
        "pass",
        "numbers/temperature",
    ),
    _bug(
        "a temperature without steps",
        f"{TORCH}/positions.py",
        "(moved // temperature.original_positions).float()",
        "moved.float() / temperature.original_positions",
        "numbers/temperature",
    ),
    _bug(
        "yarn that doesn't truncate",
        f"{TORCH}/rotary.py",
        "low, high = math.floor(low), math.ceil(high)",
        "pass",
        "numbers/scaling-yarn",
        "numbers/temperature-yarn",
    ),
    _bug(
        "yarn without its factor",
        f"{TORCH}/rotary.py",
        'getattr(rotary.scaling, "attention_factor", 1.0)',
        "1.0",
        "numbers/scaling-yarn",
        "numbers/scaling-longrope",
    ),
    _bug(
        "llama3 without its ramp",
        f"{TORCH}/rotary.py",
        "torch.where(fast, base, between)",
        "base",
        "numbers/scaling-llama3",
    ),
    _bug(
        "dynamic scaling below its threshold",
        f"{TORCH}/rotary.py",
        "longest = max(length, scaling.original_positions)",
        "longest = scaling.original_positions",
        "numbers/scaling-dynamic",
    ),
    _bug(
        "dynamic scaling by the longest row",
        f"{TORCH}/positions.py",
        "lengths = [past + count for past, count in zip(self.past, self.count, strict=True)]",
        "lengths = [max(map(sum, zip(self.past, self.count, strict=True)))] * len(self.past)",
        "numbers/scaling-dynamic",
        "numbers/scaling-longrope",
    ),
    _bug(
        "long factors from the threshold on",
        f"{TORCH}/rotary.py",
        "long = length > scaling.original_positions",
        "long = False",
        "numbers/scaling-longrope",
    ),
    _bug(
        "all pairs are turned",
        f"{TORCH}/rotary.py",
        "torch.where(turned, plain, 0.0)",
        "plain",
        "numbers/scaling-proportional",
    ),
    _bug(
        "sines beside cosines",
        f"{TORCH}/positions.py",
        "waves = torch.cat((angles.sin(), angles.cos(),",
        "waves = torch.cat((angles.cos(), angles.sin(),",
        "numbers/sinusoidal",
    ),
    _bug(
        "scores without a cap",
        f"{TORCH}/attention.py",
        "scores = torch.tanh(scores / cap) * cap",
        "pass",
        "numbers/capped",
    ),
    _bug("logits without a cap", f"{TORCH}/decoder.py", "torch.tanh(x / cap) * cap", "x", "numbers/capped"),
    _bug(
        "the router's logits without a cap",
        f"{TORCH}/experts.py",
        "torch.tanh(logits / cap) * cap",
        "logits",
        "numbers/gates-of-",
    ),
    _bug(
        "a gate's slope",
        f"{TORCH}/experts.py",
        "gate * torch.sigmoid(slope * gate)",
        "gate * torch.sigmoid(gate)",
        "numbers/sinks",
    ),
    _bug(
        "the correction of scores counts as a weight",
        f"{TORCH}/experts.py",
        "weights = (self._scores(logits) if scores is None else scores).gather(-1, chosen)",
        "weights = (self._scores(logits) + (0 if self.correction is None else self.correction)).gather(-1, chosen)",
        "numbers/experts-groups",
    ),
    _bug(
        "weights that aren't divided by their sum",
        f"{TORCH}/experts.py",
        "if self.facts.normalised:",
        "if False:",
        "numbers/experts",
    ),
    _bug(
        "xIELU without its linear half",
        f"{TORCH}/feedforward.py",
        "return torch.where(x > 0, above, below) + 0.5 * x",
        "return torch.where(x > 0, above, below)",
        "numbers/xielu",
    ),
    _bug(
        "relu that isn't squared",
        f"{TORCH}/feedforward.py",
        "functional.relu(x).square()",
        "functional.relu(x)",
        "numbers/relu-squared",
    ),
)
