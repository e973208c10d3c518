/**
 * The logical tensors that an architecture implies (SB-C-018), and how a bundle stores them.
 *
 * @typedef {{name: string, shape: readonly number[]}} LogicalTensor
 * @typedef {{name: string, dtype: string, shape: readonly number[], scale: boolean}} StoredTensor
 *   dtype as in safetensors; `scale`: whether it holds the scales of a quantized tensor (SB-W-014)
 */

/** The dtypes of `storage`, as safetensors calls them. */
export const CODES = { float32: "F32", float16: "F16", bfloat16: "BF16" };
/** Bytes of an element. */
export const ITEM_SIZES = { F32: 4, F16: 2, BF16: 2, I64: 8, I8: 1, U8: 1 };

/** The logical tensors of all units of one model. Those of a layer kind are made once. */
export class LogicalTensors {
  #kinds = new Map();
  #shapes = new Map();
  #ends;
  #digits;

  /** @param {object} architecture as `parseArchitecture` returns it */
  constructor(architecture) {
    this.architecture = architecture;
    this.layers = architecture.layers.length;
    this.#digits = Math.max(3, String(this.layers - 1).length);
    this.embedding = embeddingTensors(architecture);
    this.head = headTensors(architecture);
    for (const [name, kind] of Object.entries(architecture.layer_kinds)) {
      const tensors = layerTensors(kind, architecture.hidden_size);
      this.#kinds.set(name, tensors);
      this.#shapes.set(name, shapesByName(tensors));
    }
    this.#ends = shapesByName([...this.embedding, ...this.head]);
  }

  /** The units in order of use (SB-M-040). */
  units() {
    const layers = this.architecture.layers.map((_, i) => this.layerUnit(i));
    return ["embedding", ...layers, "head"];
  }

  /** @param {number} layer */
  layerUnit(layer) {
    return `layer-${String(layer).padStart(this.#digits, "0")}`;
  }

  /** The tensors of a layer, without the prefix `layers.N.`. */
  ofLayer(layer) {
    return this.#kinds.get(this.architecture.layers[layer]);
  }

  /**
   * The tensors of a unit in order of use.
   *
   * @param {string} unit
   * @returns {LogicalTensor[]}
   */
  of(unit) {
    if (unit === "embedding" || unit === "head") {
      return this[unit];
    }
    const layer = Number(unit.slice("layer-".length));
    return this.ofLayer(layer).map(({ name, shape }) => ({ name: `layers.${layer}.${name}`, shape }));
  }

  /**
   * The shape of a tensor; undefined if the model has no tensor of this name.
   *
   * @param {string} name
   * @returns {readonly number[] | undefined}
   */
  shape(name) {
    const match = /^layers\.(0|[1-9][0-9]{0,4})\.(.*)$/s.exec(name);
    if (!match) {
      return this.#ends.get(name);
    }
    return this.#shapes.get(this.architecture.layers[match[1]])?.get(match[2]);
  }

  /** The number of parameters of a unit. Sums may leave the exact integers of 64-bit numbers. */
  parameters(unit) {
    const own = unit === "embedding" || unit === "head" ? this[unit] : this.ofLayer(Number(unit.slice(6)));
    return own.reduce((sum, { shape }) => sum + product(shape), 0n);
  }

  /** The number of logical tensors of the model. */
  get count() {
    const layers = this.architecture.layers.reduce((sum, _, i) => sum + this.ofLayer(i).length, 0);
    return this.embedding.length + layers + this.head.length;
  }
}

/** The product of dimensions, exactly. */
export function product(shape) {
  return shape.reduce((result, dimension) => result * BigInt(dimension), 1n);
}

/**
 * How the logical tensors are stored, in order of use: scales follow their codes (SB-W-014).
 *
 * @param {LogicalTensor[]} tensors
 * @param {object} storage of the manifest
 * @returns {StoredTensor[]}
 */
export function storedTensors(tensors, storage) {
  const stored = [];
  for (const { name, shape } of tensors) {
    const encoding = storage.encodings?.[name];
    if (encoding === undefined) {
      stored.push({ name, dtype: CODES[storage.exceptions[name] ?? storage.dtype], shape, scale: false });
      continue;
    }
    const columns = shape.at(-1);
    const rows = shape.slice(0, -1);
    const scale = `${name}_scale`;
    if (encoding === "rows8") {
      stored.push({ name, dtype: "I8", shape, scale: false });
      stored.push({ name: scale, dtype: "BF16", shape: rows, scale: true });
    } else {
      const block = blockSize(encoding);
      const blocks = columns / block;
      stored.push({ name, dtype: "U8", shape: [...rows, blocks, block / 2], scale: false });
      stored.push({ name: scale, dtype: "BF16", shape: [...rows, blocks], scale: true });
    }
  }
  return stored;
}

/** B of the encoding `blocks4_B`. */
export function blockSize(encoding) {
  return Number(encoding.slice("blocks4_".length));
}

/** The bytes of a stored tensor. */
export function byteLength({ dtype, shape }) {
  return shape.reduce((result, dimension) => result * dimension, ITEM_SIZES[dtype]);
}

/** The same, exactly: a hostile shape may have more bytes than a number can count. */
export function exactByteLength({ dtype, shape }) {
  return BigInt(ITEM_SIZES[dtype]) * product(shape);
}

/** A product as a number, or as a BigInt where a number can't state it (SB-M-096). */
function times(one, other) {
  const result = one * other;
  return Number.isSafeInteger(result) ? result : BigInt(one) * BigInt(other);
}

function shapesByName(tensors) {
  return new Map(tensors.map(({ name, shape }) => [name, shape]));
}

