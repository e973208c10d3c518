/** Keys and values of a stage's layers in slots (SB-B-008 to SB-B-011). */

import { lengthThreshold } from "./positions.js";
import { refuse } from "../reader/problems.js";

/**
 * The cache of one layer. `keys` is (rows, kv_heads, slots, head_dim), `values` (rows, kv_heads, slots,
 * value_dim).
 */
export class LayerCache {
  constructor({ kv_heads: heads, head_dim: keyDim, value_dim: valueDim = keyDim }, rows, slots) {
    this.heads = heads;
    this.slots = slots;
    this.keyDim = keyDim;
    this.valueDim = valueDim;
    this.keys = new Float32Array(rows * heads * slots * keyDim);
    this.values = new Float32Array(rows * heads * slots * valueDim);
  }

  /** Store the keys and values of tokens at their positions. */
  write({ total, rows, positions }, keys, values) {
    for (let token = 0; token < total; token++) {
      for (let head = 0; head < this.heads; head++) {
        const slot = (rows[token] * this.heads + head) * this.slots + positions[token];
        const from = token * this.heads + head;
        const { keyDim, valueDim } = this;
        this.keys.set(keys.subarray(from * keyDim, (from + 1) * keyDim), slot * keyDim);
        this.values.set(values.subarray(from * valueDim, (from + 1) * valueDim), slot * valueDim);
      }
    }
  }
}

/** The caches of all layers of a stage, and how many positions each row has. */
export class Cache {
  /**
   * @param {object[]} attentions the facts of each layer
   * @param {{rows: number, slots: number}} size
   */
  constructor(attentions, { rows, slots }) {
    this.rows = rows;
    this.slots = slots;
    this.lengths = new Int32Array(rows);
    this.layers = attentions.map((facts) => new LayerCache(facts, rows, slots));
    const thresholds = attentions.map((facts) => lengthThreshold(facts.position));
    this.thresholds = [...new Set(thresholds)].filter((own) => own !== null);
  }

  /**
   * Refuse a call that this cache can't take. Changes nothing.
   *
   * @param {ArrayLike<number>} past
   * @param {ArrayLike<number>} count
   * @throws {BundleError} input.cache, input.position, session.capacity, session.rollback
   */
  check(past, count) {
    if (past.length !== this.rows) {
      refuse("input.cache", null, `a cache of ${past.length} rows`, this.rows);
    }
    for (let row = 0; row < this.rows; row++) {
      const held = this.lengths[row];
      if (past[row] > held) {
        refuse("input.position", null, `at most ${held} positions before row ${row}`, past[row]); // SB-B-009
      }
      if (past[row] + count[row] > this.slots) {
        refuse("session.capacity", null, `at most ${this.slots} slots`, past[row] + count[row]); // SB-B-010
      }
      for (const threshold of this.thresholds) {
        if (past[row] >= 1 && past[row] <= threshold && held > threshold) {
          const expected = `0, or more than ${threshold} positions before row ${row}`;
          refuse("session.rollback", null, expected, past[row]); // SB-C-031
        }
      }
    }
  }
}
