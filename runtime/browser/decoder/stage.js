/**
 * A stage: any range of layers, with the embedding before or the head after it, ready to compute
 * (decoder.md).
 */

import { Cache } from "./cache.js";
import { Layer } from "./layer.js";
import { capped, linear, makeNorm } from "./linear.js";
import { sinusoid } from "./positions.js";
import { loadWeights } from "./weights.js";
import { refuse } from "../reader/problems.js";

/**
 * Numbers of a batch: `data` is (rows, sequence, width), and zero at padding.
 *
 * @typedef {{data: Float32Array, shape: [number, number, number]}} Batch
 */

export class Stage {
  /**
   * Load a range of layers. It embeds if it begins at 0, and has the head if it ends at the last layer. A
   * shard without the embedding may begin at 0 too, so both can be said.
   *
   * @param {import("../reader/bundle.js").Bundle} bundle
   * @param {{start: number, stop: number, embeds?: boolean, head?: boolean}} range
   * @returns {Promise<Stage>}
   * @throws {BundleError} stage.range, file.*, weights.*
   */
  static async load(bundle, range) {
    const { architecture, logicalTensors } = bundle;
    const { start, stop, embeds = start === 0, head = stop === architecture.layers.length } = range;
    const whole = Number.isInteger(start) && Number.isInteger(stop) && start >= 0 && start <= stop;
    const ends = whole && (!embeds || start === 0) && (!head || stop === architecture.layers.length);
    if (!ends || stop > architecture.layers.length || (start === stop && !embeds && !head)) {
      refuse("stage.range", null, `layers of ${architecture.layers.length}`, `${start} to ${stop}`);
    }
    const units = [];
    if (embeds || (head && architecture.head.tied)) {
      units.push("embedding");
    }
    for (let layer = start; layer < stop; layer++) {
      units.push(logicalTensors.layerUnit(layer));
    }
    if (head) {
      units.push("head");
    }
    return new Stage(architecture, { start, stop, embeds, head }, await loadWeights(bundle, units));
  }

  /**
   * Load a shard of the manifest.
   *
   * @param {import("../reader/bundle.js").Bundle} bundle
   * @param {string} name
   * @returns {Promise<Stage>}
   */
  static loadShard(bundle, name) {
    const { layers, embeds, head } = bundle.shard(name);
    return Stage.load(bundle, { start: layers[0], stop: layers[1], embeds, head });
  }

  /** Use `load`. */
  constructor(architecture, range, weights) {
    this.architecture = architecture;
    this.range = range;
    this.weights = weights;
    const names = architecture.layers.slice(range.start, range.stop);
    const kinds = names.map((name) => architecture.layer_kinds[name]);
    this.layers = kinds.map((kind, i) => new Layer(kind, range.start + i, weights));
    this.attentions = kinds.map((kind) => kind.attention);
    const { embedding, head } = architecture;
    const norm = (there, own, name) => (there && own ? makeNorm(own, name, weights) : null);
    this.embeddingNorm = norm(range.embeds, embedding.norm, "embedding.norm");
    this.headNorm = norm(range.head, head.norm, "head.norm");
  }

  /**
   * An empty cache for this stage.
   *
   * @param {{rows: number, slots: number}} size
   * @returns {Cache}
   */
  newCache(size) {
    return new Cache(this.attentions, size);
  }

  /**
   * Compute one call.
   *
   * @param {object} call
   * @param {ArrayLike<number>[]} [call.tokenIds] a row of ids each, if the stage embeds; ids after `count`
   *   are padding
   * @param {Batch} [call.hidden] if it doesn't
   * @param {ArrayLike<number>} [call.past] the positions behind each row; 0 by default
   * @param {ArrayLike<number>} [call.count] the tokens of each row; by default all
   * @param {Cache} [call.cache] of this stage; without one, nothing can stand behind a row
   * @param {boolean} [call.last] logits of the last token of each row alone, as a sequence of one
   * @returns {{hidden: Batch} | {logits: Batch}}
   * @throws {BundleError} input.*, session.*; the cache is then as it was (SB-B-011)
   */
  run({ tokenIds, hidden, past, count, cache, last = false }) {
    const call = this.judge({ tokenIds, hidden, past, count });
    const own = cache ?? this.newCache({ rows: call.rows, slots: Math.max(...call.count) });
    own.check(call.past, call.count);
    const tokens = flat(call);
    let x = this.range.embeds ? this.embed(tokenIds, tokens) : gather(hidden, tokens);
    for (const [i, layer] of this.layers.entries()) {
      x = tokens.total ? layer.apply(x, tokens, own.layers[i]) : x;
    }
    own.lengths.set(tokens.lengths);
    return this.range.head ? { logits: this.logits(x, tokens, last) } : { hidden: scatter(x, tokens) };
  }

