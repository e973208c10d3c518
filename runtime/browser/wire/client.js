// The client of a stage (spec/v1/wire.md): each step is computed once, by a server that holds the right
// cache.

import { decode, encode } from "./encodings.js";
import { pack, unpack } from "./frames.js";
import { Lost } from "./http_carrier.js";
import { ANSWERS, PROTOCOL } from "./messages.js";
import { refusal, refuse } from "./refusal.js";

const FIRST_WAIT = 100; // milliseconds; each further one is twice as long
const LAST_WAIT = 3000;
/**
 * How often one step may begin a new session: a server that always loses it mustn't keep a client for ever.
 */
const MOST_REPLAYS = 10;
/** How often a server may damage a frame, or answer something else, while it lives. */
const MOST_DAMAGED = 3;
const FIRST_CAPACITY = 256;
/** Milliseconds without an answer after which a user is told. */
const SILENCE = 2000;

/** A refusal of the server, with what the client may do: `never`, `same`, `other` or `replay`. */
function refused({ code, argument, expected, got, retry }, where) {
  const error = refusal(code, argument === null ? where : `${where}, ${argument}`, expected, got);
  error.retry = retry;
  return error;
}

/** A stage on another machine, which holds neither the embedding nor the head. */
export class StageClient {
  /**
   * Name a stage. Nothing is sent yet.
   *
   * @param {import("./http_carrier.js").HttpCarrier} carrier
   * @param {{name: string, fingerprint: string, layers: number[], width: number}} expected from the own
   *   bundle
   * @param {{encoding?: string, patience?: number, onWait?: (waits: boolean) => void}} [options] the
   *   encoding, if not the exact one (SB-X-007); the seconds after which a server that doesn't answer is
   *   given up; what is called after 2 s without an answer, and with false when this wait has ended
   */
  constructor(carrier, expected, { encoding = null, patience = 30, onWait = () => {} } = {}) {
    this.carrier = carrier;
    this.expected = expected;
    this.asked = encoding;
    this.patience = 1000 * patience;
    this.onWait = onWait;
    this.welcome = null;
    this.where = `stage ${expected.name} at ${carrier.text}`;
  }

  get name() {
    return this.expected.name;
  }

  /** The encoding of hidden states on the way: by default that of the dtype in which the stage computes. */
  get encoding() {
    return this.asked ?? this.welcome.dtype;
  }

  /**
   * Ask the server what it is, and compare it with the own model. Nothing else is sent before (SB-X-010).
   *
   * @param {AbortSignal} [signal]
   * @throws {BundleError} `peer.*`
   */
  async connect(signal) {
    const { fingerprint, layers, width } = this.expected;
    const { message } = await this.exchange(
      { op: "hello", protocol: PROTOCOL, fingerprint, layers }, null, signal,
    );
    this.compare("peer.protocol", PROTOCOL, message.protocol);
    this.compare("peer.fingerprint", fingerprint, message.fingerprint);
    if (message.number > 0) {
      this.compare("peer.fingerprint", fingerprint, `weights that were trained for ${message.number} steps`);
    }
    this.compare("peer.layers", layers.join(" to "), message.layers.join(" to "));
    this.compare("peer.layers", `a width of ${width}`, `a width of ${message.width}`);
    this.compare("peer.dtype", this.welcome?.dtype ?? message.dtype, message.dtype);
    const encoding = this.asked ?? message.dtype;
    if (!message.encodings.includes(encoding)) {
      refuse("peer.encoding", this.where, `one of ${message.encodings.join(", ")}`, encoding);
    }
    this.welcome = message;
  }

  compare(code, expected, got) {
    if (expected !== got) refuse(code, this.where, String(expected), String(got));
  }

  /**
   * Begin a cache of one row on the server. The first step opens it there.
   *
   * @returns {RemoteSession}
   */
  begin() {
    return new RemoteSession(this);
  }

  /**
   * Return the answer to a request. Where there is none, the same frame is sent again: a step is computed
   * once (SB-X-013, SB-X-017).
   *
   * @param {object} request
   * @param {Uint8Array | null} payload
   * @param {AbortSignal} [signal]
   * @returns {Promise<{message: object, payload: Uint8Array}>}
   * @throws {BundleError} what the server refused, with `retry`; `peer.unreachable`
   */
  async exchange(request, payload, signal) {
    const frame = pack(request, payload ?? undefined);
    if (this.welcome !== null && frame.length > this.welcome.limits.message) {
      const expected = `a frame of at most ${this.welcome.limits.message} bytes`;
      refuse("wire.size", this.where, expected, `${frame.length} bytes`);
    }
    let told = false;
    const timer = setTimeout(() => {
      told = true;
      this.onWait(true);
    }, SILENCE);
    try {
      return await this.answerTo(frame, request, signal);
    } finally {
      clearTimeout(timer);
      if (told) this.onWait(false);
    }
  }

  /** Send a frame until its answer comes. */
  async answerTo(frame, request, signal) {
    const until = Date.now() + this.patience;
    let wait = FIRST_WAIT;
    for (let damaged = 0; ; ) {
      let reason;
      try {
        const answer = unpack(await this.carrier.call(frame, signal));
        if (answer.message.op === "error") throw refused(answer.message, this.where);
        if (fits(request, answer.message)) return answer;
        damaged += 1;
        reason = `an answer of the kind ${answer.message.op} that belongs to another request`;
      } catch (failure) {
        if (failure instanceof Lost) reason = failure.message;
        else if (failure.retry === "same" || isDamage(failure)) {
          damaged += 1;
          reason = failure.message;
        } else throw failure;
      }
      if (damaged > MOST_DAMAGED || Date.now() >= until) {
        const hint = "Try again: what was computed so far is kept";
        throw refusal("peer.unreachable", this.where, "a server that answers", reason, hint);
      }
      await pause(wait, signal);
      wait = Math.min(2 * wait, LAST_WAIT);
    }
  }
}

