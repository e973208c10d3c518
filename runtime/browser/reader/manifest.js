/** `manifest.json`: its fields, and the rules between them that need no other document. */

import { parseJson } from "./json.js";
import { isPath, isShardName, parents } from "./paths.js";
import { Collector, escaped } from "./problems.js";
import {
  anything,
  array,
  boolean,
  choice,
  integer,
  mapping,
  number,
  object,
  orNull,
  string,
  tuple,
} from "./fields.js";

const FILE = "manifest.json";
const VERSION = "1.0";
const OPSET = 24; // SB-O-002
/** SB-M-009, SB-M-063 */
const LARGEST_DOCUMENT = 16_777_216;
/** SB-V-004 */
const KNOWN_EXTENSIONS = new Set([
  "self_vectors",
  "rows8",
  "blocks4",
  "experts",
  "output_gate",
  "value_dim",
  "value_multiplier",
  "residual_scales",
  "query_growth",
  "rotary_direction",
]);
const MOST = 2 ** 31 - 1;

const text = string();
const positive = integer(1);
const whole = integer();
const digest = string({ holds: (value) => /^[0-9a-f]{64}$/.test(value), expected: "64 of 0-9a-f" });
const id = string({
  holds: (value) => /^sha256:[0-9a-f]{64}$/.test(value),
  expected: "sha256: and 64 of 0-9a-f",
});
const dtype = choice("float32", "float16", "bfloat16");
const rate = number("a number from 0 to below 1", (value) => value >= 0 && value < 1);

const model = object(
  {
    name: text,
    family: text,
    source: text,
    revision: orNull(text),
    license: orNull(text),
    parameters: positive,
    context_length: orNull(positive),
    architecture: id,
    fingerprint: id,
  },
  {
    optional: {
      parent: id,
      dropout: object({ embedding: rate, attention: rate, attention_output: rate, mlp_output: rate }),
      source_configuration: object({
        file: text,
        part: orNull(text),
        generation: orNull(text),
        cast: boolean,
      }),
      text_file: choice("text.json"),
    },
    open: true, // SB-V-006
  },
);

const anyEncodings = mapping(() => choice("rows8", "blocks4_32", "blocks4_64", "blocks4_128"));
const storage = object(
  { encoding: choice("plain"), dtype, exceptions: mapping(() => dtype) },
  {
    optional: {
      encodings: (value, pointer, found) => {
        if (value instanceof Map && value.size === 0) {
          found.add("field.value", pointer, "at least one encoding, or no field", value); // SB-M-092
        }
        return anyEncodings(value, pointer, found);
      },
    },
  },
);

const ports = array(
  object({
    name: text,
    dtype: choice("float32", "float16", "int64"),
    shape: array((value, ...place) => (typeof value === "string" ? text : positive)(value, ...place)),
  }),
);
const graph = object({
  file: text,
  variant: choice("standard", "float16", "matmul_nbits"),
  opset: whole,
  inputs: ports,
  outputs: ports,
});

const shard = object({
  name: string({ holds: isShardName, expected: "1 to 64 of a-z 0-9 _ -" }),
  layers: tuple(whole, whole),
  embeds: boolean,
  head: boolean,
  units: array(text),
  bytes: whole,
  parameters: whole,
  graph: orNull(graph),
});

const row = object({ dtype: choice("int64"), shape: tuple(choice("batch")) });
const hiddenShape = tuple(choice("batch"), choice("sequence"), positive);
const hidden = object({ dtype: choice("compute"), shape: hiddenShape });
const boundary = object({ at: whole, tensors: object({ hidden, past: row, count: row }) });

const plainFile = object({ size: whole, sha256: digest });
const weightFile = object({ size: whole, sha256: digest, header_sha256: digest });

const sourceName = object(
  { source: text, tensors: array(text, { least: 1 }), groups: integer(1, MOST), transposed: boolean },
  { optional: { axis: integer(0, 2), shape: array(integer(1, MOST), { least: 1, most: 4 }) } },
);

const vectorFields = { file: text, lengths: array(integer(1, MOST), { least: 1, most: 64 }) };
const originalVectors = orNull(object(vectorFields, { optional: { original: text } }));
const selfVectors = object({ ...vectorFields, origin: choice("self") }, { optional: { original: text } });

