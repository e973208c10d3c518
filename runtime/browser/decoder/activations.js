/** Activations, element by element (SB-C-016). */

const SQRT_HALF = Math.sqrt(0.5);
const TANH_SCALE = Math.sqrt(2 / Math.PI);

/** The logistic function, without overflow on either side. */
export function sigmoid(x) {
  return x >= 0 ? 1 / (1 + Math.exp(-x)) : Math.exp(x) / (1 + Math.exp(x));
}

/** ln(1 + exp(x)), without overflow. */
export function softplus(x) {
  return Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
}

/** The error function to the precision of float64: a series of positive terms, so nothing cancels. */
export function erf(x) {
  const size = Math.abs(x);
  if (size > 6) {
    return Math.sign(x);
  }
  let term = size;
  let sum = size;
  for (let n = 1; term > sum * 1e-17; n++) {
    term *= (2 * size * size) / (2 * n + 1);
    sum += term;
  }
  return Math.sign(x) * ((2 / Math.sqrt(Math.PI)) * Math.exp(-size * size) * sum);
}

const SIMPLE = {
  silu: (x) => x * sigmoid(x),
  gelu: (x) => 0.5 * x * (1 + erf(x * SQRT_HALF)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(TANH_SCALE * (x + 0.044715 * x * x * x))),
  relu: (x) => Math.max(x, 0),
  relu_squared: (x) => Math.max(x, 0) ** 2,
};

/**
 * @param {string} name of an activation
 * @param {{alphaP?: number, alphaN?: number}} [learned] what xIELU learns: a and b
 * @returns {(x: number) => number}
 */
export function activation(name, { alphaP, alphaN } = {}) {
  if (name !== "xielu") {
    return SIMPLE[name];
  }
  const positive = softplus(alphaP);
  const negative = 0.5 + softplus(alphaN);
  return (x) =>
    x > 0 ? positive * x * x + 0.5 * x : negative * (Math.expm1(Math.min(x, -1e-6)) - x) + 0.5 * x;
}
