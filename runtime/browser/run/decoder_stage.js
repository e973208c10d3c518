// A stage that the own decoder computes: it needs no library and no graph, and is slower than onnxruntime-
// web.

import { Stage } from "../decoder/stage.js";
import { refuse } from "../wire/refusal.js";

const FIRST_SLOTS = 128;

/** A shard, loaded with its weights as they are stored. */
export class DecoderStage {
  /**
   * Load a shard.
   *
   * @param {object} bundle what `openHeld` returns, so that every byte was hashed before
   * @param {string} name the shard
   * @throws {BundleError} what loading throws
   */
  static async load(bundle, name) {
    return new DecoderStage(await Stage.loadShard(bundle, name), bundle.shard(name), bundle.architecture);
  }

  constructor(stage, shard, architecture) {
    this.stage = stage;
    this.name = shard.name;
    this.layers = shard.layers;
    this.embeds = shard.embeds;
    this.head = shard.head;
    this.variant = null; // of a graph, and there is none
    this.width = architecture.hidden_size;
  }

  /** Begin a cache of one row. */
  begin() {
    return new DecoderSession(this);
  }

  /** There is nothing to free: the browser takes back what nobody holds. */
  async release() {}
}

/** The KV cache of one row. */
export class DecoderSession {
  constructor(owner) {
    this.owner = owner;
    this.cache = null;
  }

  /**
   * Compute the stage for some tokens. Arguments and results are those of `OrtSession.run`.
   *
   * @param {{ids?: ArrayLike<number>, hidden?: Float32Array, past: number, count: number, wanted?: boolean}}
   *   call
   * @returns {Promise<{hidden?: Float32Array, logits?: Float32Array}>}
   * @throws {BundleError} `input.position`, `input.value`
   */
  async run({ ids, hidden, past, count, wanted = true }) {
    const { stage, embeds, head, width } = this.owner;
    const held = this.cache?.lengths[0] ?? 0;
    if (past > held) refuse("input.position", "past", `at most ${held}`, String(past));
    this.grow(past + count);
    const given = embeds ? { tokenIds: [ids] } : { hidden: { data: hidden, shape: [1, count, width] } };
    const found = stage.run({ ...given, past: [past], count: [count], cache: this.cache, last: true });
    return head ? { logits: wanted ? found.logits.data : undefined } : { hidden: found.hidden.data };
  }

  /** Make room for so many slots. A cache doubles, so that it is seldom copied. */
  grow(slots) {
    const before = this.cache;
    if (before !== null && slots <= before.slots) return;
    const made = this.owner.stage.newCache(
      { rows: 1, slots: Math.max(FIRST_SLOTS, slots, 2 * (before?.slots ?? 0)) },
    );
    for (const [i, layer] of (before?.layers ?? []).entries()) {
      for (const [name, size] of [["keys", layer.keyDim], ["values", layer.valueDim]]) {
        for (let head = 0; head < layer.heads; head += 1) {
          const own = layer[name].subarray(head * layer.slots * size, (head + 1) * layer.slots * size);
          made.layers[i][name].set(own, head * made.layers[i].slots * size);
        }
      }
    }
    if (before !== null) made.lengths.set(before.lengths);
    this.cache = made;
  }

  /** Forget everything. */
  async end() {
    this.cache = null;
  }
}
