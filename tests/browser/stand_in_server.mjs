// A stage for the tests of clients: it adds up the tokens of a row. tests/conformance/README.md has the
// equations.

import { randomBytes } from "node:crypto";

import { pack, unpack } from "../../runtime/browser/wire/frames.js";
import { Lost } from "../../runtime/browser/wire/http_carrier.js";

export const FINGERPRINT = `sha256:${"f".repeat(64)}`;
const INSTANCE = "0".repeat(32);
const LIMITS = { message: 4096, rows: 4, capacity: 32, slots: 64, sessions: 3, tickets: 2, lease: 60 };

/** A refusal: the code, and what the client may do. */
class Refusal extends Error {
  constructor(code, retry = "never") {
    super(code);
    this.code = code;
    this.retry = retry;
  }
}

/** A server of one row a session, and what brings frames to it. */
export class StandInServer {
  /** @param {{lies?: object}} [options] `lies`: members of the welcome that aren't true */
  constructor({ lies = {} } = {}) {
    this.text = "stages/trunk";
    this.lies = lies;
    this.sessions = new Map();
    this.calls = 0;
    this.ops = [];
    this.pasts = [];
    /** What goes wrong with the next frames: `before`, `after`, `damaged` or `other`. */
    this.faults = [];
    /** What every step is refused with, or null. */
    this.refusal = null;
  }

  async call(frame) {
    const fault = this.faults.shift();
    if (fault === "before") throw new Lost("it broke before the server had it");
    const answer = this.answer(frame);
    if (fault === "after") throw new Lost("it broke after the server had it");
    if (fault === "damaged") return answer.subarray(0, answer.length - 1);
    if (fault === "other") return pack({ op: "closed" });
    return answer;
  }

  send(frame) {
    this.answer(frame);
  }

  answer(frame) {
    try {
      const { message, payload } = unpack(frame, LIMITS.message);
      this.ops.push(message.op);
      return this[message.op](message, payload, frame);
    } catch (failure) {
      // A fault of this file.
      if (!(failure instanceof Refusal) && failure.problems === undefined) throw failure;
      const code = failure.code ?? failure.problems[0].code;
      const retry = failure.retry ?? (code.startsWith("peer.") ? "other" : "never");
      return pack({ op: "error", code, expected: "another one", got: "this one", argument: null, retry });
    }
  }

  hello({ protocol, fingerprint, layers }) {
    if (protocol !== 1) throw new Refusal("peer.protocol", "other");
    const lying = Object.keys(this.lies).length > 0;
    if (!lying && (fingerprint ?? FINGERPRINT) !== FINGERPRINT) {
      throw new Refusal("peer.fingerprint", "other");
    }
    if (!lying && String(layers ?? [1, 3]) !== "1,3") throw new Refusal("peer.layers", "other");
    return pack({
      op: "welcome", protocol: 1, fingerprint: FINGERPRINT, bundle: `sha256:${"b".repeat(64)}`, layers: [
        1, 3,
      ],
      width: 2, dtype: "float32", encodings: ["float32"], backend: "none", version: "1", instance: INSTANCE,
      trainable: true, number: 0, limits: LIMITS, ...this.lies,
    });
  }

  open({ rows, capacity }) {
    if (rows > LIMITS.rows || capacity > LIMITS.capacity) throw new Refusal("session.capacity");
    const held = [...this.sessions.values()].reduce((sum, each) => sum + each.rows * each.capacity, 0);
    if (this.sessions.size >= LIMITS.sessions || held + rows * capacity > LIMITS.slots) {
      throw new Refusal("server.full", "other");
    }
    const session = randomBytes(16).toString("hex");
    this.sessions.set(session, { rows, capacity, number: 0, tokens: Array.from({ length: rows }, () => []) });
    return pack({ op: "opened", session, instance: "0".repeat(32), lease: LIMITS.lease });
  }

  found(name) {
    const session = this.sessions.get(name);
    if (session === undefined) throw new Refusal("session.unknown", "replay");
    return session;
  }

  run(message, payload, frame) {
    const session = this.found(message.session);
    const digits = Buffer.from(frame).toString("hex");
    if (message.number === session.number && session.number > 0) {
      if (session.frame === digits) return session.answer;
      throw new Refusal("session.repeat", "replay");
    }
    if (message.number !== session.number + 1) throw new Refusal("session.gap", "replay");
    if (this.refusal !== null) throw new Refusal(this.refusal.code, this.refusal.retry);
    const capacity = message.capacity ?? session.capacity;
    if (capacity < session.capacity || capacity > LIMITS.capacity) throw new Refusal("session.capacity");
    if (message.past.length !== session.rows) throw new Refusal("input.shape");
    const numbers = [...new Float32Array(payload.slice().buffer)];
    const held = message.past.map((past, row) => {
      if (past > session.tokens[row].length) throw new Refusal("input.position");
      if (past + message.count[row] > capacity) throw new Refusal("session.capacity");
      const own = Array.from({ length: message.count[row] }, () => numbers.splice(0, 2));
      return [...session.tokens[row].slice(0, past), ...own];
    });
    const found = held.flatMap((tokens, row) => tokens
      .map(
        (_, i) => [0, 1].map((each) => tokens.slice(0, i + 1).reduce((sum, token) => sum + token[each], 0)),
      )
      .slice(message.past[row]));
    this.calls += 1;
    this.pasts.push(...message.past);
    Object.assign(session, { tokens: held, capacity, number: message.number, frame: digits });
    const { number, width, encoding } = message;
    const ran = {
      op: "ran", number, instance: INSTANCE, tokens: found.length, width, encoding, queued: 0, computed: 0,
    };
    session.answer = pack(ran, new Uint8Array(Float32Array.from(found.flat()).buffer));
    return session.answer;
  }

  renew({ session }) {
    this.found(session);
    return pack({ op: "renewed", lease: LIMITS.lease });
  }

  close({ session }) {
    this.found(session);
    this.sessions.delete(session);
    return pack({ op: "closed" });
  }
}
