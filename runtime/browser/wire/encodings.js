// The encodings of a payload (spec/v1/wire.md, section "Payloads"): numbers to bytes and back.

import { refuse } from "./refusal.js";

/** The encodings that are a dtype -> the bytes of a number. */
export const EXACT = Object.freeze({ float32: 4, float16: 2, bfloat16: 2 });

/** Every encoding. */
export const ENCODINGS = Object.freeze([...Object.keys(EXACT), "int8"]);

const SCALE_BYTES = 4;
const LARGEST_CODE = 127;
const INFINITY_32 = 0x7f800000;

/**
 * Return the bytes of a payload.
 *
 * @param {string} encoding
 * @param {number} tokens
 * @param {number} width the numbers of a token
 */
export const payloadBytes = (encoding, tokens, width) =>
  encoding === "int8" ? tokens * (SCALE_BYTES + width) : tokens * width * EXACT[encoding];

/**
 * Return the payload of hidden states.
 *
 * @param {Float32Array} numbers (tokens, width), without padding
 * @param {string} encoding
 * @param {number} width
 * @returns {Uint8Array}
 * @throws {BundleError} `wire.value` for a number that the encoding can't hold (SB-X-008)
 */
export function encode(numbers, encoding, width) {
  if (encoding === "float32") return littleEndian32(numbers);
  // Not float32: every other encoding rounds, so it can't hold what isn't finite.
  const bits = new Uint32Array(numbers.buffer, numbers.byteOffset, numbers.length);
  for (const each of bits) if ((each & INFINITY_32) === INFINITY_32) refuseNumber(encoding);
  return encoding === "int8" ? encodeInt8(numbers, width) : encodeHalves(bits, encoding);
}

/**
 * Return the hidden states of a payload.
 *
 * @param {Uint8Array} payload
 * @param {string} encoding
 * @param {number} tokens
 * @param {number} width
 * @returns {Float32Array} (tokens, width)
 */
export function decode(payload, encoding, tokens, width) {
  const found = new Float32Array(tokens * width);
  const view = new DataView(payload.buffer, payload.byteOffset, payload.byteLength);
  if (encoding === "int8") {
    for (let token = 0, at = tokens * SCALE_BYTES; token < tokens; token += 1) {
      const scale = view.getFloat32(token * SCALE_BYTES, true);
      for (let i = token * width; i < (token + 1) * width; i += 1, at += 1) {
        found[i] = scale * view.getInt8(at);
      }
    }
    return found;
  }
  // Bit patterns are written, not numbers: a number that isn't finite keeps all of its bits.
  const bits = new Uint32Array(found.buffer);
  if (encoding === "float32") for (let i = 0; i < bits.length; i += 1) bits[i] = view.getUint32(4 * i, true);
  else {
    const widen = encoding === "float16" ? float16ToBits : (half) => half << 16;
    for (let i = 0; i < bits.length; i += 1) bits[i] = widen(view.getUint16(2 * i, true));
  }
  return found;
}

function littleEndian32(numbers) {
  const payload = new Uint8Array(4 * numbers.length);
  const bits = new Uint32Array(numbers.buffer, numbers.byteOffset, numbers.length);
  const view = new DataView(payload.buffer);
  for (let i = 0; i < bits.length; i += 1) view.setUint32(4 * i, bits[i], true);
  return payload;
}

function encodeHalves(bits, encoding) {
  const payload = new Uint8Array(2 * bits.length);
  const view = new DataView(payload.buffer);
  const narrow = encoding === "float16" ? bitsToFloat16 : bitsToBfloat16;
  for (let i = 0; i < bits.length; i += 1) {
    const half = narrow(bits[i]);
    if (half === null) refuseNumber(encoding);
    view.setUint16(2 * i, half, true);
  }
  return payload;
}

function encodeInt8(numbers, width) {
  const tokens = numbers.length / width;
  const payload = new Uint8Array(payloadBytes("int8", tokens, width));
  const view = new DataView(payload.buffer);
  for (let token = 0, at = tokens * SCALE_BYTES; token < tokens; token += 1) {
    const row = numbers.subarray(token * width, (token + 1) * width);
    let largest = 0;
    for (const each of row) largest = Math.max(largest, Math.abs(each));
    const scale = Math.fround(largest / LARGEST_CODE);
    view.setFloat32(token * SCALE_BYTES, scale, true);
    for (const each of row) {
      const code = scale === 0 ? 0 : roundHalfToEven(Math.fround(each / scale));
      view.setInt8(at, Math.max(-LARGEST_CODE, Math.min(LARGEST_CODE, code)));
      at += 1;
    }
  }
  return payload;
}

function roundHalfToEven(number) {
  const below = Math.floor(number);
  const rest = number - below;
  if (rest !== 0.5) return rest < 0.5 ? below : below + 1;
  return below % 2 === 0 ? below : below + 1;
}

/** Return the upper half of a binary32, rounded to nearest, ties to even; null above the largest number. */
function bitsToBfloat16(bits) {
  const rounded = (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
  return (rounded & 0x7f80) === 0x7f80 ? null : rounded;
}

/** Return a finite binary32 as binary16, rounded to nearest, ties to even; null above the largest number. */
function bitsToFloat16(bits) {
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 0xff) - 112; // the biases are 127 and 15
  const mantissa = bits & 0x7fffff;
  if (exponent < -10) return sign; // below half of the smallest number
  // A number below 2^-14 has no hidden one: its mantissa moves to the right.
  const shift = exponent < 1 ? 14 - exponent : 13;
  const whole = exponent < 1 ? mantissa | 0x800000 : mantissa | (exponent << 23);
  const kept = whole >>> shift;
  const rest = whole & ((1 << shift) - 1);
  const half = 1 << (shift - 1);
  // The carry of a mantissa moves into the exponent, as it should.
  const rounded = kept + (rest > half || (rest === half && kept % 2 === 1) ? 1 : 0);
  return rounded >= 0x7c00 ? null : sign | rounded;
}

function float16ToBits(half) {
  const sign = (half & 0x8000) << 16;
  const exponent = (half >>> 10) & 0x1f;
  let mantissa = half & 0x3ff;
  if (exponent === 0x1f) return sign | INFINITY_32 | (mantissa << 13);
  if (exponent > 0) return sign | ((exponent + 112) << 23) | (mantissa << 13);
  if (mantissa === 0) return sign;
  let power = 113;
  for (; (mantissa & 0x400) === 0; power -= 1) mantissa <<= 1;
  return sign | (power << 23) | ((mantissa & 0x3ff) << 13);
}

function refuseNumber(encoding) {
  // The text says nothing of the number: it may be one of a payload (SB-X-026).
  refuse("wire.value", "hidden", `numbers that ${encoding} can hold`, "one that it can't");
}
