/**
 * Self-attention over a cache (SB-C-008 to SB-C-010, SB-C-020 to SB-C-024, SB-C-032, SB-C-039 to SB-C-041).
 */

import { sigmoid, softplus } from "./activations.js";
import { linear, makeNorm } from "./linear.js";
import { frequencies, lengthThreshold, rotate, slopes } from "./positions.js";

const { fround } = Math;

/**
 * The tokens of one call, all rows together, without padding.
 *
 * @typedef {object} Tokens
 * @property {number} total
 * @property {Int32Array} rows the row of each token
 * @property {Int32Array} positions the position of each token
 * @property {Int32Array} lengths past + count of each row
 */

export class Attention {
  /**
   * @param {object} facts `layer_kinds.NAME.attention`
   * @param {string} name `layers.N.attention`
   * @param {Map<string, import("./weights.js").Matrix>} weights
   */
  constructor(facts, name, weights) {
    this.facts = facts;
    this.valueDim = facts.value_dim ?? facts.head_dim;
    const matrix = (part) => {
      return { weight: weights.get(`${name}.${part}.weight`), bias: weights.get(`${name}.${part}.bias`) };
    };
    for (const part of ["query", "key", "value", "gate", "output"]) {
      this[part] = matrix(part);
    }
    this.gateBias = weights.get(`${name}.gate_bias`)?.row(0).slice();
    this.sinks = weights.get(`${name}.sinks`)?.row(0).slice();
    if (facts.query_key_norm) {
      this.queryNorm = makeNorm(facts.query_key_norm.norm, `${name}.query_norm`, weights);
      this.keyNorm = makeNorm(facts.query_key_norm.norm, `${name}.key_norm`, weights);
    }
    if (facts.position.kind === "alibi") {
      this.slopes = slopes(facts.heads, facts.position.max_bias);
    }
    // Without scaling by length, all rows have the frequencies of one table.
    this.byLength = lengthThreshold(facts.position) !== null;
    this.table = facts.position.kind === "rotary" && !this.byLength ? frequencies(facts.position, 0) : null;
  }

  /**
   * *Shape:* (tokens, hidden) -> (tokens, hidden)
   *
   * @param {Float32Array} x
   * @param {Tokens} tokens
   * @param {import("./cache.js").LayerCache} cache gets the keys and values of these tokens
   * @returns {Float32Array}
   */
  apply(x, tokens, cache) {
    const { heads, kv_heads: kvHeads, value_multiplier: multiplier = 1 } = this.facts;
    const turned = this.rowFrequencies(tokens);
    const queries = this.prepared(this.query, heads, this.queryNorm, x, tokens, turned);
    const keys = this.prepared(this.key, kvHeads, this.keyNorm, x, tokens, turned);
    const values = this.clipped(project(this.value, x, tokens.total));
    if (multiplier !== 1) {
      values.forEach((value, i) => (values[i] = value * multiplier));
    }
    this.heat(queries, tokens);
    cache.write(tokens, keys, values);
    const mixed = this.mix(queries, tokens, cache);
    this.applyGate(mixed, x, tokens.total);
    return project(this.output, mixed, tokens.total);
  }

  rowFrequencies({ lengths }) {
    const { position } = this.facts;
    if (position.kind !== "rotary") {
      return null;
    }
    return Array.from(lengths, (length) => this.table ?? frequencies(position, length));
  }

  /** Queries or keys, but for the temperature (SB-C-008). */
  prepared(matrix, heads, norm, x, tokens, turned) {
    const { head_dim: headDim, position, query_key_norm: own } = this.facts;
    const size = own?.width === "full" ? heads * headDim : headDim;
    let result = this.clipped(project(matrix, x, tokens.total));
    if (own && !own.after_rotation) {
      result = norm(result, size);
    }
    const width = heads * headDim;
    for (let token = 0; turned && token < tokens.total; token++) {
      const one = result.subarray(token * width, (token + 1) * width);
      rotate(position, one, headDim, tokens.positions[token], turned[tokens.rows[token]]);
    }
    return own?.after_rotation ? norm(result, size) : result;
  }

