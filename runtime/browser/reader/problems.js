/**
 * What is wrong with a bundle: the codes of spec/v1/bundle.md, section "Errors".
 *
 * @typedef {object} Problem
 * @property {string} code one of the codes of SB-E-001
 * @property {string | null} file the path inside the bundle
 * @property {string | null} pointer an RFC 6901 pointer into a JSON document
 * @property {number | null} offset a byte of the file
 * @property {string} expected
 * @property {string} got
 * @property {string | null} hint what to do
 * @property {string} [argument] what a caller gave, if no file is at fault
 */

/** A reader stops collecting problems of one group here (SB-E-002). */
export const MOST_PROBLEMS = 100;

/**
 * A bundle, or a part of one, that is refused. `problems` holds at least one problem, the first one first.
 */
export class BundleError extends Error {
  /** @param {Problem | Problem[]} problems */
  constructor(problems) {
    const all = Array.isArray(problems) ? problems : [problems];
    super(all.map(describe).join("\n"));
    this.name = "BundleError";
    this.problems = all;
  }
}

/**
 * Make a problem.
 *
 * @param {string} code
 * @param {string | null} file
 * @param {string} expected
 * @param {unknown} got shown shortly, whatever it is
 * @param {{pointer?: string | null, offset?: number | null, hint?: string | null, argument?: string}} [place]
 * @returns {Problem}
 */
export function problem(code, file, expected, got, place = {}) {
  const { pointer = null, offset = null, hint = null, argument } = place;
  const found = { code, file, pointer, offset, expected, got: shown(got), hint };
  return argument === undefined ? found : { ...found, argument };
}

/** Throw one problem. Takes the arguments of `problem`. */
export function refuse(...args) {
  throw new BundleError(problem(...args));
}

/** Show any value in at most 80 characters of printable text. */
export function shown(value) {
  if (typeof value === "string" && /^[\x20-\x7e]*$/.test(value) && value.length <= 80) {
    return value;
  }
  let text;
  if (value instanceof Map) {
    text = "an object";
  } else if (Array.isArray(value)) {
    text = `an array of ${value.length}`;
  } else if (typeof value === "string") {
    text = JSON.stringify(value.slice(0, 80));
  } else if (value !== null && typeof value === "object" && "fraction" in value) {
    text = String(value.fraction);
  } else {
    text = String(value);
  }
  const plain = text.replace(/[^\x20-\x7e]/g, "?");
  return plain.length > 80 ? `${plain.slice(0, 77)}...` : plain;
}

/** Escape a key for a pointer (RFC 6901). */
export function escaped(key) {
  return String(key).replaceAll("~", "~0").replaceAll("/", "~1");
}

function describe({ code, file, pointer, argument, expected, got, hint }) {
  const place = [file, pointer, argument].filter((part) => part).join(" ");
  return `[${code}] ${place ? `${place}: ` : ""}expected ${expected}, got ${got}${hint ? ` (${hint})` : ""}`;
}

/** Collects the problems of one group about one file (SB-E-002). */
export class Collector {
  /** @param {string | null} file */
  constructor(file) {
    this.file = file;
    /** @type {Problem[]} */
    this.problems = [];
  }

  /** Whether enough problems are collected, so that looking for more would only take time. */
  get full() {
    return this.problems.length >= MOST_PROBLEMS;
  }

  /**
   * @param {string} code
   * @param {string} pointer
   * @param {string} expected
   * @param {unknown} got
   */
  add(code, pointer, expected, got) {
    if (!this.full) {
      this.problems.push(problem(code, this.file, expected, got, { pointer }));
    }
  }

  /** End the group: throw if anything was wrong. */
  close() {
    if (this.problems.length) {
      throw new BundleError(this.problems);
    }
  }
}
