/** Helpers of the tests: the small bundles, and copies of them in memory that can be changed. */

import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

import { BundleError } from "../../runtime/browser/reader/problems.js";

const BUNDLES = fileURLToPath(new URL("../conformance/bundles", import.meta.url));

/** @returns {string} the directory of `tiny` or `quantized` */
export function bundleDirectory(name) {
  return join(BUNDLES, `${name}.splitbundle`);
}

/** A source in memory. `files` maps paths to bytes, and may be changed. It counts what is read. */
export class MemorySource {
  constructor(name) {
    const root = bundleDirectory(name);
    const entries = readdirSync(root, { recursive: true, withFileTypes: true });
    this.files = new Map();
    this.opened = [];
    for (const entry of entries.filter((each) => each.isFile())) {
      const place = join(entry.parentPath ?? entry.path, entry.name);
      this.files.set(place.slice(root.length + 1).replaceAll("\\", "/"), new Uint8Array(readFileSync(place)));
    }
  }

  async stat(path) {
    const bytes = this.files.get(path);
    return bytes ? { kind: "file", size: bytes.length } : null;
  }

  async read(path, start, end) {
    this.opened.push(path);
    return this.files.get(path).slice(start, end);
  }

  async list() {
    return [...this.files.keys()].map((path) => ({ path, kind: "file" }));
  }
}

/** Assert that a call is refused with this code, of this file. Returns the first problem. */
export async function refused(call, code, file) {
  let caught = null;
  try {
    await call();
  } catch (error) {
    caught = error;
  }
  assert.ok(caught instanceof BundleError, `expected ${code}, got ${caught?.stack ?? "nothing"}`);
  const [first] = caught.problems;
  assert.equal(first.code, code);
  if (file !== undefined) {
    assert.equal(first.file, file);
  }
  return first;
}
