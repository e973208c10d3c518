/** Rules that need both documents (SB-E-002, the last group). */

import { LogicalTensors, blockSize, exactByteLength, storedTensors } from "./logical_tensors.js";
import { byBytes } from "./paths.js";
import { Collector, escaped } from "./problems.js";
import { sha256 } from "./sha256.js";
import { checkSourceNames } from "./source_names.js";

const FILE = "manifest.json";
/** SB-O-002 */
const OPSET = 24;
/** SB-M-053: a file's header and more, and the size of a file that isn't a weight file */
const LARGEST_HEADER = 33_554_432n;
const LARGEST_OTHER = 268_435_456;
/** SB-M-092 */
const ATTENTION_MATRIX = "attention\\.(?:query|key|value|gate|output)";
const MLP_MATRIX = "mlp\\.(?:experts\\.|shared\\.)?(?:gate|up|down)";
const LAYER_MATRIX = new RegExp(`^layers\\.[0-9]+\\.(?:${ATTENTION_MATRIX}|${MLP_MATRIX})\\.weight$`);
const MATRICES = new Set([
  "embedding.token.weight",
  "embedding.projection.weight",
  "head.narrowing.weight",
  "head.projection.weight",
]);

/**
 * Judge a manifest beside its architecture.
 *
 * @param {object} manifest
 * @param {object} architecture
 * @returns {LogicalTensors}
 * @throws {BundleError} manifest.*
 */
export function checkTogether(manifest, architecture) {
  const tensors = new LogicalTensors(architecture);
  const found = new Collector(FILE);
  checkExtensions(manifest, architecture, found);
  checkUnits(manifest, tensors, found);
  checkLayers(manifest, tensors, found);
  checkWidths(manifest, architecture, found);
  checkStorage(manifest, tensors, found);
  checkCounts(manifest, architecture, found);
  checkParameters(manifest, tensors, found);
  found.close();
  checkGraphs(manifest, architecture, found);
  checkShardUnits(manifest, tensors, found);
  found.close(); // totals need units that fit
  checkTotals(manifest, tensors, found);
  checkSizes(manifest, tensors, found);
  checkSourceNames(manifest, tensors, found);
  checkIds(manifest, found);
  found.close();
  return tensors;
}

/** SB-M-040 */
function checkUnits({ units }, tensors, found) {
  const wanted = tensors.units();
  const missing = wanted.filter((unit) => !(unit in units));
  if (missing.length || Object.keys(units).length !== wanted.length) {
    const expected = `the units ${wanted.slice(0, 4).join(", ")} to ${wanted.at(-1)}`;
    found.add("manifest.units", "/units", expected, missing.length ? `no ${missing[0]}` : "more units");
  }
}

/** SB-M-023 */
function checkLayers({ shards }, tensors, found) {
  const last = shards.length - 1;
  if (shards[last].layers[1] !== tensors.layers) {
    found.add("manifest.layers", `/shards/${last}/layers/1`, `${tensors.layers}`, shards[last].layers[1]);
  }
}

/** SB-M-026 */
function checkShardUnits({ shards }, tensors, found) {
  for (const [i, shard] of shards.entries()) {
    const wanted = shardUnits(shard, tensors);
    if (wanted.length !== shard.units.length || wanted.some((unit, k) => unit !== shard.units[k])) {
      found.add("manifest.shards", `/shards/${i}/units`, wanted.join(", "), shard.units.join(", "));
    }
  }
}

/** The units that a shard needs, in order (SB-M-026). */
function shardUnits({ layers: [start, stop], embeds, head }, tensors) {
  const units = [];
  if (embeds || (head && tensors.architecture.head.tied)) {
    units.push("embedding");
  }
  for (let layer = start; layer < stop; layer++) {
    units.push(tensors.layerUnit(layer));
  }
  return head ? [...units, "head"] : units;
}

/** SB-M-032: all boundaries have one width by now. */
function checkWidths({ boundaries }, { hidden_size: wanted }, found) {
  const width = boundaries[0]?.tensors.hidden.shape[2];
  if (width !== undefined && width !== wanted) {
    found.add("manifest.boundaries", "/boundaries/0/tensors/hidden/shape/2", `${wanted}`, width);
  }
}