  /** SB-C-020 */
  clipped(x) {
    const { clip } = this.facts;
    for (let i = 0; clip !== null && i < x.length; i++) {
      x[i] = Math.max(-clip, Math.min(clip, x[i]));
    }
    return x;
  }

  /** SB-C-022 */
  heat(queries, { total, positions }) {
    const { query_temperature: own, heads, head_dim: headDim } = this.facts;
    const width = heads * headDim;
    for (let token = 0; own && token < total; token++) {
      const quotient = (positions[token] + own.offset) / own.original_positions;
      const power = own.growth === "power";
      const grown = power ? (1 + quotient) ** own.beta : 1 + own.beta * Math.log1p(Math.floor(quotient));
      const factor = fround(grown);
      for (let i = token * width; i < (token + 1) * width; i++) {
        queries[i] *= factor;
      }
    }
  }

  /** SB-C-009: (tokens, heads, head_dim) -> (tokens, heads, value_dim) */
  mix(queries, { total, rows, positions }, cache) {
    const { heads, kv_heads: kvHeads, head_dim: headDim } = this.facts;
    const { valueDim } = this;
    const result = new Float32Array(total * heads * valueDim);
    for (let token = 0; token < total; token++) {
      const position = positions[token];
      const first = this.firstSeen(position);
      const scores = new Float64Array(position + 1 - first);
      for (let head = 0; head < heads; head++) {
        const shared = rows[token] * kvHeads + Math.floor(head / (heads / kvHeads));
        const query = (token * heads + head) * headDim;
        for (let j = first; j <= position; j++) {
          const key = (shared * cache.slots + j) * headDim;
          let sum = 0;
          for (let d = 0; d < headDim; d++) {
            sum += queries[query + d] * cache.keys[key + d];
          }
          scores[j - first] = this.score(sum, head, j - position);
        }
        softmax(scores, this.sinks?.[head]);
        const out = (token * heads + head) * valueDim;
        weighedSum(scores, cache.values, (shared * cache.slots + first) * valueDim, result, out, valueDim);
      }
    }
    return result;
  }

  /** The first position that a token sees. */
  firstSeen(position) {
    const { window, chunk } = this.facts;
    if (window !== null) {
      return Math.max(0, position - window + 1);
    }
    return chunk === null ? 0 : position - (position % chunk);
  }

  score(product, head, distance) {
    const { scale, logit_cap: cap, position } = this.facts;
    const scaled = scale * product;
    if (position.kind === "alibi") {
      return scaled + fround(position.multiplier * this.slopes[head] * distance); // SB-C-024
    }
    return cap === null ? scaled : cap * Math.tanh(scaled / cap); // SB-C-023
  }

  /** SB-C-039. Changes y. */
  applyGate(y, x, tokens) {
    const { output_gate: own, heads } = this.facts;
    if (!own) {
      return;
    }
    const factor = own.function === "sigmoid" ? sigmoid : softplus;
    const logits = linear(this.gate.weight, x, tokens);
    for (let i = 0; i < y.length; i++) {
      const head = Math.floor(i / this.valueDim);
      const logit = logits[own.width === "head" ? head : i];
      y[i] *= factor(logit + (this.gateBias ? this.gateBias[head % heads] : 0));
    }
  }
}

function project({ weight, bias }, x, tokens) {
  return linear(weight, x, tokens, { bias });
}

/** Scores to weights in place. With a sink (SB-C-032), one more term stands in the sum. */
function softmax(scores, sink) {
  let most = sink ?? -Infinity;
  for (let i = 0; i < scores.length; i++) {
    most = Math.max(most, scores[i]);
  }
  let sum = sink === undefined ? 0 : Math.exp(sink - most);
  for (let i = 0; i < scores.length; i++) {
    scores[i] = Math.exp(scores[i] - most);
    sum += scores[i];
  }
  for (let i = 0; i < scores.length; i++) {
    scores[i] /= sum;
  }
}

function weighedSum(weights, values, start, result, out, size) {
  const sums = new Float64Array(size);
  for (let j = 0, at = start; j < weights.length; j++) {
    for (let d = 0; d < size; d++, at++) {
      sums[d] += weights[j] * values[at];
    }
  }
  result.set(sums, out);
}
