// A stage that onnxruntime-web computes, by the graph of a shard (spec/v1/bundle.md, section "Graphs").

import { refuse } from "../wire/refusal.js";

const FIRST_SLOTS = 128;
/** It would warn of each cache that it copies, at each step. */
const QUIET = { logSeverityLevel: 3 };

/** A shard's graph, loaded with its weights. */
export class OrtStage {
  /**
   * Load a shard. Its graph is judged, and onnxruntime gets only bytes that were read and hashed before
   * (SB-D-011).
   *
   * @param {object} ort the module onnxruntime-web
   * @param {object} bundle what `openHeld` returns
   * @param {string} name the shard
   * @throws {BundleError} `stage.graph` for a shard without a graph; what `loadStage` and `bytes` of the
   *   bundle throw
   */
  static async load(ort, bundle, name) {
    const shard = bundle.manifest.shards.find((each) => each.name === name);
    if (shard === undefined) refuse("stage.name", "shard", "a shard of the bundle", name);
    if (shard.graph === null) {
      refuse("stage.graph", name, "a shard with a graph", "one without", "splitbundle add-onnx adds graphs");
    }
    await bundle.loadStage(name);
    const graph = await bundle.bytes(shard.graph.file);
    const externalData = [];
    for (const path of shard.units.flatMap((unit) => bundle.manifest.units[unit].files)) {
      externalData.push({ path, data: await bundle.bytes(path) });
    }
    const options = {
      executionProviders: ["wasm"], graphOptimizationLevel: "all", logSeverityLevel: 3, externalData,
    };
    const session = await ort.InferenceSession.create(graph, options);
    return new OrtStage(ort, session, shard, bundle.architecture);
  }

  constructor(ort, session, shard, architecture) {
    this.ort = ort;
    this.session = session;
    this.name = shard.name;
    this.layers = shard.layers;
    this.embeds = shard.embeds;
    this.head = shard.head;
    this.variant = shard.graph.variant;
    this.width = architecture.hidden_size;
    this.vocabulary = architecture.vocab_size;
    this.caches = shard.graph.inputs.filter((each) => each.shape.includes("slots"));
  }

  /** Begin a cache of one row. */
  begin() {
    return new OrtSession(this);
  }

  /** Free the memory of the weights. */
  async release() {
    await this.session.release();
  }
}

/** The KV cache of one row. */
export class OrtSession {
  constructor(stage) {
    this.stage = stage;
    this.slots = 0;
    this.held = 0;
    this.tensors = {};
  }

  /**
   * Compute the stage for some tokens.
   *
   * @param {object} call
   * @param {ArrayLike<number>} [call.ids] the token ids, if the stage embeds
   * @param {Float32Array} [call.hidden] (count, width), if it doesn't
   * @param {number} call.past the positions before; tokens from there on are forgotten first
   * @param {number} call.count the tokens of this call
   * @param {boolean} [call.wanted] whether the logits are wanted, if the stage has the head
   * @returns {Promise<{hidden?: Float32Array, logits?: Float32Array}>} the hidden states, (count, width); or
   *   the logits of the last token, (vocab), if they are wanted
   * @throws {BundleError} `input.position` for positions that nobody computed; `input.value` for a wrong id
   */
  async run({ ids, hidden, past, count, wanted = true }) {
    const { ort, session, embeds, head, width, vocabulary } = this.stage;
    if (past > this.held) refuse("input.position", "past", `at most ${this.held}`, String(past));
    this.grow(past + count);
    const whole = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [numbers.length]);
    const feeds = { past: whole([past]), count: whole([count]), ...this.tensors };
    if (embeds) {
      for (const id of ids) {
        if (!(id >= 0 && id < vocabulary)) {
          refuse("input.value", "ids", `ids below ${vocabulary}`, String(id));
        }
      }
      feeds.token_ids = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, count]);
    } else feeds.hidden = new ort.Tensor("float32", hidden, [1, count, width]);
    if (head) feeds.selected = whole(wanted ? [count - 1] : [0]);
    const found = await session.run(feeds, QUIET);
    for (const name of Object.keys(this.tensors)) this.tensors[name] = found[`${name}.next`];
    this.held = past + count;
    return head ? { logits: wanted ? found.logits.data : undefined } : { hidden: found["hidden.next"].data };
  }

  /** Make room for so many slots (SB-O-005). A cache doubles, so that it is seldom copied. */
  grow(slots) {
    if (slots <= this.slots) return;
    const size = Math.max(FIRST_SLOTS, this.slots * 2, slots);
    for (const { name, dtype, shape } of this.stage.caches) {
      this.tensors[name] = grown(this.stage.ort, this.tensors[name], dtype, shape, this.slots, size);
    }
    this.slots = size;
  }

  /** Forget everything. */
  async end() {
    this.tensors = {};
    this.slots = 0;
    this.held = 0;
  }
}

/** Return a cache with more slots: (1, heads, slots, size of a head). New slots hold zeros. */
function grown(ort, before, dtype, [, heads, , size], slots, more) {
  const made = emptyArray(dtype, heads * more * size);
  for (let head = 0; before !== undefined && head < heads; head += 1) {
    const own = before.data.subarray(head * slots * size, (head + 1) * slots * size);
    made.set(own, head * more * size);
  }
  return new ort.Tensor(dtype, made, [1, heads, more, size]);
}

/**
 * Return zeros. onnxruntime-web keeps float16 as numbers where the browser has them, and as their bits
 * elsewhere.
 */
function emptyArray(dtype, length) {
  if (dtype === "float32") return new Float32Array(length);
  return new (globalThis.Float16Array ?? Uint16Array)(length);
}
