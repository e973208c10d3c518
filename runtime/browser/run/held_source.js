// A source whose listed files come from memory, each read once and hashed there: strict opening (SB-D-011).

import { openBundle } from "../reader/bundle.js";
import { refuse } from "../reader/problems.js";

/**
 * Open a bundle once more, over bytes that were hashed before they are used.
 *
 * @param {object} bundle what `openBundle` returned
 * @param {(path: string) => void} [onFile] called before a file is read
 * @returns {Promise<object>} the same bundle, whose files are what its digests say
 * @throws {BundleError} `file.changed` if another bundle is there by now (SB-D-012)
 */
export async function openHeld(bundle, onFile = () => {}) {
  const found = await openBundle(new HeldSource(bundle, onFile));
  if (found.id !== bundle.id) refuse("file.changed", "manifest.json", bundle.id, found.id);
  return found;
}

/** @implements {import("../reader/bundle.js").Source} */
class HeldSource {
  #held = new Map();
  #unit = null;

  constructor(bundle, onFile) {
    this.bundle = bundle;
    this.onFile = onFile;
    this.source = bundle.files.source;
    const units = Object.entries(bundle.manifest.units);
    this.units = new Map(units.flatMap(([unit, { files }]) => files.map((path) => [path, unit])));
  }

  stat(path) {
    return this.source.stat(path);
  }

  async list() {
    return null;
  }

  async read(path, start, end) {
    if (!Object.hasOwn(this.bundle.manifest.files, path)) return this.source.read(path, start, end);
    // The files of one unit at a time are held: a stage takes its units one after the other.
    const unit = this.units.get(path) ?? path;
    if (unit !== this.#unit) this.#held.clear();
    this.#unit = unit;
    if (!this.#held.has(path)) {
      this.onFile(path);
      this.#held.set(path, await this.bundle.bytes(path));
    }
    return this.#held.get(path).subarray(start, end);
  }
}
