/**
 * Strict JSON: what section "JSON" of spec/v1/bundle.md allows, and nothing that can be read in two ways.
 *
 * Objects become `Map`s, so that no key (`__proto__`) has a meaning of its own. Integers become numbers. A
 * number with a fraction or an exponent becomes a `Fraction`, because an integer field refuses even `1.0`
 * (SB-J-008).
 */

import { refuse } from "./problems.js";

/** SB-J-006 */
export const MOST_BYTES = 16_777_216;
/** SB-J-010: of the characters `[`, `{` and `,` */
export const MOST_VALUES = 1_048_576;
/** SB-J-005 */
const MOST_LEVELS = 64;

const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const COMMA = 0x2c;
const COLON = 0x3a;
const OPEN_ARRAY = 0x5b;
const CLOSE_ARRAY = 0x5d;
const OPEN_OBJECT = 0x7b;
const CLOSE_OBJECT = 0x7d;
const SIMPLE_ESCAPES = new Map(
  Object.entries({ '"': '"', "\\": "\\", "/": "/", b: "\b", f: "\f", n: "\n", r: "\r", t: "\t" }),
);
const WORDS = new Map([
  ["true", true],
  ["false", false],
  ["null", null],
]);
const NOT_NUMBERS = ["NaN", "Infinity", "-Infinity"];

/** A number that was written with a fraction or an exponent. */
export class Fraction {
  /** @param {number} value */
  constructor(value) {
    this.fraction = value;
  }
}

/**
 * Parse one document.
 *
 * @param {Uint8Array} bytes
 * @param {string} file named in problems
 * @param {{mostBytes?: number, mostValues?: number}} [limits]
 * @returns {unknown} a Map, an array, a string, a number, a Fraction, a boolean or null
 * @throws {BundleError} json.*
 */
export function parseJson(bytes, file, { mostBytes = MOST_BYTES, mostValues = MOST_VALUES } = {}) {
  if (bytes.length > mostBytes) {
    refuse("json.size", file, `at most ${mostBytes} bytes`, bytes.length);
  }
  let values = 0;
  for (let i = 0; i < bytes.length; i++) {
    const byte = bytes[i];
    if (byte === OPEN_ARRAY || byte === OPEN_OBJECT || byte === COMMA) {
      values++;
    }
  }
  if (values > mostValues) {
    refuse("json.size", file, `at most ${mostValues} of the characters [ { ,`, values);
  }
  return new Parser(decode(bytes, file), file).document();
}

function decode(bytes, file) {
  if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) {
    refuse("json.encoding", file, "UTF-8 without a byte order mark", "a byte order mark", { offset: 0 });
  }
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return refuse("json.encoding", file, "UTF-8", "other bytes");
  }
}

class Parser {
  constructor(text, file) {
    this.text = text;
    this.file = file;
    this.at = 0;
    /** Where a string with half of a pair begins. The grammar of all comes first (SB-J-011). */
    this.lone = null;
  }

  document() {
    const value = this.value(1);
    this.space();
    if (this.at < this.text.length) {
      this.fault("json.syntax", "the end of the document");
    }
    if (this.lone !== null) {
      this.at = this.lone;
      this.fault("json.encoding", "surrogates in pairs");
    }
    return value;
  }

  fault(code, expected) {
    const rest = this.text.slice(this.at, this.at + 20);
    refuse(code, this.file, expected, rest === "" ? "the end" : rest, { offset: this.offset() });
  }

  /** Offsets are in bytes. Only a refusal pays for counting them. */
  offset() {
    return new TextEncoder().encode(this.text.slice(0, this.at)).length;
  }

  space() {
    for (;;) {
      const code = this.text.charCodeAt(this.at);
      if (code !== 0x20 && code !== 0x0a && code !== 0x0d && code !== 0x09) {
        return;
      }
      this.at++;
    }
  }

  /** @param {number} level SB-J-005: the document is level 1 */
  value(level) {
    this.space();
    if (level > MOST_LEVELS && this.at < this.text.length) {
      this.fault("json.depth", `at most ${MOST_LEVELS} levels`);
    }
    switch (this.text.charCodeAt(this.at)) {
      case OPEN_OBJECT:
        return this.object(level);
      case OPEN_ARRAY:
        return this.array(level);
      case QUOTE:
        return this.string();
      default:
        return this.scalar();
    }
  }

  object(level) {
    const members = new Map();
    this.at++;
    this.space();
    if (this.take(CLOSE_OBJECT)) {
      return members;
    }
    do {
      this.space();
      const start = this.at;
      if (this.text.charCodeAt(start) !== QUOTE) {
        this.fault("json.syntax", "a key");
      }
      const key = this.string();
      if (members.has(key)) {
        this.at = start;
        this.fault("json.duplicate-key", "keys that differ");
      }
      this.space();
      if (!this.take(COLON)) {
        this.fault("json.syntax", "a colon");
      }
      members.set(key, this.value(level + 1));
      this.space();
    } while (this.take(COMMA));
    if (!this.take(CLOSE_OBJECT)) {
      this.fault("json.syntax", "a comma or the end of the object");
    }
    return members;
  }

