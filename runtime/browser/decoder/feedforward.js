/** Feed-forward blocks: dense ones, and mixtures of experts (SB-C-015, SB-C-033 to SB-C-038). */

import { activation, sigmoid } from "./activations.js";
import { capped, linear } from "./linear.js";

/** A dense block, or the shared one of a mixture. */
export class Dense {
  /**
   * @param {{gated: boolean, activation: string}} facts
   * @param {string} name `layers.N.mlp`, or `layers.N.mlp.shared`
   * @param {Map<string, import("./weights.js").Matrix>} weights
   */
  constructor(facts, name, weights) {
    this.gated = facts.gated;
    const learned = (part) => weights.get(`${name}.activation.${part}`)?.row(0)[0];
    const alphas = { alphaP: learned("alpha_p"), alphaN: learned("alpha_n") };
    this.activation = activation(facts.activation, alphas);
    this.linear = (part, x, tokens) => {
      const bias = weights.get(`${name}.${part}.bias`);
      return linear(weights.get(`${name}.${part}.weight`), x, tokens, { bias });
    };
  }

  /** *Shape:* (tokens, hidden) -> (tokens, hidden) */
  apply(x, tokens) {
    const up = this.linear("up", x, tokens);
    const gate = this.gated ? this.linear("gate", x, tokens) : up;
    const inner = gate.map(this.activation);
    if (this.gated) {
      inner.forEach((value, i) => (inner[i] = value * up[i]));
    }
    return this.linear("down", inner, tokens);
  }
}

/** A mixture of experts. */
export class Experts {
  /**
   * @param {object} facts an `mlp` of kind `experts`
   * @param {string} name `layers.N.mlp`
   * @param {Map<string, import("./weights.js").Matrix>} weights
   */
  constructor(facts, name, weights) {
    this.facts = facts;
    this.router = { weight: weights.get(`${name}.router.weight`), bias: weights.get(`${name}.router.bias`) };
    this.correction = weights.get(`${name}.router.correction`)?.row(0).slice();
    const slope = facts.gate_slope;
    this.activation = slope === 1 ? activation(facts.activation) : (x) => x * sigmoid(slope * x);
    this.shared = facts.shared && new Dense(facts, `${name}.shared`, weights);
    this.sharedGate = weights.get(`${name}.shared_gate.weight`);
    // Expert i has row i of each stack: for a matrix, as many rows as it has outputs.
    this.linear = (part, expert, x) => {
      const weight = weights.get(`${name}.experts.${part}.weight`);
      const rows = weight.rows / facts.count;
      const bias = weights.get(`${name}.experts.${part}.bias`);
      return linear(weight, x, 1, { bias, biasRow: expert, first: expert * rows, rows });
    };
  }

  /** *Shape:* (tokens, hidden) -> (tokens, hidden) */
  apply(x, tokens) {
    const width = x.length / tokens;
    const logits = capped(linear(this.router.weight, x, tokens, this.router), this.facts.router.logit_cap);
    const { count } = this.facts;
    const result = new Float64Array(x.length);
    for (let token = 0; token < tokens; token++) {
      const own = x.subarray(token * width, (token + 1) * width);
      const chosen = route(this.facts, logits.subarray(token * count, (token + 1) * count), this.correction);
      for (const { expert, weight } of chosen) {
        const output = this.weighed(expert, weight, own);
        output.forEach((value, i) => (result[token * width + i] += value));
      }
    }
    return this.withShared(result, x, tokens);
  }

  /** What one expert adds for one token (SB-C-037). */
  weighed(expert, weight, x) {
    if (this.facts.router.weighs === "input") {
      return this.expert(expert, x.map((value) => weight * value));
    }
    return Float64Array.from(this.expert(expert, x), (value) => weight * value);
  }

  expert(expert, x) {
    const { gated, clamp, up_offset: offset } = this.facts;
    const most = clamp ?? Infinity;
    const up = this.linear("up", expert, x).map((value) => Math.max(-most, Math.min(most, value)));
    if (!gated) {
      return this.linear("down", expert, up.map(this.activation));
    }
    const gate = this.linear("gate", expert, x);
    const inner = gate.map((value, i) => this.activation(Math.min(value, most)) * (up[i] + offset));
    return this.linear("down", expert, inner);
  }

  /** SB-C-038 */
  withShared(result, x, tokens) {
    if (!this.shared) {
      return Float32Array.from(result);
    }
    const added = this.shared.apply(x, tokens);
    const gates = this.sharedGate && linear(this.sharedGate, x, tokens);
    const width = x.length / tokens;
    const half = this.facts.shared.average ? 0.5 : 1;
    const factors = gates ? gates.map(sigmoid) : new Float32Array(tokens).fill(1);
    return added.map((value, i) => half * (result[i] + value * factors[Math.floor(i / width)]));
  }
}

/**
 * Choose and weigh the experts of one token (SB-C-033 to SB-C-036).
 *
 * @param {object} facts
 * @param {Float32Array} logits
 * @param {Float32Array | undefined} correction
 * @returns {{expert: number, weight: number}[]}
 */
export function route({ per_token: perToken, router }, logits, correction) {
  if (router.function === "sparsemixer") {
    return sparsemixer(perToken, router, logits);
  }
  const scores = router.function === "sigmoid" ? Array.from(logits, sigmoid) : softmax(logits);
  const ranks = scores.map((score, i) => {
    return correction ? correction[i] + (router.correction === "logit" ? logits[i] : score) : score;
  });
  const open = router.groups ? groupsOf(router.groups, ranks) : ranks.map((_, i) => i);
  const chosen = largest(open, ranks, perToken);
  const sum = chosen.reduce((total, expert) => total + scores[expert], 0);
  const divisor = router.normalised ? sum + router.epsilon : 1;
  return chosen.map((expert) => ({ expert, weight: (router.scale * scores[expert]) / divisor }));
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** The items with the largest ranks, the lowest number first among equals. */
function largest(items, ranks, count) {
  return [...items].sort((one, other) => ranks[other] - ranks[one] || one - other).slice(0, count);
}

/** The experts that can be chosen: those of the best groups. */
function groupsOf({ count, kept, score }, ranks) {
  const size = ranks.length / count;
  const scores = Array.from({ length: count }, (_, group) => {
    const own = ranks.slice(group * size, (group + 1) * size).sort((one, other) => other - one);
    return score === "max" ? own[0] : own[0] + own[1];
  });
  const best = new Set(largest([...scores.keys()], scores, kept));
  return [...ranks.keys()].filter((expert) => best.has(Math.floor(expert / size)));
}

/** SB-C-036 */
function sparsemixer(perToken, { epsilon, scale }, logits) {
  const open = new Set(logits.keys());
  return Array.from({ length: perToken }, () => {
    const [expert] = largest(open, logits, 1);
    const most = logits[expert];
    let sum = 0;
    for (const other of open) {
      if ((most - logits[other]) / Math.max(Math.abs(logits[other]), most) <= 2 * epsilon) {
        sum += Math.exp(logits[other] - most);
      }
    }
    open.delete(expert);
    return { expert, weight: scale / sum };
  });
}
