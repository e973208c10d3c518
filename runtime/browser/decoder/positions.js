/** Positions: sinusoidal ones, rotary angles with all scalings, and ALiBi's slopes. */

const { fround } = Math;

/**
 * Sinusoidal positions (SB-C-019).
 *
 * @param {number} position
 * @param {number} size
 * @returns {Float32Array}
 */
export function sinusoid(position, size) {
  const result = new Float32Array(size);
  const half = Math.floor(size / 2);
  for (let i = 0; i < half; i++) {
    const angle = fround(position * fround(10000 ** (-i / (half - 1))));
    result[i] = Math.sin(angle);
    result[half + i] = Math.cos(angle);
  }
  return result;
}

/**
 * Frequencies of rotary pairs, scaled for a row of a length (SB-C-012 to SB-C-029).
 *
 * @param {object} position of kind `rotary`
 * @param {number} length past + count of the row (SB-C-025)
 * @returns {Float32Array} one a pair
 */
export function frequencies({ base, dim, scaling }, length) {
  const theta = scaling.kind === "dynamic" ? dynamicBase(base, dim, scaling, length) : base;
  const plain = Float32Array.from({ length: dim / 2 }, (_, i) => theta ** ((-2 * i) / dim));
  return plain.map(scaler({ base, dim, scaling }, length));
}

/** SB-C-026 */
function dynamicBase(base, dim, { factor, original_positions: original }, length) {
  const longer = Math.max(length, original);
  return base * ((factor * longer) / original - (factor - 1)) ** (dim / (dim - 2));
}

/** A function of a frequency and the number of its pair. */
function scaler({ base, dim, scaling }, length) {
  const { kind, factor } = scaling;
  switch (kind) {
    case "linear":
      return (f) => f / factor;
    case "llama3":
      return (f) => llama3(f, scaling);
    case "yarn": {
      const ramp = yarnRamp(base, dim, scaling);
      return (f, i) => (ramp(i) * f) / factor + (1 - ramp(i)) * f;
    }
    case "longrope": {
      const own = length > scaling.original_positions ? scaling.long_factors : scaling.short_factors;
      return (f, i) => f / own[i];
    }
    case "proportional":
      return (f, i) => (i < scaling.pairs ? f / factor : 0);
    default:
      return (f) => f;
  }
}

/** SB-C-014 */
function llama3(f, scaling) {
  const { factor, low_frequency_factor: low, high_frequency_factor: high } = scaling;
  const turns = scaling.original_positions / ((2 * Math.PI) / f);
  if (turns < low) {
    return f / factor;
  }
  if (turns > high) {
    return f;
  }
  const share = (turns - low) / (high - low);
  return ((1 - share) * f) / factor + share * f;
}

/** SB-C-027 */
function yarnRamp(base, dim, { original_positions: original, beta_fast: fast, beta_slow: slow, truncate }) {
  const pair = (turns) => (dim * Math.log(original / (2 * Math.PI * turns))) / (2 * Math.log(base));
  const low = Math.max(truncate ? Math.floor(pair(fast)) : pair(fast), 0);
  let high = Math.min(truncate ? Math.ceil(pair(slow)) : pair(slow), dim - 1);
  if (low === high) {
    high += 0.001;
  }
  return (i) => Math.min(1, Math.max(0, (i - low) / (high - low)));
}

/**
 * Turn the first channels of every head in place (SB-C-011, SB-C-030).
 *
 * @param {object} position of kind `rotary`
 * @param {Float32Array} heads of one token
 * @param {number} headDim
 * @param {number} at the token's position
 * @param {Float32Array} turned the row's `frequencies`
 */
export function rotate({ dim, layout, direction, scaling }, heads, headDim, at, turned) {
  const pairs = dim / 2;
  const sign = direction === "backward" ? -1 : 1;
  const amplitude = scaling.attention_factor ?? 1;
  for (let i = 0; i < pairs; i++) {
    const angle = fround(at * turned[i]);
    const cosine = fround(amplitude * fround(Math.cos(angle)));
    const sine = sign * fround(amplitude * fround(Math.sin(angle)));
    const [u, v] = layout === "half" ? [i, i + pairs] : [2 * i, 2 * i + 1];
    for (let start = 0; start < heads.length; start += headDim) {
      const [x, y] = [heads[start + u], heads[start + v]];
      heads[start + u] = x * cosine - y * sine;
      heads[start + v] = y * cosine + x * sine;
    }
  }
}

/**
 * Whether a row's length changes the angles of its tokens (SB-C-025).
 *
 * @returns {number | null} the length above which it does
 */
export function lengthThreshold({ kind, scaling }) {
  const byLength = kind === "rotary" && ["dynamic", "longrope"].includes(scaling.kind);
  return byLength ? scaling.original_positions : null;
}

/**
 * ALiBi's slopes, one a head (SB-C-024).
 *
 * @param {number} heads
 * @param {number} maxBias
 * @returns {number[]}
 */
export function slopes(heads, maxBias) {
  const power = 2 ** Math.ceil(Math.log2(heads));
  const slope = (i) => 2 ** ((-maxBias * i) / power);
  if (power === heads) {
    return Array.from({ length: heads }, (_, h) => slope(h + 1));
  }
  const even = Array.from({ length: power / 2 }, (_, i) => slope(2 * i + 2));
  const odd = Array.from({ length: power / 2 }, (_, i) => slope(2 * i + 1));
  return [...even, ...odd].slice(0, heads);
}
