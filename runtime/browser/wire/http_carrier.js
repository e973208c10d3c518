// Brings frames to a stage over HTTP, by way of a gateway: one POST a frame. Only bytes pass through it.

import { MOST_FRAME } from "./frames.js";
import { refuse } from "./refusal.js";

const REQUEST = {
  method: "POST", cache: "no-store", credentials: "omit", redirect: "error", referrerPolicy: "no-referrer",
};

/** A frame has no answer: the stage can't be reached, is silent, or is busy. */
export class Lost extends Error {
  constructor(reason) {
    super(reason);
    this.name = "Lost";
  }
}

/** A way to one stage: the URL of a gateway that takes frames for it. */
export class HttpCarrier {
  /**
   * @param {string} url such as `stages/trunk`, below the page
   * @param {{headers?: () => Object<string, string>, timeout?: number, fetch?: typeof fetch}} [options]
   *   `headers` is asked before each request, as a key may come later; `timeout` is in seconds
   */
  constructor(url, { headers = () => ({}), timeout = 300, fetch: own } = {}) {
    this.text = url;
    this.headers = headers;
    this.timeout = timeout;
    this.fetch = own ?? ((...args) => fetch(...args));
  }

  /**
   * Return the answer to a frame.
   *
   * @param {Uint8Array} frame
   * @param {AbortSignal} [signal] ends the wait; the frame may be computed all the same (SB-X-017)
   * @returns {Promise<Uint8Array>}
   * @throws {Lost} if there is no answer
   * @throws {BundleError} `peer.identity`, `wire.size`, `peer.unreachable` where sending it again is of no
   *   use
   * @throws {DOMException} `AbortError` if the signal ended the wait
   */
  async call(frame, signal) {
    signal?.throwIfAborted();
    const stop = new AbortController();
    const heed = () => stop.abort(signal.reason);
    let silent = false;
    const timer = setTimeout(() => {
      silent = true;
      stop.abort();
    }, 1000 * this.timeout);
    signal?.addEventListener("abort", heed, { once: true });
    try {
      const options = { ...REQUEST, body: frame, headers: this.ownHeaders(), signal: stop.signal };
      const answer = await this.fetch(this.text, options);
      if (!answer.ok) await this.fail(answer);
      return await bodyOf(answer, this.text);
    } catch (failure) {
      if (signal?.aborted) throw signal.reason;
      if (silent) throw new Lost(`no answer in ${this.timeout} s`);
      if (failure instanceof TypeError) throw new Lost(`no connection: ${failure.message}`);
      throw failure;
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener("abort", heed);
    }
  }

  /**
   * Send a frame whose answer doesn't matter, also from a page that is being closed.
   *
   * @param {Uint8Array} frame
   */
  send(frame) {
    const options = { ...REQUEST, body: frame, headers: this.ownHeaders(), keepalive: true };
    this.fetch(this.text, options).then((answer) => answer.body?.cancel()).catch(() => {});
  }

  ownHeaders() {
    return { "Content-Type": "application/vnd.splitbundle.frame", ...this.headers() };
  }

  async fail(answer) {
    await answer.body?.cancel();
    const { status } = answer;
    const where = this.text;
    if (status === 401 || status === 403) {
      const got = status === 401 ? "another one, or none" : "403";
      refuse("peer.identity", where, "a key that the gateway knows", got);
    }
    if (status === 404 || status === 405) {
      refuse("peer.unreachable", where, "a gateway that has this stage", `status ${status}`);
    }
    if (status === 413) refuse("wire.size", where, "a frame that the gateway takes", "a longer one");
    throw new Lost(`status ${status}`); // also 429 and 503: the gateway has no time now
  }
}

/** Return the bytes of an answer. Its length is limited before memory is taken for it (SB-X-006). */
async function bodyOf(answer, where) {
  const pieces = [];
  let size = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > MOST_FRAME) {
      await reader.cancel();
      refuse("wire.size", where, `at most ${MOST_FRAME} bytes`, "a longer answer");
    }
    pieces.push(value);
  }
  if (pieces.length === 1) return pieces[0];
  const whole = new Uint8Array(size);
  let at = 0;
  for (const piece of pieces) {
    whole.set(piece, at);
    at += piece.length;
  }
  return whole;
}
