// Regular expressions of tokenizer files, in the language of Oniguruma, as JavaScript has them.

import { refuse } from "../../wire/refusal.js";

const SPACE = "\\p{White_Space}"; // JavaScript's own \s isn't Unicode's: it has U+FEFF, and lacks U+0085
const WORD = "\\p{L}\\p{M}\\p{Nd}\\p{Pc}";
const CLASSES = {
  s: SPACE, S: "\\P{White_Space}", d: "\\p{Nd}", D: "\\P{Nd}",
  r: "\\r", n: "\\n", t: "\\t", f: "\\f", v: "\\v",
};
const GROUPS = ["(?i:", "(?:", "(?=", "(?!", "(?<=", "(?<!"];
const SYNTAX = "^$\\.*+?()[]{}|/";
const SCRIPTS = ["Han", "Hiragana", "Katakana", "Hangul", "Latin", "Cyrillic", "Greek", "Arabic", "Thai"];
/** Letters beyond ASCII that fold to one of ASCII: the long s, and the sign of kelvin. */
const FOLDED = { s: "\u017f", k: "\u212a" };

/**
 * Return a pattern as a regular expression that finds every match in a text.
 *
 * @param {string} pattern
 * @param {string} file the tokenizer's path, for the refusal
 * @returns {RegExp}
 * @throws {BundleError} `text.tokenizer` for a pattern with a part that has no equal here
 */
export function translated(pattern, file) {
  try {
    return new RegExp(new Translator(pattern).whole(), "gu");
  } catch (failure) {
    if (!(failure instanceof SyntaxError)) throw failure;
    const got = `${pattern.slice(0, 80)}: ${failure.message}`;
    return refuse("text.tokenizer", file, "a pattern that this page can follow", got);
  }
}

const unknown = (what) => {
  throw new SyntaxError(what);
};

class Translator {
  constructor(pattern) {
    this.text = pattern;
    this.at = 0;
    this.folds = [false]; // whether case counts for nothing, in each open group
  }

  whole() {
    let made = "";
    while (this.at < this.text.length) made += this.item();
    return made;
  }

  item() {
    const { text, at } = this;
    const letter = String.fromCodePoint(text.codePointAt(at));
    if (letter === "(") return this.group();
    if (letter === "[") return this.set();
    if (letter === "\\") return this.escape(false);
    this.at += letter.length;
    if (letter === ")") this.folds.pop();
    if (letter === ".") return "[^\\n]";
    if ("^$".includes(letter)) unknown(`${letter}, which means the ends of a line`);
    if ("*+?}".includes(letter) && text[this.at] === "+") unknown("a quantifier that gives nothing back");
    return "()|*+?{}".includes(letter) ? letter : this.literal(letter, false);
  }

  group() {
    const found = GROUPS.find((each) => this.text.startsWith(each, this.at));
    if (found === undefined && this.text[this.at + 1] === "?") unknown(this.text.slice(this.at, this.at + 4));
    this.folds.push(found === "(?i:" || this.folds.at(-1));
    this.at += found?.length ?? 1;
    return found === undefined || found === "(?i:" ? "(?:" : found;
  }

  set() {
    const { text } = this;
    this.at += 1;
    let made = "[";
    if (text[this.at] === "^") {
      made += "^";
      this.at += 1;
    }
    for (let first = true; text[this.at] !== "]" || first; first = false) {
      if (this.at >= text.length) unknown("a set without an end");
      if (text[this.at] === "[" || text.startsWith("&&", this.at)) unknown("a set inside of a set");
      if (text[this.at] === "\\") made += this.escape(true);
      else {
        const letter = String.fromCodePoint(text.codePointAt(this.at));
        this.at += letter.length;
        // A range ends at the same letter in both cases only where it has none: others are refused.
        const isRange = letter === "-" && !first && text[this.at] !== "]";
        if (isRange && this.folds.at(-1)) unknown("a range whose case counts for nothing");
        made += isRange ? "-" : this.literal(letter, true);
      }
    }
    this.at += 1;
    return `${made}]`;
  }

  escape(inside) {
    const { text } = this;
    const letter = text[this.at + 1] ?? unknown("a backslash at the end");
    const property = /^\\[pP]\{(\^?)(\w+)\}/.exec(text.slice(this.at, this.at + 40));
    this.at += property?.[0].length ?? 2;
    if (property !== null) {
      const [whole, negated, name] = property;
      if (negated) unknown(whole);
      return `\\${whole[1]}{${SCRIPTS.includes(name) ? `Script=${name}` : name}}`;
    }
    if (letter in CLASSES) return CLASSES[letter];
    if (letter === "w") return inside ? WORD : `[${WORD}]`;
    if (letter === "W" && !inside) return `[^${WORD}]`;
    const code = /^(?:x\{([0-9A-Fa-f]+)\}|u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2}))/.exec(text.slice(this.at - 1));
    if (code !== null) {
      this.at += code[0].length - 1;
      return `\\u{${code[1] ?? code[2] ?? code[3]}}`;
    }
    if (/[0-9A-Za-z]/.test(letter)) unknown(`\\${letter}`);
    return this.literal(letter, inside);
  }

  literal(letter, inside) {
    const cases = this.folds.at(-1) ? casesOf(letter) : letter;
    if (cases.length > letter.length) return inside ? cases : `[${cases}]`;
    return SYNTAX.includes(letter) || (inside && letter === "-") ? `\\${letter}` : letter;
  }
}

function casesOf(letter) {
  if (letter.codePointAt(0) > 0x7f) return unknown(`${letter}, whose case counts for nothing`);
  if (!/[a-z]/i.test(letter)) return letter;
  return letter.toLowerCase() + letter.toUpperCase() + (FOLDED[letter.toLowerCase()] ?? "");
}