/** A KV cache of one row on the server, and what has to be sent again if it is lost. */
export class RemoteSession {
  /** @param {StageClient} client */
  constructor(client) {
    this.client = client;
    this.id = null;
    this.number = 0;
    this.capacity = 0;
    /** @type {{past: number, count: number, payload: Uint8Array}[]} the calls whose tokens the cache holds */
    this.history = [];
  }

  /** The number of tokens that the cache holds. */
  get held() {
    const last = this.history.at(-1);
    return last === undefined ? 0 : last.past + last.count;
  }

  /**
   * Compute the stage for some tokens.
   *
   * @param {{hidden: Float32Array, past: number, count: number}} call `hidden` is (count, width); tokens from
   *   `past` on are forgotten first
   * @param {AbortSignal} [signal]
   * @returns {Promise<{hidden: Float32Array, queued: number, computed: number}>} microseconds of the server,
   *   too
   * @throws {BundleError} `peer.*`, `wire.*`, `session.capacity`, and what the server refuses
   */
  async run({ hidden, past, count }, signal) {
    const { width } = this.client.expected;
    if (past > this.held) refuse("input.position", "past", `at most ${this.held}`, String(past));
    const payload = encode(hidden, this.client.encoding, width);
    const call = { past, count, payload };
    // A call whose tokens are all forgotten isn't needed. The others are sent again as they were (SB-X-018).
    const kept = this.history.filter((each) => each.past < past);
    const until = Date.now() + this.client.patience;
    let answer = null;
    for (let replays = 0; answer === null; replays += 1) {
      try {
        if (this.id === null) await this.replay(kept, past + count, signal);
        answer = await this.step(call, signal);
      } catch (failure) {
        if (!["replay", "other"].includes(failure.retry)) {
          // It may have been computed: the next step begins anew.
          if (failure.retry !== "never") this.abandon();
          throw failure;
        }
        const late = failure.retry === "other" && Date.now() >= until;
        if (late || replays >= MOST_REPLAYS) throw failure;
        this.id = null;
        if (signal?.aborted) throw signal.reason;
        await pause(failure.retry === "other" ? LAST_WAIT : replays * FIRST_WAIT, signal);
        await this.client.connect(signal);
      }
    }
    this.history = [...kept, call];
    const { message } = answer;
    const found = decode(answer.payload, message.encoding, message.tokens, message.width);
    return { hidden: found, queued: message.queued, computed: message.computed };
  }

  /** Begin a new session on the server, and send what it has to hold. */
  async replay(calls, slots, signal) {
    const most = this.client.welcome.limits.capacity;
    if (slots > most) refuse("session.capacity", this.client.where, `at most ${most} tokens`, String(slots));
    const capacity = Math.min(most, Math.max(FIRST_CAPACITY, slots));
    const { message } = await this.client.exchange({ op: "open", rows: 1, capacity }, null, signal);
    this.id = message.session;
    this.number = 0;
    this.capacity = capacity;
    for (const call of calls) await this.step(call, signal);
  }

  async step({ past, count, payload }, signal) {
    const { welcome, expected, encoding } = this.client;
    const slots = past + count;
    const request = {
      op: "run", session: this.id, number: this.number + 1, past: [past], count: [count], sequence: count,
      width: expected.width, encoding,
    };
    if (slots > this.capacity) {
      const most = welcome.limits.capacity;
      if (slots > most) {
        refuse("session.capacity", this.client.where, `at most ${most} tokens`, String(slots));
      }
      request.capacity = Math.min(most, Math.max(slots, 2 * this.capacity));
    }
    const answer = await this.client.exchange(request, payload, signal);
    this.number += 1;
    this.capacity = request.capacity ?? this.capacity;
    return answer;
  }

  /** Keep the session on the server for another lease. If it has ended, the next step begins a new one. */
  async renew(signal) {
    if (this.id === null) return;
    try {
      await this.client.exchange({ op: "renew", session: this.id }, null, signal);
    } catch (failure) {
      if (failure.retry !== "replay") throw failure;
      this.id = null;
    }
  }

  /** End the session on the server. An answer doesn't matter: otherwise it ends with its lease. */
  async end() {
    this.abandon();
    this.history = [];
  }

  /** Let go of the session. If the next step comes, it begins a new one. */
  abandon() {
    if (this.id !== null) this.client.carrier.send(pack({ op: "close", session: this.id }));
    this.id = null;
  }
}

/** Whether an answer says of itself that it belongs to a request. */
function fits(request, answer) {
  if (answer.op !== ANSWERS[request.op]) return false;
  if (answer.op !== "ran") return true;
  const tokens = request.count.reduce((sum, each) => sum + each, 0);
  const same = ["number", "width", "encoding"].every((name) => answer[name] === request[name]);
  return same && answer.tokens === tokens;
}

/** Whether an answer was no frame. The server may have computed, so the same frame is sent again. */
const isDamage = ({ problems, retry }) =>
  retry === undefined && /^(json|field|wire\.(frame|header|payload))/.test(problems?.[0].code ?? "");

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(signal.reason);
      return;
    }
    const timer = setTimeout(done, milliseconds);
    function done() {
      signal?.removeEventListener("abort", stop);
      resolve();
    }
    function stop() {
      clearTimeout(timer);
      reject(signal.reason);
    }
    signal?.addEventListener("abort", stop, { once: true });
  });
}
