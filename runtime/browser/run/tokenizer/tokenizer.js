// A bundle's tokenizer: text to token ids and back. It has byte-level BPE, and refuses every other kind by
// its name.

import { refuse } from "../../wire/refusal.js";
import { AddedTokens } from "./added_tokens.js";
import { BytePairs } from "./bpe.js";
import { BYTES, normalizer, otherKind, preTokenizer } from "./steps.js";

const LONE_SURROGATE = /\p{Surrogate}/u;

/**
 * The tokenizer of a model. Text that spells a control token stays text, unless the caller asks (SB-T-002).
 */
export class Tokenizer {
  /**
   * @param {object} document a tokenizer.json that follows SB-T-003 to SB-T-008, as plain data
   * @param {object} about
   * @param {string} about.file its path, for refusals
   * @param {number} about.vocabSize the number of token ids of the model
   * @param {string[]} [about.templates] the texts of the bundle's chat templates
   * @throws {BundleError} `text.tokenizer` for a tokenizer of another kind
   */
  constructor(document, { file, vocabSize, templates = [] }) {
    this.file = file;
    this.vocabSize = vocabSize;
    this.model = new BytePairs(document.model, file);
    this.added = new AddedTokens(document.added_tokens, this.model.ids, templates, file);
    this.normalize = normalizer(document.normalizer, file);
    this.cut = preTokenizer(document.pre_tokenizer, file);
    [this.before, this.after] = around(document.post_processor, file);
    checkDecoder(document.decoder, file);
    this.tokens = new Map();
    for (const [token, id] of this.model.ids) this.tokens.set(id, token);
    for (const [id, { content }] of this.added.ids) this.tokens.set(id, content);
  }

  /**
   * Return the token ids of a text.
   *
   * @param {string} text
   * @param {{control?: boolean, around?: boolean}} [options] `control`: whether control tokens that the text
   *   spells become these tokens, for a text that nobody else wrote; `around`: whether the ids have those
   *   that the tokenizer puts before and after a text
   * @returns {number[]}
   * @throws {BundleError} `input.value` for a text with lone surrogates; `text.token` for one of tokens that
   *   the model lacks (SB-T-008)
   */
  encode(text, { control = false, around: framed = true } = {}) {
    if (LONE_SURROGATE.test(text)) {
      refuse("input.value", "text", "a text without lone surrogates", "another one");
    }
    const ids = framed ? [...this.before] : [];
    const add = (piece) => {
      if (typeof piece !== "string") ids.push(piece.id);
      else for (const word of this.cut(piece)) for (const id of this.model.encode(word)) ids.push(id);
    };
    for (const piece of this.added.cut(text, true, control)) {
      if (typeof piece !== "string") add(piece);
      else this.added.cut(this.normalize(piece), false, control).forEach(add);
    }
    if (framed) ids.push(...this.after);
    const beyond = ids.find((id) => id >= this.vocabSize);
    if (beyond !== undefined) {
      const got = `${this.tokens.get(beyond)} (${beyond})`;
      refuse("text.token", "text", `tokens with ids below ${this.vocabSize}`, got);
    }
    return ids;
  }

  /**
   * Return the text of token ids. Bytes that aren't UTF-8 become U+FFFD.
   *
   * @param {number[]} ids
   * @param {{special?: boolean}} [options] whether special tokens are spelled; by default they are left out
   */
  decode(ids, { special = false } = {}) {
    const decoder = this.stream({ special });
    return ids.map((id) => decoder.push(id)).join("") + decoder.end();
  }

  /** Return what turns ids into text one by one. See `decode`. */
  stream(options = {}) {
    return new TextStream(this, options);
  }

  /**
   * Return the bytes of a token; none for an id that isn't a token's, and for a special one unless `special`.
   */
  bytes(id, special) {
    const token = this.tokens.get(id);
    if (token === undefined || (!special && this.added.ids.get(id)?.special)) return new Uint8Array(0);
    const bytes = Array.from(token, (character) => BYTES.get(character));
    return bytes.includes(undefined) ? new TextEncoder().encode(token) : Uint8Array.from(bytes);
  }
}

/** A text that comes token by token. A character of several tokens comes when it is whole. */
export class TextStream {
  constructor(tokenizer, { special = false } = {}) {
    this.tokenizer = tokenizer;
    this.special = special;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  /** Return the text that a token completes; it may be empty. */
  push(id) {
    return this.decoder.decode(this.tokenizer.bytes(id, this.special), { stream: true });
  }

  /** Return what is left at the end: U+FFFD for a character that never became whole. */
  end() {
    return this.decoder.decode();
  }
}

/** Return the ids that go before and after every text. */
function around(step, file) {
  const none = [[], []];
  if (step === null || step === undefined || step.type === "ByteLevel") return none;
  if (step.type === "Sequence") {
    const steps = (step.processors ?? []).map((each) => around(each, file));
    return steps.reduce(([before, after], [more, rest]) => [[...more, ...before], [...after, ...rest]], none);
  }
  if (step.type !== "TemplateProcessing") {
    otherKind(file, "post-processor", ["ByteLevel", "TemplateProcessing", "Sequence"], step.type);
  }
  const found = [[], []];
  let place = 0;
  for (const item of step.single) {
    const name = item.SpecialToken?.id;
    if (name === undefined) place = 1;
    else found[place].push(...step.special_tokens[name].ids);
  }
  return found;
}

function checkDecoder(step, file) {
  const steps = step?.type === "Sequence" ? (step.decoders ?? []) : [step];
  if (steps.length !== 1 || steps[0]?.type !== "ByteLevel") {
    otherKind(file, "decoder", ["ByteLevel"], steps.map((each) => each?.type ?? "none").join(", "));
  }
}