  /** Refuse what can't be computed (SB-B-001, SB-B-002, SB-B-012). */
  judge({ tokenIds, hidden, past, count }) {
    const width = this.architecture.hidden_size;
    let rows;
    let sequence;
    if (this.range.embeds) {
      rows = tokenIds?.length ?? 0;
      sequence = Math.max(0, ...Array.from(tokenIds ?? [], (row) => row.length));
    } else {
      [rows, sequence] = hidden?.shape ?? [0, 0];
      if (hidden?.shape[2] !== width || hidden.data.length !== rows * sequence * width) {
        refuse("input.shape", null, `hidden states (rows, sequence, ${width})`, String(hidden?.shape));
      }
    }
    if (!rows || !sequence) {
      refuse("input.shape", null, "at least one row and one place", `${rows} rows of ${sequence}`);
    }
    const all = Array.from({ length: rows }, (_, b) => tokenIds?.[b].length ?? sequence);
    const counts = Array.from(count ?? all);
    const before = Array.from(past ?? new Int32Array(rows));
    if (counts.length !== rows || before.length !== rows) {
      refuse("input.shape", null, `past and count of ${rows} rows`, `${before.length} and ${counts.length}`);
    }
    for (let b = 0; b < rows; b++) {
      const most = tokenIds ? tokenIds[b].length : sequence;
      if (!Number.isInteger(counts[b]) || counts[b] < 0 || counts[b] > most) {
        refuse("input.value", null, `a count from 0 to ${most} of row ${b}`, counts[b]);
      }
      if (!Number.isInteger(before[b]) || before[b] < 0) {
        refuse("input.value", null, `a past from 0 of row ${b}`, before[b]);
      }
      this.judgeIds(tokenIds?.[b], before[b], counts[b]);
    }
    return { rows, sequence, past: before, count: counts };
  }

  judgeIds(ids, past, count) {
    const { vocab_size: vocabulary, embedding } = this.architecture;
    if (!this.range.embeds) {
      return;
    }
    for (let i = 0; i < count; i++) {
      if (!Number.isInteger(ids[i]) || ids[i] < 0 || ids[i] >= vocabulary) {
        refuse("input.value", null, `a token id from 0 to ${vocabulary - 1}`, ids[i]);
      }
    }
    const { kind, count: positions } = embedding.position;
    if (kind === "learned" && past + count > positions) {
      refuse("input.position", null, `at most ${positions} positions`, past + count);
    }
  }

  /** SB-C-003: (tokens, hidden) */
  embed(tokenIds, tokens) {
    const { hidden_size: width, embedding } = this.architecture;
    const { multiplier, position, token_size: size } = embedding;
    const table = this.weights.get("embedding.token.weight");
    let x = new Float32Array(tokens.total * size);
    for (let token = 0; token < tokens.total; token++) {
      const row = table.row(tokenIds[tokens.rows[token]][tokens.places[token]]);
      for (let i = 0; i < size; i++) {
        x[token * size + i] = multiplier * row[i];
      }
    }
    if (size !== width) {
      x = linear(this.weights.get("embedding.projection.weight"), x, tokens.total);
    }
    for (let token = 0; position.kind !== "none" && token < tokens.total; token++) {
      const at = tokens.positions[token] + position.offset;
      const learned = position.kind === "learned";
      const own = learned ? this.weights.get("embedding.position.weight").row(at) : sinusoid(at, width);
      for (let i = 0; i < width; i++) {
        x[token * width + i] += own[i];
      }
    }
    return this.embeddingNorm ? this.embeddingNorm(x, width) : x;
  }

  /** SB-C-017: (tokens, hidden) -> (rows, sequence, vocab), or (rows, 1, vocab) */
  logits(x, tokens, last) {
    const { hidden_size: width, vocab_size: vocabulary, embedding, head } = this.architecture;
    const chosen = last ? lastTokens(tokens) : tokens;
    let own = last ? selected(x, chosen.from, width) : x;
    own = this.headNorm ? this.headNorm(own, width) : own;
    if (embedding.token_size !== width) {
      own = linear(this.weights.get("head.narrowing.weight"), own, chosen.total);
    }
    const table = this.weights.get(head.tied ? "embedding.token.weight" : "head.projection.weight");
    own = linear(table, own, chosen.total, { bias: this.weights.get("head.projection.bias") });
    for (let i = 0; head.multiplier !== 1 && i < own.length; i++) {
      own[i] *= head.multiplier;
    }
    return scatter(capped(own, head.logit_cap), chosen, vocabulary);
  }
}

/** The tokens of a call without padding. */
function flat({ rows, sequence, past, count }) {
  const total = count.reduce((sum, own) => sum + own, 0);
  const tokens = {
    total,
    shape: [rows, sequence],
    rows: new Int32Array(total),
    places: new Int32Array(total),
    positions: new Int32Array(total),
    lengths: Int32Array.from(past, (own, b) => own + count[b]),
  };
  let token = 0;
  for (let b = 0; b < rows; b++) {
    for (let i = 0; i < count[b]; i++, token++) {
      tokens.rows[token] = b;
      tokens.places[token] = i;
      tokens.positions[token] = past[b] + i;
    }
  }
  return tokens;
}

/** The last token of each row that has one, and where it stood among all tokens. */
function lastTokens({ total, rows, shape }) {
  const from = [...rows.keys()].filter((token) => token === total - 1 || rows[token + 1] !== rows[token]);
  const own = Int32Array.from(from, (token) => rows[token]);
  return { total: from.length, from, shape: [shape[0], 1], rows: own, places: new Int32Array(from.length) };
}

function selected(x, tokens, width) {
  const result = new Float32Array(tokens.length * width);
  tokens.forEach((token, i) => result.set(x.subarray(token * width, (token + 1) * width), i * width));
  return result;
}

/** A batch without its padding: (tokens, width) */
function gather({ data, shape: [, sequence, width] }, { total, rows, places }) {
  const from = Array.from({ length: total }, (_, token) => rows[token] * sequence + places[token]);
  return selected(data, from, width);
}

/** A batch with zeros at padding (SB-B-003). */
function scatter(x, { total, shape: [rowCount, sequence], rows, places }, width = x.length / total) {
  const data = new Float32Array(rowCount * sequence * width);
  for (let token = 0; token < total; token++) {
    const place = rows[token] * sequence + places[token];
    data.set(x.subarray(token * width, (token + 1) * width), place * width);
  }
  return { data, shape: [rowCount, sequence, width] };
}
