/** `manifest.json`: its fields, and the rules between them that need no other document. */

import { parseJson } from "./json.js";
import { byBytes, isPath, isShardName, parents } from "./paths.js";
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
  found.close();
  return manifest;
}

/** The group of SB-V-001 to SB-V-004. */
function checkFormat(value, found) {
  if (!(value instanceof Map)) {
    found.add("field.type", "", "an object", value);
    return;
  }
  for (const name of ["format", "format_version", "requires"]) {
    if (!value.has(name)) {
      found.add("field.missing", "", `the field ${name}`, "an object without it");
    }
  }
  const given = (name, type) => value.has(name) && type(value.get(name), `/${name}`, found);
  const exactly = (wanted, code, expected) => string({ holds: (own) => own === wanted, expected, code });
  given("format", exactly("splitbundle", "format.name", '"splitbundle"'));
  const readable = `"${VERSION}": another version needs another reader`;
  given("format_version", exactly(VERSION, "format.version", readable));
  const known = (own) => KNOWN_EXTENSIONS.has(own);
  given("requires", array(string({ holds: known, expected: "a known extension", code: "format.requires" })));
}

/** Files and paths, rule by rule in the order of SB-E-002. */
function checkFiles(manifest, found) {
  const { files, units, text: own, vectors, model: about, storage: stored, shards } = manifest;
  const wrong = (pointer, expected, got) => found.add("manifest.files", pointer, expected, got);
  const use = (path, pointer, expected = "a listed file", holds = () => true) => {
    if (!(path in files) || !holds(path)) {
      wrong(pointer, expected, path);
    }
  };
  const small = (path) => {
    if (path in files && files[path].size > LARGEST_DOCUMENT) {
      wrong(`/files/${escaped(path)}/size`, `at most ${LARGEST_DOCUMENT} bytes`, files[path].size);
    }
  };
  checkCollisions(Object.keys(files), wrong);
  const source = about.source_configuration ?? {};
  for (const name of ["file", "part", "generation"].filter((each) => typeof source[each] === "string")) {
    const pointer = `/model/source_configuration/${name}`; // SB-M-009
    const expected = "a listed path that begins with source/";
    use(source[name], pointer, expected, (path) => path.startsWith("source/"));
    small(source[name]);
  }
  const owners = checkUnitFiles(units, use, wrong);
  if (!("architecture.json" in files)) {
    wrong("/files", "architecture.json among the files", "no such path"); // SB-M-052
  }
  if (own.tokenizer !== null) {
    use(own.tokenizer, "/text/tokenizer"); // SB-M-061
  }
  if (about.text_file !== undefined) {
    use(about.text_file, "/model/text_file"); // SB-M-063
    if (own.tokenizer === null) {
      wrong("/model/text_file", "no text document without a tokenizer", about.text_file);
    }
    small(about.text_file);
  }
  const free = (path) => path.endsWith(".safetensors") && !owners.has(path);
  if (vectors) {
    use(vectors.file, "/vectors/file", "a listed .safetensors file of no unit", free); // SB-M-070
  }
  if (vectors?.original !== undefined) {
    checkOriginal(vectors, stored, use, free, found);
  }
  const graphs = new Set();
  for (const [i, { graph: each }] of shards.entries()) {
    if (each !== null) {
      const fits = (path) => !path.includes("/") && path.endsWith(".onnx") && !graphs.has(path);
      const expected = "a listed .onnx file at the top, of this shard alone"; // SB-O-001
      use(each.file, `/shards/${i}/graph/file`, expected, fits);
      graphs.add(each.file);
    }
  }
}

/** SB-M-095 */
function checkOriginal({ file, original, origin }, { encodings }, use, free, found) {
  const pointer = "/vectors/original";
  const other = (path) => free(path) && path !== file;
  use(original, pointer, "another listed .safetensors file of no unit", other);
  if (!encodings || origin !== "self") {
    const expected = "no such field, unless weights are quantized and the origin is self";
    found.add("manifest.vectors", pointer, expected, original);
  }
}

/** SB-M-041 of all units, then SB-M-042. Returns the files that belong to units. */
function checkUnitFiles(units, use, wrong) {
  const uses = Object.entries(units).flatMap(([unit, { files: paths }]) => {
    return paths.map((path, i) => ({ path, pointer: `/units/${escaped(unit)}/files/${i}` }));
  });
  const fits = (path) => path.endsWith(".safetensors") && !path.includes("/");
  for (const { path, pointer } of uses) {
    use(path, pointer, "a listed .safetensors file at the top", fits);
  }
  const owners = new Set();
  for (const { path, pointer } of uses) {
    if (owners.has(path)) {
      wrong(pointer, "a file of this unit alone, once", path);
    }
    owners.add(path);
  }
  return owners;
}

/** SB-D-003 */
function checkCollisions(paths, wrong) {
  const lower = new Map();
  for (const path of [...paths].sort(byBytes)) {
    const own = path.toLowerCase();
    if (lower.has(own)) {
      wrong(`/files/${escaped(path)}`, `another path than ${lower.get(own)} in lowercase`, path);
    } else {
      lower.set(own, path);
    }
  }
  const above = new Set([...lower.keys()].flatMap(parents).filter((parent) => lower.has(parent)));
  for (const own of above) {
    wrong(`/files/${escaped(lower.get(own))}`, "no path below a file", own);
  }
}

/** Shards and boundaries, rule by rule: SB-M-022 to SB-M-025, SB-M-030 and, among boundaries, SB-M-032. */
function checkShards({ shards, boundaries }, found) {
  const names = new Set();
  const last = shards.length - 1;
  shards.forEach(({ name }, i) => {
    if (names.has(name)) {
      found.add("manifest.shards", `/shards/${i}/name`, "names that differ", name); // SB-M-022
    }
    names.add(name);
  });
  shards.forEach(({ layers: [start] }, i) => {
    const wanted = i ? shards[i - 1].layers[1] : 0;
    if (start !== wanted) {
      found.add("manifest.layers", `/shards/${i}/layers/0`, `${wanted}`, start); // SB-M-023
    }
  });
  shards.forEach(({ layers: [start, stop] }, i) => {
    const least = start + (i === 0 || i === last ? 0 : 1);
    if (stop < least) {
      found.add("manifest.layers", `/shards/${i}/layers/1`, `at least ${least}`, stop); // SB-M-024
    }
  });
  shards.forEach((own, i) => {
    for (const [name, wanted] of [["embeds", i === 0], ["head", i === last]]) {
      if (own[name] !== wanted) {
        found.add("manifest.shards", `/shards/${i}/${name}`, String(wanted), own[name]); // SB-M-025
      }
    }
  });
  const cuts = shards.slice(1).map((own) => own.layers[0]);
  const at = boundaries.map((own) => own.at);
  if (cuts.length !== at.length || cuts.some((cut, i) => cut !== at[i])) {
    found.add("manifest.boundaries", "/boundaries", `one at each cut: ${cuts}`, String(at)); // SB-M-030
  }
  const widths = boundaries.map(({ tensors }) => tensors.hidden.shape[2]);
  const other = widths.findIndex((width) => width !== widths[0]);
  if (other > 0) {
    const pointer = `/boundaries/${other}/tensors/hidden/shape/2`; // SB-M-032
    found.add("manifest.boundaries", pointer, `${widths[0]}, as at the first boundary`, widths[other]);
  }
}