  array(level) {
    const items = [];
    this.at++;
    this.space();
    if (this.take(CLOSE_ARRAY)) {
      return items;
    }
    do {
      items.push(this.value(level + 1));
      this.space();
    } while (this.take(COMMA));
    if (!this.take(CLOSE_ARRAY)) {
      this.fault("json.syntax", "a comma or the end of the array");
    }
    return items;
  }

  take(code) {
    if (this.text.charCodeAt(this.at) !== code) {
      return false;
    }
    this.at++;
    return true;
  }

  string() {
    const { text } = this;
    const begin = this.at;
    let from = ++this.at;
    let parts = "";
    let surrogates = false;
    for (;;) {
      const code = text.charCodeAt(this.at);
      if (code === QUOTE) {
        break;
      } else if (code === BACKSLASH) {
        parts += text.slice(from, this.at);
        const part = this.escape();
        surrogates ||= part >= "\ud800" && part <= "\udfff";
        parts += part;
        from = this.at;
      } else if (code >= 0x20) {
        this.at++;
      } else {
        this.fault("json.syntax", "a character of a string, or its end");
      }
    }
    const value = parts + text.slice(from, this.at++);
    if (surrogates && loneSurrogate(value)) {
      this.lone ??= begin;
    }
    return value;
  }

  escape() {
    const letter = this.text[this.at + 1];
    const simple = SIMPLE_ESCAPES.get(letter);
    if (simple !== undefined) {
      this.at += 2;
      return simple;
    }
    const digits = this.text.slice(this.at + 2, this.at + 6);
    if (letter !== "u" || !/^[0-9a-fA-F]{4}$/.test(digits)) {
      this.fault("json.syntax", "an escape of JSON");
    }
    this.at += 6;
    return String.fromCharCode(parseInt(digits, 16));
  }

  scalar() {
    const code = this.text.charCodeAt(this.at);
    if (code === 0x2d || (code >= 0x30 && code <= 0x39)) {
      return this.number();
    }
    for (const [word, value] of WORDS) {
      if (this.text.startsWith(word, this.at)) {
        this.at += word.length;
        return value;
      }
    }
    if (NOT_NUMBERS.some((word) => this.text.startsWith(word, this.at))) {
      this.fault("json.number", "a number of JSON");
    }
    return this.fault("json.syntax", "a JSON value");
  }

  number() {
    const { text } = this;
    const start = this.at;
    if (text.startsWith("-Infinity", start)) {
      this.fault("json.number", "a number of JSON");
    }
    this.take(0x2d);
    const whole = this.at;
    this.digits();
    if (text.charCodeAt(whole) === 0x30 && this.at > whole + 1) {
      this.at = whole;
      this.fault("json.syntax", "a number without leading zeros");
    }
    const integerEnd = this.at;
    if (this.take(0x2e)) {
      this.digits();
    }
    const exponent = text.charCodeAt(this.at) | 0x20;
    if (exponent === 0x65) {
      this.at++;
      if (!this.take(0x2b)) {
        this.take(0x2d);
      }
      this.digits();
    }
    if (this.at === integerEnd) {
      // Below 17 digits, the comparison is exact. So a number of millions of digits is never converted.
      const value = this.at - whole <= 16 ? Number(text.slice(start, this.at)) : Infinity;
      if (!Number.isSafeInteger(value)) {
        this.at = start;
        this.fault("json.number", "an integer within ±(2^53 − 1)");
      }
      return value + 0; // -0 is the integer 0
    }
    const value = Number(text.slice(start, this.at));
    if (!Number.isFinite(value)) {
      this.at = start;
      this.fault("json.number", "a number that 64 bits can hold");
    }
    return new Fraction(value);
  }

  digits() {
    const start = this.at;
    for (;;) {
      const code = this.text.charCodeAt(this.at);
      if (!(code >= 0x30 && code <= 0x39)) {
        break;
      }
      this.at++;
    }
    if (this.at === start) {
      this.fault("json.syntax", "a digit");
    }
  }
}

/** SB-J-007 */
function loneSurrogate(text) {
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i);
    if (code >= 0xd800 && code <= 0xdfff) {
      const next = text.charCodeAt(i + 1);
      if (code >= 0xdc00 || !(next >= 0xdc00 && next <= 0xdfff)) {
        return true;
      }
      i++;
    }
  }
  return false;
}

/**
 * Return a parsed value as plain frozen data: objects without a prototype, and numbers of either form as
 * numbers.
 */
export function plain(value) {
  if (value instanceof Map) {
    const object = Object.create(null);
    for (const [key, member] of value) {
      object[key] = plain(member);
    }
    return Object.freeze(object);
  }
  if (Array.isArray(value)) {
    return Object.freeze(value.map(plain));
  }
  return value instanceof Fraction ? value.fraction : value;
}
