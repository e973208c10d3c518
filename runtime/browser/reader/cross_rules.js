/** Rules that need both documents (SB-E-002, the last group). */

import { LogicalTensors, blockSize, byteLength, storedTensors } from "./logical_tensors.js";
import { byBytes } from "./paths.js";
import { Collector, escaped } from "./problems.js";
import { sha256 } from "./sha256.js";
import { checkSourceNames } from "./source_names.js";

const FILE = "manifest.json";
/** SB-M-053: a file's header and more, and the size of a file that isn't a weight file */
const LARGEST_HEADER = 33_554_432;
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
  checkUnits(manifest, tensors, found);
  found.close();
  checkLayers(manifest, tensors, found);
  checkWidths(manifest, architecture, found);
  checkStorage(manifest, tensors, found);
  found.close(); // sizes of quantized tensors need encodings that fit
  checkPorts(manifest, architecture, found);
  checkParameters(manifest, tensors, found);
  checkCounts(manifest, architecture, found);
  checkExtensions(manifest, architecture, found);
  checkSizes(manifest, tensors, found);
  found.close();
  checkTotals(manifest, tensors, found);
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

/** SB-M-023, SB-M-026 */
function checkLayers({ shards }, tensors, found) {
  const last = shards.length - 1;
  if (shards[last].layers[1] !== tensors.layers) {
    found.add("manifest.layers", `/shards/${last}/layers/1`, `${tensors.layers}`, shards[last].layers[1]);
    return;
  }
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

/** SB-M-032 */
function checkWidths({ boundaries }, { hidden_size: wanted }, found) {
  for (const [i, { tensors }] of boundaries.entries()) {
    const width = tensors.hidden.shape[2];
    if (width !== wanted) {
      found.add("manifest.boundaries", `/boundaries/${i}/tensors/hidden/shape/2`, `${wanted}`, width);
    }
  }
}

function checkStorage({ storage }, tensors, found) {
  const wrong = (pointer, expected, got) => found.add("manifest.storage", pointer, expected, got);
  for (const name of Object.keys(storage.exceptions)) {
    if (!tensors.shape(name)) {
      wrong("/storage/exceptions", "names of logical tensors", name); // SB-M-012
    }
  }
  for (const [name, encoding] of Object.entries(storage.encodings ?? {})) {
    const shape = tensors.shape(name);
    if (!shape || name in storage.exceptions || !(MATRICES.has(name) || LAYER_MATRIX.test(name))) {
      wrong("/storage/encodings", "names of matrices that aren't exceptions", name); // SB-M-092
      continue;
    }
    const [rows, columns] = shape.slice(-2);
    const fits =
      // SB-M-093
      encoding === "rows8" ? columns % 16 === 0 : columns % blockSize(encoding) === 0 && rows % 16 === 0;
    if (!fits) {
      const pointer = `/storage/encodings/${escaped(name)}`;
      wrong(pointer, "an encoding for its rows and columns", `${encoding} of [${shape}]`);
    }
  }
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

function checkPorts({ shards }, architecture, found) {
  for (const [i, shard] of shards.entries()) {
    if (shard.graph === null) {
      continue;
    }
    for (const [side, wanted] of Object.entries(graphPorts(shard, architecture))) {
      const own = shard.graph[side];
      const pointer = `/shards/${i}/graph/${side}`;
      const at = wanted.findIndex((port, k) => !own[k] || !samePort(port, own[k]));
      if (at >= 0) {
        found.add("manifest.graphs", `${pointer}/${at}`, wanted[at].name, own[at]?.name ?? "nothing");
      } else if (own.length !== wanted.length) {
        found.add("manifest.graphs", pointer, `${wanted.length} ${side}`, own.length);
      }
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

/** SB-M-089 */
function checkExtensions({ requires }, { layer_kinds: kinds }, found) {
  const needed = new Set();
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

/** SB-M-053 */
function checkSizes({ files, units, vectors, storage }, tensors, found) {
  const seen = new Set();
  const limit = (paths, data) => {
    paths.forEach((path) => seen.add(path));
    const size = paths.reduce((sum, path) => sum + files[path].size, 0);
    const most = data + LARGEST_HEADER * paths.length;
    if (size > most) {
      const largest = paths.reduce((one, other) => (files[other].size > files[one].size ? other : one));
      found.add("manifest.files", `/files/${escaped(largest)}/size`, `at most ${most} bytes`, size);
    }
  };
  const sum = (stored) => stored.reduce((total, tensor) => total + byteLength(tensor), 0);
  for (const unit of tensors.units()) {
    limit(units[unit].files, sum(storedTensors(tensors.of(unit), storage)));
  }
  if (vectors) {
    const data = sum(vectorTensors(vectors, tensors.architecture));
    limit([vectors.file], data);
    if (vectors.original !== undefined) {
      limit([vectors.original], data);
    }
  }
  for (const [path, { size }] of Object.entries(files)) {
    if (!seen.has(path) && size > LARGEST_OTHER) {
      found.add("manifest.files", `/files/${escaped(path)}/size`, `at most ${LARGEST_OTHER} bytes`, size);
    }
  }
}

function checkTotals({ shards, units, files }, tensors, found) {
  const parameters = new Map(tensors.units().map((unit) => [unit, tensors.parameters(unit)]));
  for (const [i, shard] of shards.entries()) {
    const paths = shard.units.flatMap((unit) => units[unit].files);
    const bytes = paths.reduce((sum, path) => sum + files[path].size, 0);
    if (shard.bytes !== bytes) {
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