function embeddingTensors({ vocab_size: vocab, hidden_size: hidden, embedding }) {
  const { token_size: token, position, norm } = embedding;
  const tensors = [{ name: "embedding.token.weight", shape: [vocab, token] }];
  if (token !== hidden) {
    tensors.push({ name: "embedding.projection.weight", shape: [hidden, token] });
  }
  if (position.kind === "learned") {
    tensors.push({ name: "embedding.position.weight", shape: [position.count + position.offset, hidden] });
  }
  return [...tensors, ...normTensors("embedding.norm", norm, [hidden])];
}

function headTensors({ vocab_size: vocab, hidden_size: hidden, embedding, head }) {
  const token = embedding.token_size;
  const tensors = normTensors("head.norm", head.norm, [hidden]);
  if (token !== hidden) {
    tensors.push({ name: "head.narrowing.weight", shape: [token, hidden] });
  }
  if (!head.tied) {
    tensors.push({ name: "head.projection.weight", shape: [vocab, token] });
  }
  if (head.bias) {
    tensors.push({ name: "head.projection.bias", shape: [vocab] });
  }
  return tensors;
}

function normTensors(name, norm, shape) {
  const tensors = [];
  if (norm?.affine) {
    tensors.push({ name: `${name}.weight`, shape });
  }
  if (norm?.bias) {
    tensors.push({ name: `${name}.bias`, shape });
  }
  return tensors;
}

function linearTensors(name, shape, bias) {
  const tensors = [{ name: `${name}.weight`, shape }];
  if (bias) {
    tensors.push({ name: `${name}.bias`, shape: shape.slice(0, -1) });
  }
  return tensors;
}

/** The rows "layer i" of the table of SB-C-018, without the prefix. */
function layerTensors({ placement, norm, attention, mlp }, hidden) {
  const layerNorm = (name, ...placements) =>
    placements.includes(placement) ? normTensors(name, norm, [hidden]) : [];
  return [
    ...layerNorm("attention_norm", "pre", "sandwich", "parallel", "parallel_two"),
    ...layerNorm("mlp_norm", "parallel_two"),
    ...attentionTensors(attention, hidden),
    ...layerNorm("attention_norm", "output", "post"),
    ...layerNorm("attention_output_norm", "sandwich"),
    ...layerNorm("mlp_norm", "pre", "sandwich"),
    ...(mlp.kind === "experts" ? expertTensors(mlp, hidden) : denseTensors("mlp", mlp, hidden)),
    ...layerNorm("mlp_norm", "output", "post"),
    ...layerNorm("mlp_output_norm", "sandwich"),
  ];
}

function attentionTensors(attention, hidden) {
  const { heads, kv_heads: kvHeads, head_dim: headDim, qkv_bias: bias, query_key_norm: own } = attention;
  const valueDim = attention.value_dim ?? headDim;
  const gate = attention.output_gate;
  const tensors = [
    ...linearTensors("attention.query", [times(heads, headDim), hidden], bias),
    ...linearTensors("attention.key", [times(kvHeads, headDim), hidden], bias),
    ...linearTensors("attention.value", [times(kvHeads, valueDim), hidden], bias),
  ];
  if (own) {
    tensors.push(...normTensors("attention.query_norm", own.norm, normShape(own.width, heads, headDim)));
    tensors.push(...normTensors("attention.key_norm", own.norm, normShape(own.width, kvHeads, headDim)));
  }
  if (attention.sinks) {
    tensors.push({ name: "attention.sinks", shape: [heads] });
  }
  if (gate) {
    const rows = gate.width === "head" ? heads : times(heads, valueDim);
    tensors.push({ name: "attention.gate.weight", shape: [rows, hidden] });
  }
  if (gate?.bias) {
    tensors.push({ name: "attention.gate_bias", shape: [heads] });
  }
  const output = linearTensors("attention.output", [hidden, times(heads, valueDim)], attention.output_bias);
  return [...tensors, ...output];
}

/** SB-C-021 */
function normShape(width, heads, headDim) {
  return { head: [headDim], heads: [heads, headDim], full: [times(heads, headDim)] }[width];
}

function denseTensors(name, { gated, activation, intermediate_size: inner, bias }, hidden) {
  const tensors = gated ? linearTensors(`${name}.gate`, [inner, hidden], bias) : [];
  tensors.push(...linearTensors(`${name}.up`, [inner, hidden], bias));
  if (activation === "xielu") {
    tensors.push({ name: `${name}.activation.alpha_p`, shape: [1] });
    tensors.push({ name: `${name}.activation.alpha_n`, shape: [1] });
  }
  return [...tensors, ...linearTensors(`${name}.down`, [hidden, inner], bias)];
}

function expertTensors(mlp, hidden) {
  const { count, intermediate_size: inner, gated, bias, router, shared } = mlp;
  const tensors = linearTensors("mlp.router", [count, hidden], router.bias);
  if (router.correction !== null) {
    tensors.push({ name: "mlp.router.correction", shape: [count] });
  }
  if (gated) {
    tensors.push(...linearTensors("mlp.experts.gate", [count, inner, hidden], bias));
  }
  tensors.push(...linearTensors("mlp.experts.up", [count, inner, hidden], bias));
  tensors.push(...linearTensors("mlp.experts.down", [count, hidden, inner], bias));
  if (shared) {
    const own = { ...mlp, intermediate_size: shared.intermediate_size };
    tensors.push(...denseTensors("mlp.shared", own, hidden));
  }
  if (shared?.gate) {
    tensors.push({ name: "mlp.shared_gate.weight", shape: [1, hidden] });
  }
  return tensors;
}
