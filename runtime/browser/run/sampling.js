// Choose the next token from logits. The rules are those of the Python runtime.

import { refuse } from "../wire/refusal.js";
import { Random } from "./random.js";

/**
 * @typedef {object} Sampling
 * @property {number} [temperature] 0 takes the likeliest token, and the lowest id among equals
 * @property {number | null} [topK] draw only among so many of the likeliest tokens
 * @property {number | null} [topP] draw only among the likeliest tokens that reach this probability
 * @property {number | null} [seed] an integer; by default one that nobody knows
 */

/** What draws the tokens of one text. */
export class Sampler {
  /**
   * @param {Sampling} sampling
   * @throws {BundleError} `input.value`
   */
  constructor({ temperature = 0, topK = null, topP = null, seed = null } = {}) {
    const fits = (name, value, good, expected) =>
      good || refuse("input.value", name, expected, String(value));
    fits("temperature", temperature, temperature >= 0 && temperature < Infinity, "a number from 0");
    fits("topK", topK, topK === null || (Number.isInteger(topK) && topK >= 1), "an integer from 1, or null");
    fits("topP", topP, topP === null || (topP > 0 && topP <= 1), "a number above 0, up to 1, or null");
    fits("seed", seed, seed === null || Number.isSafeInteger(seed), "an integer, or null");
    this.temperature = temperature;
    this.topK = topK;
    this.topP = topP;
    this.random = temperature === 0 ? null : new Random(seed ?? anySeed());
  }

  /**
   * Return the id of the next token.
   *
   * @param {Float32Array} logits (vocab)
   * @throws {BundleError} `input.value` for logits that are NaN, or whose largest is infinite
   */
  draw(logits) {
    const likeliest = largestOf(logits);
    return this.temperature === 0 ? likeliest : this.among(logits, logits[likeliest]);
  }

  /** Draw the first token whose cumulative probability exceeds a uniform share of the total that is kept. */
  among(logits, largest) {
    const powers = Float64Array.from(logits, (each) => Math.exp((each - largest) / this.temperature));
    // Equal probabilities keep the order of their ids: the sort is stable.
    const ids = Uint32Array.from(powers.keys()).sort((one, other) => powers[other] - powers[one]);
    let kept = Math.min(this.topK ?? ids.length, ids.length);
    if (this.topP !== null) {
      let total = 0;
      for (let i = 0; i < kept; i += 1) total += powers[ids[i]];
      let sum = 0;
      let crossed = 0; // the token that crosses the probability is kept, as those before it don't reach it
      for (; crossed < kept && sum < this.topP * total; crossed += 1) sum += powers[ids[crossed]];
      kept = crossed;
    }
    let total = 0;
    for (let i = 0; i < kept; i += 1) total += powers[ids[i]];
    const wanted = this.random.random() * total;
    let sum = 0;
    for (let i = 0; i < kept; i += 1) {
      sum += powers[ids[i]];
      if (sum > wanted) return ids[i];
    }
    return ids[kept - 1];
  }
}

const anySeed = () => Math.floor(Math.random() * 2 ** 32);

function largestOf(logits) {
  let place = 0;
  let wrong = false;
  for (let i = 0; i < logits.length; i += 1) {
    if (logits[i] > logits[place]) place = i;
    wrong ||= Number.isNaN(logits[i]);
  }
  if (wrong || !Number.isFinite(logits[place])) {
    refuse("input.value", "logits", "numbers", "NaN or infinity", "Some weights may be NaN or infinite");
  }
  return place;
}
