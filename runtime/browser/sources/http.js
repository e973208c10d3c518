/**
 * A bundle below a URL. Parts of files are asked for by `Range`, so a whole weight file is never fetched for
 * one.
 */

import { BundleError, problem, refuse } from "../reader/problems.js";

/** @implements {import("../reader/bundle.js").Source} */
export class HttpSource {
  #base;
  #fetch;
  #sizes = new Map();

  /**
   * @param {string | URL} url of the bundle's directory
   * @param {{fetch?: typeof fetch, headers?: Record<string, string>, hint?: string | null}} [options]
   *   `headers` go with each request; `hint` says what to do if the server can't be reached
   */
  constructor(url, { fetch: own = (...request) => fetch(...request), headers = {}, hint = null } = {}) {
    const base = new URL(url, globalThis.document?.baseURI);
    if (!base.pathname.endsWith("/")) {
      base.pathname += "/";
    }
    this.#base = base;
    this.#fetch = own;
    this.headers = headers;
    this.hint = hint;
  }

  /** What a server gives is a file: HTTP knows neither links nor directories. A size is asked for once. */
  async stat(path) {
    if (!this.#sizes.has(path)) {
      const size = await this.#size(path);
      if (size === null) {
        return null;
      }
      this.#sizes.set(path, size);
    }
    return { kind: "file", size: this.#sizes.get(path) };
  }

  async #size(path) {
    const answer = await this.#ask(path, { method: "HEAD" });
    if (answer.status === 404 || answer.status === 410) {
      return null;
    }
    const length = answer.headers.get("Content-Length") ?? "";
    const packed = answer.headers.get("Content-Encoding") !== null;
    return answer.ok && /^[0-9]+$/.test(length) && !packed ? Number(length) : this.#sizeByRange(path);
  }

  /** Some servers give no length to HEAD, or that of a compressed answer. */
  async #sizeByRange(path) {
    const answer = await this.#ask(path, { headers: { Range: "bytes=0-0" } });
    await answer.body?.cancel();
    const total = /^bytes (?:0-0|\*)\/([0-9]+)$/.exec(answer.headers.get("Content-Range") ?? "");
    if ((answer.status !== 206 && answer.status !== 416) || !total) {
      refuse("network.answer", path, "a size and ranges of bytes", `status ${answer.status}`);
    }
    return Number(total[1]);
  }

  /**
   * @param {string} path
   * @param {number} start
   * @param {number} end
   * @returns {Promise<Uint8Array>}
   */
  async read(path, start, end) {
    const answer = await this.#ask(path, { headers: { Range: `bytes=${start}-${end - 1}` } });
    // Of another origin, a page may see the header only if the server allows it. The length shows enough
    // then.
    const range = answer.headers.get("Content-Range") ?? `bytes ${start}-${end - 1}/*`;
    const [, given, total] = /^bytes ([0-9]+-[0-9]+)\/([0-9]+|\*)$/.exec(range) ?? [];
    if (answer.status !== 206 || given !== `${start}-${end - 1}`) {
      await answer.body?.cancel();
      const hint = "the server must answer requests with Range";
      refuse("network.answer", path, `bytes ${start} to ${end}`, `status ${answer.status}`, { hint });
    }
    if (total !== "*" && this.#sizes.has(path) && Number(total) !== this.#sizes.get(path)) {
      await answer.body?.cancel();
      refuse("file.size", path, `${this.#sizes.get(path)} bytes, as before`, total); // SB-D-012
    }
    return firstBytes(answer, end - start, path);
  }

  /** HTTP has no way to list files. */
  async list() {
    return null;
  }

  async #ask(path, { method = "GET", headers = {} }) {
    const url = new URL(path.split("/").map(encodeURIComponent).join("/"), this.#base);
    try {
      // A compressed answer would have other ranges than the file.
      return await this.#fetch(url, { method, headers: { ...this.headers, ...headers }, cache: "no-cache" });
    } catch (error) {
      throw new BundleError(problem("network", path, "an answer", error.message, { hint: this.hint }));
    }
  }
}

/** Read an answer of a known length, and no byte more of one that goes on. */
async function firstBytes(answer, length, path) {
  const bytes = new Uint8Array(length);
  const reader = answer.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) {
      return bytes.subarray(0, at);
    }
    if (at + value.length > length) {
      await reader.cancel();
      refuse("network.answer", path, `${length} bytes`, "more");
    }
    bytes.set(value, at);
    at += value.length;
  }
}