function documentType(requires) {
  return object({
    format: text,
    format_version: text,
    requires: array(text),
    producer: anything,
    model,
    storage,
    shards: array(shard, { least: 1 }),
    boundaries: array(boundary),
    units: mapping(() => object({ files: array(text, { least: 1 }) })),
    files: mapping((path) => (path.endsWith(".safetensors") ? weightFile : plainFile), {
      holds: isPath,
      expected: "a path of 1 to 4 parts of a-z 0-9 . _ -",
    }),
    text: object({ tokenizer: orNull(text), stop_ids: array(whole) }),
    vectors: requires.includes("self_vectors") ? selfVectors : originalVectors, // SB-M-072
    source_names: array(sourceName),
    extensions: anything,
  });
}

/**
 * Parse and judge `manifest.json` by itself.
 *
 * @param {Uint8Array} bytes
 * @returns {object} the document as plain frozen data
 * @throws {BundleError} json.*, format.*, field.*, manifest.*
 */
export function parseManifest(bytes) {
  const value = parseJson(bytes, FILE);
  const found = new Collector(FILE);
  checkFormat(value, found);
  found.close();
  const manifest = documentType(value.get("requires"))(value, "", found);
  found.close();
  checkFiles(manifest, found);
  checkShards(manifest, found);
  checkGraphs(manifest, found);
  checkRequires(manifest, found);
  found.close();
  return manifest;
}

/**
 * The group of SB-V-001 to SB-V-004. A document of a newer format is refused for its version, whatever it
 * lacks.
 */
function checkFormat(value, found) {
  if (!(value instanceof Map)) {
    found.add("field.type", "", "an object", value);
    return;
  }
  const version = value.get("format_version");
  if (value.get("format") === "splitbundle" && typeof version === "string" && version !== VERSION) {
    const expected = `${VERSION}; another version needs another reader`;
    found.add("format.version", "/format_version", expected, version);
    return;
  }
  for (const name of ["format", "format_version", "requires"]) {
    if (!value.has(name)) {
      found.add("field.missing", "", `the field ${name}`, "an object without it");
    }
  }
  const given = (name, type) => value.has(name) && type(value.get(name), `/${name}`, found);
  const exactly = (wanted, code) => string({ holds: (own) => own === wanted, expected: `"${wanted}"`, code });
  given("format", exactly("splitbundle", "format.name"));
  given("format_version", exactly(VERSION, "format.version"));
  const known = (own) => KNOWN_EXTENSIONS.has(own);
  given("requires", array(string({ holds: known, expected: "a known extension", code: "format.requires" })));
}

function checkFiles({ files, units, text: own, vectors, model: about, storage: stored }, found) {
  const wrong = (pointer, expected, got) => found.add("manifest.files", pointer, expected, got);
  if (!("architecture.json" in files)) {
    wrong("/files", "architecture.json among the files", "no such path"); // SB-M-052
  }
  checkCollisions(Object.keys(files), wrong);
  const owners = new Map();
  for (const [unit, { files: paths }] of Object.entries(units)) {
    for (const [i, path] of paths.entries()) {
      const pointer = `/units/${escaped(unit)}/files/${i}`;
      if (!(path in files) || !path.endsWith(".safetensors") || path.includes("/")) {
        wrong(pointer, "a listed .safetensors file at the top", path); // SB-M-041
      } else if (owners.has(path)) {
        wrong(pointer, "a file of this unit alone, once", path); // SB-M-042
      }
      owners.set(path, unit);
    }
  }
  if (own.tokenizer !== null && !(own.tokenizer in files)) {
    wrong("/text/tokenizer", "a listed file", own.tokenizer); // SB-M-061
  }
  const freeWeightFile = (path) => path in files && path.endsWith(".safetensors") && !owners.has(path);
  if (vectors && !freeWeightFile(vectors.file)) {
    wrong("/vectors/file", "a listed .safetensors file of no unit", vectors.file); // SB-M-070
  }
  if (vectors?.original !== undefined) {
    if (!freeWeightFile(vectors.original) || vectors.original === vectors.file) {
      wrong("/vectors/original", "another listed .safetensors file of no unit", vectors.original); // SB-M-095
    }
    if (!stored.encodings || vectors.origin !== "self") {
      const expected = "no such field, unless weights are quantized and the origin is self";
      found.add("manifest.vectors", "/vectors/original", expected, vectors.original);
    }
  }
  const document = (path, pointer) => {
    if (!(path in files)) {
      wrong(pointer, "a listed file", path);
    } else if (files[path].size > LARGEST_DOCUMENT) {
      wrong(`/files/${escaped(path)}/size`, `at most ${LARGEST_DOCUMENT} bytes`, files[path].size);
    }
  };
  const source = about.source_configuration ?? {};
  for (const name of ["file", "part", "generation"]) {
    const path = source[name] ?? null;
    const pointer = `/model/source_configuration/${name}`;
    if (path !== null && !path.startsWith("source/")) {
      wrong(pointer, "a path that begins with source/", path); // SB-M-009
    } else if (path !== null) {
      document(path, pointer);
    }
  }
  if (about.text_file !== undefined) {
    document(about.text_file, "/model/text_file"); // SB-M-063
    if (own.tokenizer === null) {
      wrong("/model/text_file", "no text document without a tokenizer", about.text_file);
    }
  }
}