function checkStorage({ storage }, tensors, found) {
  const wrong = (place, name, expected, got) => {
    found.add("manifest.storage", `/storage/${place}/${escaped(name)}`, expected, got);
  };
  for (const name of Object.keys(storage.exceptions)) {
    if (!tensors.shape(name)) {
      wrong("exceptions", name, "the name of a logical tensor", name); // SB-M-012
    }
  }
  const encodings = Object.entries(storage.encodings ?? {});
  const unfit = ([name]) => !tensors.shape(name) || name in storage.exceptions || !isMatrix(name);
  for (const [name] of encodings.filter(unfit)) {
    wrong("encodings", name, "the name of a matrix that is no exception", name); // SB-M-092
  }
  for (const [name, encoding] of encodings.filter((entry) => !unfit(entry))) {
    const shape = tensors.shape(name);
    const [rows, columns] = shape.slice(-2);
    const fits = (size, unit) => BigInt(size) % BigInt(unit) === 0n; // SB-M-093
    const block = encoding === "rows8" ? 16 : blockSize(encoding);
    if (!fits(columns, block) || (encoding !== "rows8" && !fits(rows, 16))) {
      wrong("encodings", name, "an encoding for its rows and columns", `${encoding} of [${shape}]`);
    }
  }
}

function isMatrix(name) {
  return MATRICES.has(name) || LAYER_MATRIX.test(name);
}

/**
 * The inputs and outputs of a shard's graph (SB-O-003).
 *
 * @returns {{inputs: object[], outputs: object[]}} each with name, dtype and shape
 */
export function graphPorts(shard, architecture) {
  const { hidden_size: width, vocab_size: vocab, layers, layer_kinds: kinds } = architecture;
  const compute = shard.graph.variant === "float16" ? "float16" : "float32";
  const port = (name, dtype, ...shape) => ({ name, dtype, shape });
  const caches = (suffix) => {
    const ports = [];
    for (let layer = shard.layers[0]; layer < shard.layers[1]; layer++) {
      const { attention } = kinds[layers[layer]];
      const { kv_heads: heads, head_dim: keyDim, value_dim: valueDim = keyDim } = attention;
      ports.push(port(`layers.${layer}.key${suffix}`, compute, "batch", heads, "slots", keyDim));
      ports.push(port(`layers.${layer}.value${suffix}`, compute, "batch", heads, "slots", valueDim));
    }
    return ports;
  };
  const hidden = (name) => port(name, "float32", "batch", "sequence", width);
  return {
    inputs: [
      shard.embeds ? port("token_ids", "int64", "batch", "sequence") : hidden("hidden"),
      port("past", "int64", "batch"),
      port("count", "int64", "batch"),
      ...(shard.head ? [port("selected", "int64", "selected")] : []),
      ...caches(""),
    ],
    outputs: [
      shard.head ? port("logits", "float32", "selected", vocab) : hidden("hidden.next"),
      ...caches(".next"),
    ],
  };
}

function checkGraphs({ shards, storage }, architecture, found) {
  const encodings = Object.values(storage.encodings ?? {});
  const blocks = encodings.some((name) => name.startsWith("blocks4"));
  const plain = [storage.dtype, ...Object.values(storage.exceptions)];
  const float16 = encodings.length === 0 && plain.every((name) => name === "float16");
  for (const [i, shard] of shards.entries()) {
    if (shard.graph === null) {
      continue;
    }
    const { opset, variant } = shard.graph;
    const wrong = (place, expected, got) => {
      found.add("manifest.graphs", `/shards/${i}/graph/${place}`, expected, got);
    };
    if (opset !== OPSET) {
      wrong("opset", String(OPSET), opset); // SB-O-002
    }
    if (variant === "float16" && !float16) {
      wrong("variant", "another one, unless all weights are float16", variant); // SB-O-017
    }
    if ((variant === "matmul_nbits") !== blocks) {
      wrong("variant", "matmul_nbits for weights of 4 bits alone", variant); // SB-O-020
    }
    checkPorts(shard, architecture, wrong);
  }
}

/** SB-O-003 */
function checkPorts(shard, architecture, wrong) {
  for (const [side, wanted] of Object.entries(graphPorts(shard, architecture))) {
    const own = shard.graph[side];
    const at = own.findIndex((port, k) => wanted[k] && !samePort(port, wanted[k]));
    if (at >= 0) {
      wrong(`${side}/${at}`, wanted[at].name, own[at].name);
    } else if (own.length !== wanted.length) {
      wrong(side, `${wanted.length} ${side}`, own.length);
    }
  }
}

function samePort(one, other) {
  return (
    one.name === other.name &&
    one.dtype === other.dtype &&
    one.shape.length === other.shape.length &&
    one.shape.every((size, i) => size === other.shape[i])
  );
}

/** SB-M-005 */
function checkParameters({ model }, tensors, found) {
  const all = tensors.units().reduce((sum, unit) => sum + tensors.parameters(unit), 0n);
  if (BigInt(model.parameters) !== all) {
    found.add("manifest.model", "/model/parameters", `${all}`, model.parameters);
  }
}

function checkCounts({ text, vectors }, { vocab_size: vocab, embedding }, found) {
  for (const [i, id] of text.stop_ids.entries()) {
    if (id >= vocab) {
      found.add("manifest.text", `/text/stop_ids/${i}`, `below ${vocab}`, id); // SB-M-062
    }
  }
  const { kind, count } = embedding.position;
  for (const [i, length] of (vectors?.lengths ?? []).entries()) {
    if (kind === "learned" && length > count) {
      found.add("manifest.vectors", `/vectors/lengths/${i}`, `at most ${count} tokens`, length); // SB-M-071
    }
  }
}

