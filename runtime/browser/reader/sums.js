/** `SHA256SUMS` (SB-D-010). */

import { byBytes } from "./paths.js";
import { refuse } from "./problems.js";

const FILE = "SHA256SUMS";
const MANIFEST = "manifest.json";
const DIGITS = 64;

/**
 * The only content that it may have.
 *
 * @param {Record<string, {sha256: string}>} files of the manifest
 * @param {string} manifestDigest
 * @returns {string}
 */
export function sumsOf(files, manifestDigest) {
  const digests = new Map(Object.entries(files).map(([path, { sha256 }]) => [path, sha256]));
  digests.set(MANIFEST, manifestDigest);
  const paths = [...digests.keys()].sort(byBytes);
  return paths.map((path) => `${digests.get(path)}  ${path}\n`).join("");
}

/**
 * Compare the content. It has the right size.
 *
 * @param {Uint8Array} bytes
 * @param {string} wanted
 * @param {string} manifestDigest
 * @throws {BundleError} sums.mismatch
 */
export function checkSums(bytes, wanted, manifestDigest) {
  const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  if (text === wanted) {
    return;
  }
  const lines = text.split("\n");
  const own = lines.find((line) => line.endsWith(`  ${MANIFEST}`)) ?? "";
  const digest = /^[0-9a-f]{64}(?= )/.exec(own)?.[0] ?? manifestDigest;
  const differing = [...digest].filter((digit, i) => digit !== manifestDigest[i]).length;
  // Two digests of two manifests differ nearly everywhere. A few other digits are damage to this file.
  if (differing > DIGITS / 2) {
    refuse("sums.mismatch", MANIFEST, `the manifest that SHA256SUMS lists, ${digest}`, manifestDigest);
  }
  refuse("sums.mismatch", FILE, "a line for each listed file, sorted", "other lines");
}