/** SB-D-003 */
function checkCollisions(paths, wrong) {
  const lower = new Set();
  for (const path of paths) {
    const own = path.toLowerCase();
    if (lower.has(own)) {
      wrong("/files", "paths that differ in lowercase", path);
    }
    lower.add(own);
  }
  for (const path of lower) {
    const above = parents(path).find((parent) => lower.has(parent));
    if (above !== undefined) {
      wrong("/files", `no file below the file ${above}`, path);
    }
  }
}

function checkShards({ shards, boundaries }, found) {
  const names = new Set();
  let end = 0;
  for (const [i, own] of shards.entries()) {
    if (found.full) {
      return;
    }
    const [first, last] = [i === 0, i === shards.length - 1];
    if (names.has(own.name)) {
      found.add("manifest.shards", `/shards/${i}/name`, "names that differ", own.name); // SB-M-022
    }
    names.add(own.name);
    if (own.layers[0] !== end) {
      found.add("manifest.layers", `/shards/${i}/layers/0`, `${end}`, own.layers[0]); // SB-M-023
    }
    const least = own.layers[0] + (first || last ? 0 : 1);
    if (own.layers[1] < least) {
      found.add("manifest.layers", `/shards/${i}/layers/1`, `at least ${least}`, own.layers[1]); // SB-M-024
    }
    end = own.layers[1];
    for (const [name, wanted] of [["embeds", first], ["head", last]]) {
      if (own[name] !== wanted) {
        found.add("manifest.shards", `/shards/${i}/${name}`, String(wanted), own[name]); // SB-M-025
      }
    }
  }
  const cuts = shards.slice(1).map((own) => own.layers[0]);
  const at = boundaries.map((own) => own.at);
  if (cuts.length !== at.length || cuts.some((cut, i) => cut !== at[i])) {
    found.add("manifest.boundaries", "/boundaries", `one at each cut: ${cuts}`, String(at)); // SB-M-030
  }
}

function checkGraphs({ shards, files, storage: stored }, found) {
  const encodings = Object.values(stored.encodings ?? {});
  const blocks = encodings.some((name) => name.startsWith("blocks4"));
  const plain = [stored.dtype, ...Object.values(stored.exceptions)];
  const float16 = encodings.length === 0 && plain.every((name) => name === "float16");
  const owners = new Set();
  for (const [i, { graph: own }] of shards.entries()) {
    if (own === null) {
      continue;
    }
    const pointer = `/shards/${i}/graph`;
    const { file, variant } = own;
    if (!(file in files) || file.includes("/") || !file.endsWith(".onnx") || owners.has(file)) {
      const expected = "a listed .onnx file at the top, of this shard alone"; // SB-O-001
      found.add("manifest.files", `${pointer}/file`, expected, file);
    }
    owners.add(file);
    if (own.opset !== OPSET) {
      found.add("manifest.graphs", `${pointer}/opset`, String(OPSET), own.opset); // SB-O-002
    }
    if (variant === "float16" && !float16) {
      // SB-O-017
      const expected = "another one, unless all weights are float16";
      found.add("manifest.graphs", `${pointer}/variant`, expected, variant);
    }
    if ((variant === "matmul_nbits") !== blocks) {
      // SB-O-020
      found.add("manifest.graphs", `${pointer}/variant`, "matmul_nbits for weights of 4 bits alone", variant);
    }
  }
}

/** SB-M-094 */
function checkRequires({ requires, storage: stored }, found) {
  const encodings = Object.values(stored.encodings ?? {});
  for (const name of ["rows8", "blocks4"]) {
    if (encodings.some((encoding) => encoding.startsWith(name)) && !requires.includes(name)) {
      found.add("manifest.requires", "/requires", `the name ${name}`, "a list without it");
    }
  }
}

