/** SHA-256 (FIPS 180-4), in pieces: `crypto.subtle` needs all bytes at once, and weight files are large. */

const PRIMES = firstPrimes(64);
const ROUND_CONSTANTS = Int32Array.from(PRIMES, (prime) => fractionBits(Math.cbrt(prime)));
const START = Int32Array.from(PRIMES.slice(0, 8), (prime) => fractionBits(Math.sqrt(prime)));
const BLOCK = 64;

/** An incremental digest. */
export class Sha256 {
  #state = START.slice();
  #words = new Int32Array(64);
  #rest = new Uint8Array(BLOCK);
  #restLength = 0;
  #length = 0;

  /**
   * @param {Uint8Array} bytes
   * @returns {this}
   */
  update(bytes) {
    this.#length += bytes.length;
    let at = 0;
    if (this.#restLength) {
      at = Math.min(BLOCK - this.#restLength, bytes.length);
      this.#rest.set(bytes.subarray(0, at), this.#restLength);
      this.#restLength += at;
      if (this.#restLength < BLOCK) {
        return this;
      }
      compress(this.#state, this.#words, this.#rest, 0, BLOCK);
    }
    const end = at + Math.floor((bytes.length - at) / BLOCK) * BLOCK;
    compress(this.#state, this.#words, bytes, at, end);
    this.#rest.set(bytes.subarray(end));
    this.#restLength = bytes.length - end;
    return this;
  }

  /**
   * End the digest.
   *
   * @returns {string} 64 lowercase hexadecimal digits
   */
  hex() {
    const length = this.#length;
    const padding = new Uint8Array(((this.#restLength < 56 ? 56 : 120) - this.#restLength) + 8);
    padding[0] = 0x80;
    const view = new DataView(padding.buffer);
    view.setUint32(padding.length - 8, Math.floor(length / 0x20000000));
    view.setUint32(padding.length - 4, (length * 8) >>> 0);
    this.update(padding);
    return Array.from(this.#state, (word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
  }
}

/**
 * @param {Uint8Array} bytes
 * @returns {string} 64 lowercase hexadecimal digits
 */
export function sha256(bytes) {
  return new Sha256().update(bytes).hex();
}

/**
 * The same by the system, which is much faster and uses another thread. Pages that came over plain HTTP from
 * another machine have no `crypto.subtle`.
 *
 * @param {Uint8Array} bytes
 * @returns {Promise<string>} 64 lowercase hexadecimal digits
 */
export async function sha256OfAll(bytes) {
  if (!globalThis.crypto?.subtle) {
    return sha256(bytes);
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const choice = (x, y, z) => z ^ (x & (y ^ z));
const majority = (x, y, z) => (x & y) | (z & (x | y));
const sum0 = (x) => ((x >>> 2) | (x << 30)) ^ ((x >>> 13) | (x << 19)) ^ ((x >>> 22) | (x << 10));
const sum1 = (x) => ((x >>> 6) | (x << 26)) ^ ((x >>> 11) | (x << 21)) ^ ((x >>> 25) | (x << 7));
const sigma0 = (x) => ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
const sigma1 = (x) => ((x >>> 17) | (x << 15)) ^ ((x >>> 19) | (x << 13)) ^ (x >>> 10);

/**
 * Take whole blocks. Eight rounds are written out, so that no round has to move the eight working variables.
 */
function compress(state, words, bytes, start, end) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let [a, b, c, d, e, f, g, h] = state;
  for (let block = start; block < end; block += BLOCK) {
    for (let i = 0; i < 16; i++) {
      words[i] = view.getInt32(block + 4 * i);
    }
    for (let i = 16; i < 64; i++) {
      words[i] = (words[i - 16] + sigma0(words[i - 15]) + words[i - 7] + sigma1(words[i - 2])) | 0;
    }
    for (let i = 0; i < 64; i += 8) {
      h = (h + sum1(e) + choice(e, f, g) + ROUND_CONSTANTS[i] + words[i]) | 0;
      d = (d + h) | 0;
      h = (h + sum0(a) + majority(a, b, c)) | 0;
      g = (g + sum1(d) + choice(d, e, f) + ROUND_CONSTANTS[i + 1] + words[i + 1]) | 0;
      c = (c + g) | 0;
      g = (g + sum0(h) + majority(h, a, b)) | 0;
      f = (f + sum1(c) + choice(c, d, e) + ROUND_CONSTANTS[i + 2] + words[i + 2]) | 0;
      b = (b + f) | 0;
      f = (f + sum0(g) + majority(g, h, a)) | 0;
      e = (e + sum1(b) + choice(b, c, d) + ROUND_CONSTANTS[i + 3] + words[i + 3]) | 0;
      a = (a + e) | 0;
      e = (e + sum0(f) + majority(f, g, h)) | 0;
      d = (d + sum1(a) + choice(a, b, c) + ROUND_CONSTANTS[i + 4] + words[i + 4]) | 0;
      h = (h + d) | 0;
      d = (d + sum0(e) + majority(e, f, g)) | 0;
      c = (c + sum1(h) + choice(h, a, b) + ROUND_CONSTANTS[i + 5] + words[i + 5]) | 0;
      g = (g + c) | 0;
      c = (c + sum0(d) + majority(d, e, f)) | 0;
      b = (b + sum1(g) + choice(g, h, a) + ROUND_CONSTANTS[i + 6] + words[i + 6]) | 0;
      f = (f + b) | 0;
      b = (b + sum0(c) + majority(c, d, e)) | 0;
      a = (a + sum1(f) + choice(f, g, h) + ROUND_CONSTANTS[i + 7] + words[i + 7]) | 0;
      e = (e + a) | 0;
      a = (a + sum0(b) + majority(b, c, d)) | 0;
    }
    state[0] = a = (a + state[0]) | 0;
    state[1] = b = (b + state[1]) | 0;
    state[2] = c = (c + state[2]) | 0;
    state[3] = d = (d + state[3]) | 0;
    state[4] = e = (e + state[4]) | 0;
    state[5] = f = (f + state[5]) | 0;
    state[6] = g = (g + state[6]) | 0;
    state[7] = h = (h + state[7]) | 0;
  }
}

function firstPrimes(count) {
  const primes = [];
  for (let n = 2; primes.length < count; n++) {
    if (primes.every((prime) => n % prime)) {
      primes.push(n);
    }
  }
  return primes;
}

/** The first 32 bits of the fraction. A double keeps 45 bits of it here, so they are exact. */
function fractionBits(root) {
  return ((root - Math.floor(root)) * 2 ** 32) | 0;
}
