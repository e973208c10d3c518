// Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909): a word becomes tokens by merging pairs, by
// their ranks.

import { refuse } from "../../wire/refusal.js";
import { otherKind } from "./steps.js";

const MOST_KEPT = 20_000;
const LONGEST_KEPT = 64;
/**
 * A pair of ids as one number. An id is below 2^31, so only smaller ones fit exactly; larger ones are
 * refused.
 */
const RADIX = 2 ** 26;

/** The model of a tokenizer.json. */
export class BytePairs {
  /**
   * @param {object} model the member `model` of a tokenizer.json
   * @param {string} file for refusals
   * @throws {BundleError} `text.tokenizer` for a model of another kind
   */
  constructor(model, file) {
    const kind = model.type ?? (Array.isArray(model.merges) ? "BPE" : "none");
    if (kind !== "BPE") otherKind(file, "model", ["BPE"], kind);
    for (const name of ["continuing_subword_prefix", "end_of_word_suffix", "unk_token"]) {
      if (model[name]) otherKind(file, "model", [`BPE without ${name}`], JSON.stringify(model[name]));
    }
    if (model.byte_fallback === true) otherKind(file, "model", ["BPE over bytes"], "BPE with byte_fallback");
    this.ids = new Map(Object.entries(model.vocab));
    this.wholeFirst = model.ignore_merges === true;
    this.merges = new Map();
    for (const [rank, merge] of model.merges.entries()) {
      const [left, right] = typeof merge === "string" ? merge.split(" ") : merge;
      const [one, other, both] = [this.ids.get(left), this.ids.get(right), this.ids.get(left + right)];
      if (one === undefined || other === undefined || both === undefined || Math.max(one, other) >= RADIX) {
        refuse("text.tokenizer", file, "merges of tokens of the vocabulary", `merge ${rank}`);
      }
      this.merges.set(one * RADIX + other, { rank, both }); // a pair that comes again has its later rank
    }
    this.known = new Map();
  }

  /**
   * Return the ids of a word.
   *
   * @param {string} word in characters that stand for bytes
   * @throws {BundleError} `text.token` if the vocabulary lacks one of the bytes: all of a text is encoded
   *   (SB-T-002)
   */
  encode(word) {
    const before = this.known.get(word);
    if (before !== undefined) return before;
    const whole = this.wholeFirst ? this.ids.get(word) : undefined;
    const found = whole === undefined ? this.merged(word) : [whole];
    if (word.length <= LONGEST_KEPT) {
      if (this.known.size >= MOST_KEPT) this.known.clear();
      this.known.set(word, found);
    }
    return found;
  }

  merged(word) {
    const ids = Array.from(word, (character) => this.ids.get(character));
    if (ids.includes(undefined)) {
      refuse("text.token", "text", "bytes that the vocabulary has", "a byte that it lacks");
    }
    // A chain of tokens: each knows the one before and the one after. A merge takes the second out.
    const before = ids.map((_, i) => i - 1);
    const after = ids.map((_, i) => i + 1);
    const queue = new Queue();
    const offer = (at) => {
      const next = after[at];
      if (at < 0 || next >= ids.length) return;
      const merge = this.merges.get(ids[at] * RADIX + ids[next]);
      if (merge !== undefined) queue.push({ ...merge, at, left: ids[at], right: ids[next] });
    };
    for (let i = 0; i + 1 < ids.length; i += 1) offer(i);
    for (let best = queue.pop(); best !== undefined; best = queue.pop()) {
      const { at, left, right, both } = best;
      const next = after[at];
      // It was merged in another way.
      if (ids[at] !== left || next >= ids.length || ids[next] !== right) continue;
      ids[at] = both;
      ids[next] = null;
      after[at] = after[next];
      if (after[at] < ids.length) before[after[at]] = at;
      offer(before[at]);
      offer(at);
    }
    return ids.filter((id) => id !== null);
  }
}

/** A heap of merges: the lowest rank comes first, and among equals the leftmost. */
class Queue {
  constructor() {
    this.items = [];
  }

  push(item) {
    const { items } = this;
    let at = items.length;
    items.push(item);
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!isSooner(item, items[parent])) break;
      items[at] = items[parent];
      at = parent;
    }
    items[at] = item;
  }

  pop() {
    const { items } = this;
    const first = items[0];
    const last = items.pop();
    if (items.length === 0) return first;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= items.length) break;
      if (child + 1 < items.length && isSooner(items[child + 1], items[child])) child += 1;
      if (!isSooner(items[child], last)) break;
      items[at] = items[child];
      at = child;
    }
    items[at] = last;
    return first;
  }
}

const isSooner = (one, other) => one.rank < other.rank || (one.rank === other.rank && one.at < other.at);
