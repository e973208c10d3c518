/** Matrix products and norms of rows of tokens. Sums are in float64, results in float32. */

/**
 * W x + b for every token.
 *
 * *Shape:* (tokens, in) -> (tokens, out)
 *
 * @param {import("./weights.js").Matrix} weight out rows, from `first` on
 * @param {Float32Array} x
 * @param {number} tokens
 * @param {{bias?: import("./weights.js").Matrix, biasRow?: number, first?: number, rows?: number}} [options]
 *   `first` and `rows`: the rows of a stack of matrices that are meant
 * @returns {Float32Array}
 */
export function linear(weight, x, tokens, { bias, biasRow = 0, first = 0, rows = weight.rows } = {}) {
  const width = weight.columns;
  const result = new Float32Array(tokens * rows);
  const offsets = bias?.row(biasRow);
  for (let out = 0; out < rows; out++) {
    const row = weight.row(first + out);
    const offset = offsets ? offsets[out] : 0;
    for (let token = 0; token < tokens; token++) {
      result[token * rows + out] = dot(row, x, token * width, width) + offset;
    }
  }
  return result;
}

/**
 * The product of a row with `width` numbers of x from `at` on. Four sums, so that they don't wait for each
 * other.
 */
function dot(row, x, at, width) {
  let [a, b, c, d] = [0, 0, 0, 0];
  const even = width - (width % 4);
  for (let i = 0; i < even; i += 4) {
    a += row[i] * x[at + i];
    b += row[i + 1] * x[at + i + 1];
    c += row[i + 2] * x[at + i + 2];
    d += row[i + 3] * x[at + i + 3];
  }
  for (let i = even; i < width; i++) {
    a += row[i] * x[at + i];
  }
  return a + b + (c + d);
}

/**
 * Normalize groups of numbers (SB-C-005, SB-C-006).
 *
 * @param {{kind: string, eps: number, weight_offset: number}} norm
 * @param {Float32Array} x any number of groups
 * @param {number} size numbers of a group
 * @param {Float32Array | undefined} weight whose numbers repeat after `weight.length`: a weight a head, or
 *   one for all
 * @param {Float32Array | undefined} bias
 * @returns {Float32Array}
 */
export function normalize({ kind, eps, weight_offset: offset }, x, size, weight, bias) {
  const result = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += size) {
    let mean = 0;
    if (kind === "layer_norm") {
      for (let i = 0; i < size; i++) {
        mean += x[start + i];
      }
      mean /= size;
    }
    let squares = 0;
    for (let i = 0; i < size; i++) {
      squares += (x[start + i] - mean) ** 2;
    }
    const factor = 1 / Math.sqrt(squares / size + eps);
    for (let i = 0; i < size; i++) {
      const at = weight ? (start + i) % weight.length : 0;
      const scale = weight ? weight[at] + offset : 1;
      result[start + i] = scale * (x[start + i] - mean) * factor + (bias ? bias[at] : 0);
    }
  }
  return result;
}

/**
 * A norm of hidden states with its tensors.
 *
 * @param {object} norm
 * @param {string} name of its tensors, without `.weight`
 * @param {Map<string, import("./weights.js").Matrix>} weights
 * @returns {(x: Float32Array, size: number) => Float32Array}
 */
export function makeNorm(norm, name, weights) {
  // A vector of several rows (one a head) is read as one: rows lie one after the other.
  const numbers = (part) => {
    const tensor = weights.get(`${name}.${part}`);
    if (!tensor) {
      return undefined;
    }
    const all = new Float32Array(tensor.rows * tensor.columns);
    for (let i = 0; i < tensor.rows; i++) {
      all.set(tensor.row(i), i * tensor.columns);
    }
    return all;
  };
  const [weight, bias] = [numbers("weight"), numbers("bias")];
  return (x, size) => normalize(norm, x, size, weight, bias);
}

/** c · tanh(x / c) of every number (SB-C-017, SB-C-023, SB-C-033); nothing without a cap. Changes x. */
export function capped(x, cap) {
  for (let i = 0; cap !== null && i < x.length; i++) {
    x[i] = cap * Math.tanh(x[i] / cap);
  }
  return x;
}
