/** Reading listed files of a source, with the refusals of SB-D-004 to SB-D-008. */

import { BundleError, problem, refuse } from "./problems.js";
import { Sha256, sha256OfAll } from "./sha256.js";

const CHUNK = 1 << 22;
/** A file up to this size is held as a whole while it is hashed, as the system then hashes it. */
const LARGEST_HELD = 1 << 26;
const HINTS = { link: "a link", directory: "a directory", other: "a device, a pipe or a socket" };

/** The files of one bundle. `listed` is the manifest's `files`. */
export class Files {
  /**
   * @param {import("./bundle.js").Source} source
   * @param {Record<string, {size: number, sha256: string}>} [listed]
   */
  constructor(source, listed = Object.create(null)) {
    this.source = source;
    this.listed = listed;
  }

  /**
   * Check that a file is there, and of its kind and size. Opens nothing.
   *
   * @param {string} path
   * @returns {Promise<import("./problems.js").Problem | null>}
   */
  async fault(path) {
    const found = await this.source.stat(path);
    if (found === null) {
      return problem("file.missing", path, "the file", "nothing", { hint: "the bundle is partial" });
    }
    if (found.kind !== "file") {
      return problem("file.kind", path, "a regular file", HINTS[found.kind]); // SB-D-004
    }
    const size = this.listed[path]?.size ?? found.size;
    return found.size === size ? null : problem("file.size", path, `${size} bytes`, found.size); // SB-D-007
  }

  /** Refuse a file that isn't there, or of another kind or size. */
  async check(path) {
    const fault = await this.fault(path);
    if (fault) {
      throw new BundleError(fault);
    }
  }

  /** @returns {Promise<boolean>} whether something is there; what it is, `check` says */
  async isThere(path) {
    return (await this.source.stat(path)) !== null;
  }

  /**
   * Read a range of a file that `check` has taken.
   *
   * @returns {Promise<Uint8Array>} exactly end - start bytes
   */
  async read(path, start, end) {
    if (!(Number.isSafeInteger(start) && start >= 0 && start <= end && Number.isSafeInteger(end))) {
      throw new RangeError(`no range of bytes: ${start} to ${end}`);
    }
    const bytes = start === end ? new Uint8Array(0) : await this.source.read(path, start, end);
    if (bytes.length !== end - start) {
      refuse("file.size", path, `bytes ${start} to ${end}`, `${bytes.length} bytes`);
    }
    return bytes;
  }

  /**
   * Hash a listed file. A large one is read and hashed in pieces.
   *
   * @param {string} path
   * @param {(done: number) => void} [onProgress]
   * @throws {BundleError} file.digest
   */
  async checkDigest(path, onProgress = () => {}) {
    const { size, sha256: wanted } = this.listed[path];
    const whole = size <= LARGEST_HELD && globalThis.crypto?.subtle ? new Uint8Array(size) : null;
    const digest = new Sha256();
    for (let at = 0; at < size; at += CHUNK) {
      const piece = await this.read(path, at, Math.min(at + CHUNK, size));
      if (whole) {
        whole.set(piece, at);
      } else {
        digest.update(piece);
      }
      onProgress(Math.min(at + CHUNK, size));
    }
    checkDigestOf(path, wanted, whole ? await sha256OfAll(whole) : digest.hex());
  }

  /**
   * Read a whole listed file, check its kind and size before, and its digest after.
   *
   * @param {string} path
   * @returns {Promise<Uint8Array>}
   */
  async bytes(path) {
    if (!(path in this.listed)) {
      throw new RangeError(`${path} isn't listed, so it isn't opened`); // SB-D-005
    }
    await this.check(path);
    const { size, sha256: wanted } = this.listed[path];
    const bytes = await this.read(path, 0, size);
    checkDigestOf(path, wanted, await sha256OfAll(bytes));
    return bytes;
  }
}

function checkDigestOf(path, wanted, got) {
  if (got !== wanted) {
    refuse("file.digest", path, wanted, got);
  }
}
