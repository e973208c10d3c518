// Uniform numbers from a seed: the Mersenne twister (Matsumoto and Nishimura 1998), seeded as Python's
// `random.Random` is. So a seed draws the same tokens here and in the Python runtime, as far as their logits
// agree.

const N = 624;
const M = 397;

/** A generator of uniform numbers. */
export class Random {
  /** @param {number} seed an integer; its sign has no meaning */
  constructor(seed) {
    this.state = new Uint32Array(N);
    this.next = N;
    const size = Math.abs(seed);
    const high = Math.floor(size / 2 ** 32);
    this.seedBy(high === 0 ? [size >>> 0] : [size >>> 0, high]);
  }

  seedBy(key) {
    const { state } = this;
    state[0] = 19650218;
    for (let i = 1; i < N; i += 1) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    let i = 1;
    let j = 0;
    for (let k = Math.max(N, key.length); k > 0; k -= 1) {
      state[i] = (state[i] ^ Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1664525)) + key[j] + j;
      [i, j] = [i + 1, (j + 1) % key.length];
      if (i === N) [state[0], i] = [state[N - 1], 1];
    }
    for (let k = N - 1; k > 0; k -= 1) {
      state[i] = (state[i] ^ Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1566083941)) - i;
      i += 1;
      if (i === N) [state[0], i] = [state[N - 1], 1];
    }
    state[0] = 0x80000000;
  }

  /** Return 32 random bits. */
  bits() {
    if (this.next === N) this.twist();
    let y = this.state[this.next];
    this.next += 1;
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  twist() {
    const { state } = this;
    for (let k = 0; k < N; k += 1) {
      const y = (state[k] & 0x80000000) | (state[(k + 1) % N] & 0x7fffffff);
      state[k] = state[(k + M) % N] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }

  /** Return a number from [0, 1), with 53 random bits. */
  random() {
    const high = this.bits() >>> 5;
    const low = this.bits() >>> 6;
    return (high * 2 ** 26 + low) / 2 ** 53;
  }
}
