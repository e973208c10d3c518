/**
 * Weights as they are stored, widened to float32 row by row when they are used: a stage needs no more memory
 * than its files.
 */

import { blockSize } from "../reader/logical_tensors.js";

/** The bytes that are read at once. */
const CHUNK = 1 << 26;

/**
 * Rows of numbers: a matrix, a stack of matrices one after the other, or a vector as one row.
 *
 * @typedef {object} Matrix
 * @property {number} rows
 * @property {number} columns
 * @property {(index: number) => Float32Array} row the numbers of one row, valid until the next call
 */

/**
 * Load the tensors of units.
 *
 * @param {import("../reader/bundle.js").Bundle} bundle
 * @param {string[]} units
 * @returns {Promise<Map<string, Matrix>>} by the names of the logical tensors
 */
export async function loadWeights(bundle, units) {
  const weights = new Map();
  for (const unit of units) {
    const placed = await bundle.unitTensors(unit);
    const bytes = new Map();
    for (const tensor of placed) {
      await bundle.checkScales(tensor);
      bytes.set(tensor.name, { tensor, data: await readTensor(bundle, tensor) });
    }
    for (const { name, shape } of bundle.logicalTensors.of(unit)) {
      const { tensor, data } = bytes.get(name);
      const columns = shape.length > 1 ? shape.at(-1) : shape[0];
      const rows = shape.slice(0, -1).reduce((product, size) => product * size, 1);
      const encoding = bundle.manifest.storage.encodings?.[name];
      const own =
        encoding === undefined
          ? plainMatrix(tensor.dtype, data, rows, columns)
          : quantizedMatrix(encoding, data, bytes.get(`${name}_scale`).data, rows, columns);
      weights.set(name, own);
    }
  }
  return weights;
}

/** A tensor's bytes in a buffer of their own, so that any typed array fits on them. */
async function readTensor(bundle, { file, offset, length }) {
  const bytes = new Uint8Array(length);
  for (let at = 0; at < length; at += CHUNK) {
    const end = Math.min(at + CHUNK, length);
    bytes.set(await bundle.files.read(file, offset + at, offset + end), at);
  }
  return bytes;
}

function plainMatrix(dtype, bytes, rows, columns) {
  if (dtype === "F32") {
    const data = new Float32Array(bytes.buffer);
    return { rows, columns, row: (index) => data.subarray(index * columns, (index + 1) * columns) };
  }
  const data = new Uint16Array(bytes.buffer);
  const buffer = new Float32Array(columns);
  const widen = dtype === "BF16" ? widenBfloat16 : widenFloat16;
  return {
    rows,
    columns,
    row: (index) => widen(data, index * columns, buffer),
  };
}

const bits = new Uint32Array(1);
const number = new Float32Array(bits.buffer);

/** bfloat16 is the first half of a float32. */
function widenBfloat16(data, start, result) {
  const words = new Uint32Array(result.buffer);
  for (let i = 0; i < words.length; i++) {
    words[i] = data[start + i] << 16;
  }
  return result;
}

function widenFloat16(data, start, result) {
  for (let i = 0; i < result.length; i++) {
    const half = data[start + i];
    const exponent = (half >> 10) & 31;
    const fraction = half & 1023;
    const sign = half & 0x8000 ? -1 : 1;
    if (exponent === 0) {
      result[i] = sign * fraction * 2 ** -24;
    } else {
      bits[0] = ((exponent === 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
      result[i] = sign * number[0];
    }
  }
  return result;
}

/** The equations of bundle.md, "Encodings". A product of a code and a scale is exact in float32. */
function quantizedMatrix(encoding, codes, scaleBytes, rows, columns) {
  const buffer = new Float32Array(columns);
  const block = encoding === "rows8" ? columns : blockSize(encoding);
  const blocks = columns / block;
  const scales = widenBfloat16(new Uint16Array(scaleBytes.buffer), 0, new Float32Array(rows * blocks));
  const signed = new Int8Array(codes.buffer);
  const row8 = (index) => {
    for (let k = 0, at = index * columns; k < columns; k++, at++) {
      buffer[k] = scales[index] * signed[at];
    }
    return buffer;
  };
  const row4 = (index) => {
    for (let k = 0, at = (index * columns) / 2; k < columns; k += 2, at++) {
      const scale = scales[index * blocks + Math.floor(k / block)];
      buffer[k] = scale * ((codes[at] & 15) - 8);
      buffer[k + 1] = scale * ((codes[at] >> 4) - 8);
    }
    return buffer;
  };
  return { rows, columns, row: encoding === "rows8" ? row8 : row4 };
}