/** SB-M-089, SB-M-094 */
function checkExtensions({ requires, storage }, { layer_kinds: kinds }, found) {
  const encodings = Object.values(storage.encodings ?? {});
  const needed = new Set(encodings.map((name) => (name === "rows8" ? name : "blocks4")));
  for (const { attention, mlp, residual_scales: scales } of Object.values(kinds)) {
    const uses = {
      experts: mlp.kind === "experts",
      output_gate: attention.output_gate,
      value_dim: attention.value_dim !== undefined,
      value_multiplier: attention.value_multiplier !== undefined,
      residual_scales: scales,
      query_growth: attention.query_temperature?.growth,
      rotary_direction: attention.position.direction,
    };
    Object.entries(uses).forEach(([name, used]) => used && needed.add(name));
  }
  for (const name of needed) {
    if (!requires.includes(name)) {
      found.add("manifest.requires", "/requires", `the name ${name}`, "a list without it");
    }
  }
}

/**
 * The tensors of golden vectors, in order of use (SB-G-001).
 *
 * @returns {import("./logical_tensors.js").StoredTensor[]}
 */
export function vectorTensors({ lengths }, { layers, hidden_size: width, vocab_size: vocab }) {
  return lengths.flatMap((length, i) => [
    { name: `case.${i}.ids`, dtype: "I64", shape: [length], scale: false },
    ...Array.from({ length: layers.length + 1 }, (_, k) => {
      return { name: `case.${i}.hidden.${k}`, dtype: "F32", shape: [length, width], scale: false };
    }),
    { name: `case.${i}.logits`, dtype: "F32", shape: [vocab], scale: false },
  ]);
}

/** SB-M-053. Sums are exact (SB-M-096). */
function checkSizes({ files, units, vectors, storage }, tensors, found) {
  const seen = new Set();
  const wrong = (path, most) => {
    found.add("manifest.files", `/files/${escaped(path)}/size`, `at most ${most} bytes`, files[path].size);
  };
  const limit = (paths, stored) => {
    const data = stored.reduce((sum, tensor) => sum + exactByteLength(tensor), 0n);
    const most = data + LARGEST_HEADER * BigInt(paths.length);
    paths.forEach((path) => seen.add(path));
    if (sizeOf(paths, files) > most) {
      paths.forEach((path) => wrong(path, most));
    }
  };
  for (const unit of tensors.units()) {
    limit(units[unit].files, storedTensors(tensors.of(unit), storage));
  }
  if (vectors) {
    const stored = vectorTensors(vectors, tensors.architecture);
    for (const path of [vectors.file, vectors.original].filter((each) => each !== undefined)) {
      limit([path], stored);
    }
  }
  for (const [path, { size }] of Object.entries(files)) {
    if (!seen.has(path) && size > LARGEST_OTHER) {
      wrong(path, LARGEST_OTHER);
    }
  }
}

function sizeOf(paths, files) {
  return paths.reduce((sum, path) => sum + BigInt(files[path].size), 0n);
}

function checkTotals({ shards, units, files }, tensors, found) {
  const parameters = new Map(tensors.units().map((unit) => [unit, tensors.parameters(unit)]));
  for (const [i, shard] of shards.entries()) {
    const paths = shard.units.flatMap((unit) => units[unit].files);
    const bytes = sizeOf(paths, files);
    if (BigInt(shard.bytes) !== bytes) {
      found.add("manifest.shards", `/shards/${i}/bytes`, `${bytes}`, shard.bytes); // SB-M-027
    }
    const own = shard.units.reduce((sum, unit) => sum + parameters.get(unit), 0n);
    if (BigInt(shard.parameters) !== own) {
      found.add("manifest.shards", `/shards/${i}/parameters`, `${own}`, shard.parameters); // SB-M-028
    }
  }
}

function checkIds({ model, files, units }, found) {
  const architecture = `sha256:${files["architecture.json"].sha256}`;
  if (model.architecture !== architecture) {
    found.add("manifest.ids", "/model/architecture", architecture, model.architecture); // SB-I-002
  }
  const paths = ["architecture.json", ...Object.values(units).flatMap((unit) => unit.files)].sort(byBytes);
  const lines = paths.map((path) => `${files[path].sha256}  ${path}\n`).join("");
  const fingerprint = `sha256:${sha256(new TextEncoder().encode(lines))}`;
  if (model.fingerprint !== fingerprint) {
    found.add("manifest.ids", "/model/fingerprint", fingerprint, model.fingerprint); // SB-I-003
  }
}
