/**
 * One layer: norms around attention and the feed-forward block, by the row of its placement (SB-C-004,
 * SB-C-042).
 */

import { Attention } from "./attention.js";
import { Dense, Experts } from "./feedforward.js";
import { makeNorm } from "./linear.js";

export class Layer {
  /**
   * @param {object} kind one of `layer_kinds`
   * @param {number} index the layer's global number
   * @param {Map<string, import("./weights.js").Matrix>} weights
   */
  constructor(kind, index, weights) {
    const name = `layers.${index}`;
    this.kind = kind;
    this.attention = new Attention(kind.attention, `${name}.attention`, weights);
    const Block = kind.mlp.kind === "experts" ? Experts : Dense;
    this.mlp = new Block(kind.mlp, `${name}.mlp`, weights);
    const norm = (own) => makeNorm(kind.norm, `${name}.${own}`, weights);
    this.norms = {
      attention: norm("attention_norm"),
      attentionOutput: norm("attention_output_norm"),
      mlp: norm("mlp_norm"),
      mlpOutput: norm("mlp_output_norm"),
    };
  }

  /**
   * *Shape:* (tokens, hidden) -> (tokens, hidden)
   *
   * @param {Float32Array} x
   * @param {import("./attention.js").Tokens} tokens
   * @param {import("./cache.js").LayerCache} cache
   * @returns {Float32Array}
   */
  apply(x, tokens, cache) {
    const { placement, residual_scales: scales } = this.kind;
    const width = x.length / tokens.total;
    const { norms } = this;
    const normed = (norm, own) => norm(own, width);
    const attend = (own) => this.attention.apply(own, tokens, cache);
    const feed = (own) => this.mlp.apply(own, tokens.total);
    if (placement === "parallel" || placement === "parallel_two") {
      const first = normed(norms.attention, x);
      const fed = feed(placement === "parallel" ? first : normed(norms.mlp, x));
      const attended = attend(first);
      return this.sum(x, attended.map((value, i) => value + fed[i]));
    }
    const block = (own, compute, before, after, scale) => {
      switch (placement) {
        case "pre":
          return this.sum(own, compute(normed(before, own)), scale);
        case "output":
          return this.sum(own, normed(before, compute(own)), scale);
        case "sandwich":
          return this.sum(own, normed(after, compute(normed(before, own))), scale);
        default:
          return normed(before, this.sum(own, compute(own), scale)); // post
      }
    };
    const middle = block(x, attend, norms.attention, norms.attentionOutput, scales?.attention);
    return block(middle, feed, norms.mlp, norms.mlpOutput, scales?.mlp);
  }

  /** k · x + a · r · t */
  sum(x, term, { kept, added } = { kept: 1, added: 1 }) {
    const factor = added * this.kind.residual_multiplier;
    return x.map((value, i) => kept * value + factor * term[i]);
  }
}
