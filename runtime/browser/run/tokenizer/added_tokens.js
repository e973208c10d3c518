// Added tokens: those that a text is cut at before it becomes words, and which of them steer the model.

import { otherKind } from "./steps.js";

const WORD = /[\p{L}\p{M}\p{N}\p{Pc}]/u;
const MARKER = /^<[|｜].*[|｜]>$/su;

/**
 * @typedef {object} Added
 * @property {string} content
 * @property {number} id
 * @property {boolean} special
 * @property {boolean} control whether it steers the model (spec/v1/bundle.md, before SB-T-002)
 */

/** The added tokens of a tokenizer.json. */
export class AddedTokens {
  /**
   * @param {object[] | null} entries the member `added_tokens`
   * @param {Map<string, number>} vocabulary
   * @param {string[]} templates the texts of the bundle's chat templates
   * @param {string} file for refusals
   */
  constructor(entries, vocabulary, templates, file) {
    /** @type {Map<string, Added>} */
    this.tokens = new Map();
    let next = vocabulary.size;
    for (const entry of entries ?? []) {
      const { content, special = false, single_word: word = false, lstrip = false, rstrip = false } = entry;
      if (content === "") continue; // the library leaves it out
      // The id in the file counts for nothing (SB-T-004).
      let id = vocabulary.get(content) ?? this.tokens.get(content)?.id;
      if (id === undefined) [id, next] = [next, next + 1];
      const spelled = templates.some((template) => template.includes(content));
      const control = special || spelled || MARKER.test(content);
      this.tokens.set(
        content, { content, id, special, control, word, lstrip, rstrip, raw: !entry.normalized },
      );
    }
    const kinds = [...this.tokens.values()];
    this.ids = new Map(kinds.map((token) => [token.id, token]));
    this.raw = finder(kinds.filter((token) => token.raw));
    this.normalized = finder(kinds.filter((token) => !token.raw));
    if (kinds.some((token) => !token.raw && token.content.normalize("NFC") !== token.content)) {
      otherKind(file, "added token", ["one in the form NFC"], "another one");
    }
  }

  /**
   * Cut a text at added tokens.
   *
   * @param {string} text
   * @param {boolean} raw whether at those that are sought before the text is normalized, or at the others
   * @param {boolean} control whether control tokens count
   * @returns {(string | Added)[]} texts, none of them empty, and tokens
   */
  cut(text, raw, control) {
    const pattern = raw ? this.raw : this.normalized;
    const found = [];
    let at = 0;
    for (const match of pattern === null ? [] : text.matchAll(pattern)) {
      const token = this.tokens.get(match[0]);
      let start = match.index;
      let stop = start + match[0].length;
      // A control token that isn't one here is passed over, with what it covers.
      if (start < at || (token.control && !control)) continue;
      if (token.word && (isWord(text.slice(0, start), -1) || isWord(text.slice(stop), 0))) continue;
      if (token.lstrip) start = at + trimmedEnd(text.slice(at, start)).length;
      if (token.rstrip) stop = text.length - trimmedStart(text.slice(stop)).length;
      if (start > at) found.push(text.slice(at, start));
      found.push(token);
      at = stop;
    }
    if (at < text.length) found.push(text.slice(at));
    return found;
  }
}

const trimmedEnd = (text) => text.replace(/\p{White_Space}+$/u, "");
const trimmedStart = (text) => text.replace(/^\p{White_Space}+/u, "");
const isWord = (text, at) => WORD.test(at < 0 ? (Array.from(text.slice(-2)).at(-1) ?? "") : text.slice(0, 2));

/**
 * Return a pattern that finds the leftmost token, and of several that begin there the longest; null for none.
 */
function finder(tokens) {
  if (tokens.length === 0) return null;
  const texts = tokens.map((token) => token.content).sort((one, other) => other.length - one.length);
  return new RegExp(texts.map((text) => text.replace(/[\^$\\.*+?()[\]{}|/]/gu, "\\$&")).join("|"), "gu");
}
