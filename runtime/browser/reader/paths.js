/** Paths and names (SB-D-002, SB-D-003, SB-M-021), and the order of paths by their bytes. */

const DEVICE = "(?:con|prn|aux|nul|com[0-9]|lpt[0-9])";
const PART = new RegExp(`^(?!${DEVICE}(?:[.]|$))[a-z0-9_](?:[a-z0-9._-]{0,98}[a-z0-9_-])?$`);
const SHARD = new RegExp(`^(?!${DEVICE}$)[a-z0-9][a-z0-9_-]{0,63}$`);
const RESERVED = new Set(["manifest.json", "sha256sums", "signatures"]);
const MOST_PARTS = 4;

/** Whether text is one part of a path. In ECMAScript, `$` without flags is the end of the text alone. */
export function isPart(text) {
  return PART.test(text);
}

/** Whether a key of `files` is a path by SB-D-002. */
export function isPath(text) {
  const parts = text.split("/", MOST_PARTS + 1);
  if (text === "README.md") {
    return true;
  }
  return parts.length <= MOST_PARTS && parts.every(isPart) && !RESERVED.has(parts[0]);
}

/** SB-M-021 */
export function isShardName(text) {
  return SHARD.test(text);
}

/** SB-D-014: a signature's path. Its kind and size are judged elsewhere. */
export function isSignature(path) {
  const match = /^signatures\/(.*)$/s.exec(path);
  return match !== null && match[1].endsWith(".sigstore.json") && isPart(match[1]);
}

/** Compare paths by their bytes. Listed paths are ASCII, so this is the order of code units. */
export function byBytes(one, other) {
  return one < other ? -1 : one > other ? 1 : 0;
}

/** The directories on the way to a path: `a/b/c` has `a` and `a/b`. */
export function parents(path) {
  const parts = path.split("/");
  return parts.slice(1).map((_, i) => parts.slice(0, i + 1).join("/"));
}
