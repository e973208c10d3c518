/** The files for onnxruntime-genai (SB-O-018), which loads everything that its configuration names. */

import { Fraction, parseJson } from "./json.js";
import { judgeModel } from "./onnx_graph.js";
import { escaped, refuse } from "./problems.js";

const CONFIG = "genai_config.json";
const INPUTS = "genai.inputs.onnx";
const LOGITS = "genai.logits.onnx";
const ALL = [CONFIG, INPUTS, LOGITS];
const MOST_POSITIONS = 1_048_576;

/**
 * Judge these files, if any of them is listed.
 *
 * @param {import("./bundle.js").Bundle} bundle all of whose files are there
 * @throws {BundleError} genai.config, graph.*, json.*
 */
export async function checkGenai(bundle) {
  const { files, shards, text } = bundle.manifest;
  if (!ALL.some((path) => path in files)) {
    return;
  }
  const complete = ALL.every((path) => path in files) && shards.every((shard) => shard.graph !== null);
  if (!complete || text.stop_ids.length === 0) {
    const expected = `${ALL.join(", ")} together, a graph for each shard, and a stop id`;
    refuse("genai.config", CONFIG, expected, "fewer", { pointer: "" });
  }
  const ports = genaiPorts(bundle.architecture.vocab_size);
  for (const path of [INPUTS, LOGITS]) {
    judgeModel(await bundle.bytes(path), path, { ports: ports[path], tensors: [], products: false });
  }
  const config = parseJson(await bundle.bytes(CONFIG), CONFIG);
  const wrong = (pointer, expected, got) => refuse("genai.config", CONFIG, expected, got, { pointer });
  if (!(config instanceof Map)) {
    wrong("", "an object", config);
  }
  compareKeys(config, ["model", "search"], "", wrong);
  const search = config.get("search");
  if (!(search instanceof Map)) {
    wrong("/search", "an object", search);
  }
  for (const [name, value] of search) {
    const plain = typeof value === "number" || typeof value === "boolean" || value instanceof Fraction;
    if (!plain) {
      wrong(`/search/${escaped(name)}`, "a number or a boolean", value);
    }
  }
  compare(config.get("model"), wantedModel(bundle, ports), "/model", wrong);
}

function genaiPorts(vocabulary) {
  const port = (name, dtype, ...shape) => ({ name, dtype, shape });
  return {
    [INPUTS]: {
      inputs: [
        port("token_ids", "int64", "batch", "sequence"),
        port("attention_mask", "int64", "batch", "total"),
      ],
      outputs: ["past", "count", "selected"].map((name) => port(name, "int64", "batch")),
    },
    [LOGITS]: {
      inputs: [port("logits", "float32", "batch", vocabulary)],
      outputs: [port("genai.logits", "float32", "batch", 1, vocabulary)],
    },
  };
}

/** The member `model` that the bundle's other documents imply. */
function wantedModel({ manifest, architecture }, ports) {
  const { text, storage, shards } = manifest;
  const { position } = architecture.embedding;
  const { attention } = architecture.layer_kinds[architecture.layers[0]];
  const positions = position.kind === "learned" ? position.count : null;
  const directory = text.tokenizer === null ? null : text.tokenizer.split("/").slice(0, -1).join("/");
  const stage = (filename, own, more = {}) => ({ filename, ...own, ...more });
  const names = ({ inputs, outputs }) => ({
    inputs: inputs.map((port) => port.name),
    outputs: outputs.map((port) => port.name),
  });
  const forwarder = { output_names_forwarder: { "hidden.next": "hidden" } };
  return {
    type: "decoder-pipeline",
    ...(directory === null ? {} : { tokenizer_dir: directory }),
    eos_token_id: text.stop_ids,
    pad_token_id: text.stop_ids[0],
    vocab_size: architecture.vocab_size,
    context_length: positions ?? manifest.model.context_length ?? MOST_POSITIONS,
    decoder: {
      session_options: {
        "session.disable_prepacking": storage.encodings ? "0" : "1",
        "session.intra_op.allow_spinning": "0",
        provider_options: [],
      },
      hidden_size: architecture.hidden_size,
      num_hidden_layers: architecture.layers.length,
      num_attention_heads: attention.heads,
      num_key_value_heads: attention.kv_heads,
      head_size: attention.head_dim,
      inputs: {
        input_ids: "token_ids",
        attention_mask: "attention_mask",
        past_key_names: "layers.%d.key",
        past_value_names: "layers.%d.value",
      },
      outputs: {
        logits: "genai.logits",
        present_key_names: "layers.%d.key.next",
        present_value_names: "layers.%d.value.next",
      },
      pipeline: [
        { "genai.inputs": stage(INPUTS, names(ports[INPUTS])) },
        ...shards.map((shard) => ({
          [shard.name]: stage(shard.graph.file, names(shard.graph), shard.head ? {} : forwarder),
        })),
        { "genai.logits": stage(LOGITS, names(ports[LOGITS])) },
      ],
    },
  };
}

/** Compare a parsed value with plain data, member by member. */
function compare(own, wanted, pointer, wrong) {
  if (Array.isArray(wanted)) {
    if (!Array.isArray(own) || own.length !== wanted.length) {
      wrong(pointer, `an array of ${wanted.length}`, own);
    }
    wanted.forEach((value, i) => compare(own[i], value, `${pointer}/${i}`, wrong));
  } else if (typeof wanted === "object") {
    if (!(own instanceof Map)) {
      wrong(pointer, "an object", own);
    }
    compareKeys(own, Object.keys(wanted), pointer, wrong);
    for (const [key, value] of Object.entries(wanted)) {
      compare(own.get(key), value, `${pointer}/${escaped(key)}`, wrong);
    }
  } else if (own !== wanted) {
    wrong(pointer, String(wanted), own);
  }
}

function compareKeys(own, keys, pointer, wrong) {
  const missing = keys.find((key) => !own.has(key));
  if (missing !== undefined) {
    wrong(pointer, `the member ${missing}`, "an object without it");
  }
  const more = [...own.keys()].find((key) => !keys.includes(key));
  if (more !== undefined) {
    wrong(`${pointer}/${escaped(more)}`, "no such member", more);
  }
}
