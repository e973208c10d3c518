// The steps before a model of byte pairs: normalizers and pre-tokenizers of a tokenizer.json.

import { refuse } from "../../wire/refusal.js";
import { translated } from "./patterns.js";

const GPT2 = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const FORMS = ["NFC", "NFD", "NFKC", "NFKD"];

/** Byte -> the character that stands for it in a vocabulary of bytes, as GPT-2 chose it. */
export const CHARACTERS = characters();
/** Such a character -> its byte. */
export const BYTES = new Map(CHARACTERS.map((character, byte) => [character, byte]));

function characters() {
  const shown = (byte) => (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) => {
    if (shown(byte)) return String.fromCharCode(byte);
    next += 1;
    return String.fromCharCode(next - 1);
  });
}

const spelled = new TextEncoder();
const toCharacters = (text) => Array.from(spelled.encode(text), (byte) => CHARACTERS[byte]).join("");

/**
 * Return the function that a normalizer is.
 *
 * @param {object | null} step
 * @param {string} file for the refusal
 * @returns {(text: string) => string}
 * @throws {BundleError} `text.tokenizer` for another kind
 */
export function normalizer(step, file) {
  if (step === null || step === undefined) return (text) => text;
  if (FORMS.includes(step.type)) return (text) => text.normalize(step.type);
  if (step.type === "Sequence" && Array.isArray(step.normalizers)) {
    const steps = step.normalizers.map((each) => normalizer(each, file));
    return (text) => steps.reduce((made, each) => each(made), text);
  }
  return otherKind(file, "normalizer", [...FORMS, "Sequence"], step.type);
}

/**
 * Return the function that a pre-tokenizer is: it cuts a text into words, spelled in characters that stand
 * for bytes.
 *
 * @param {object | null} step
 * @param {string} file for the refusal
 * @returns {(text: string) => string[]}
 * @throws {BundleError} `text.tokenizer` for another kind, and for one that doesn't end with `ByteLevel`
 */
export function preTokenizer(step, file) {
  const steps = flattened(step, file);
  const last = steps.pop();
  if (last?.type !== "ByteLevel") {
    return otherKind(file, "pre-tokenizer", ["one that ends with ByteLevel"], last?.type ?? "none");
  }
  const cuts = steps.map((each) => cutter(each, file));
  if (last.use_regex !== false) cuts.push(pieces(translated(GPT2, file), { keep: true }));
  return (text) => {
    let words = [text];
    for (const [i, cut] of cuts.entries()) {
      if (i === steps.length) {
        words = words.map((word) => prefixed(word, last)); // before ByteLevel's own pattern
      }
      words = words.flatMap(cut);
    }
    if (cuts.length === steps.length) words = words.map((word) => prefixed(word, last));
    return words.filter((word) => word !== "").map(toCharacters);
  };
}

const prefixed = (word, { add_prefix_space: adds }) =>
  adds === true && !word.startsWith(" ") ? ` ${word}` : word;

function flattened(step, file) {
  if (step === null || step === undefined) return [];
  if (step.type !== "Sequence") return [step];
  if (!Array.isArray(step.pretokenizers)) return otherKind(file, "pre-tokenizer", ["a sequence"], "none");
  return step.pretokenizers.flatMap((each) => flattened(each, file));
}

function cutter(step, file) {
  if (step.type === "Digits") {
    return pieces(step.individual_digits === true ? /\p{N}/gu : /\p{N}+/gu, { keep: true });
  }
  if (step.type === "Split") {
    const { Regex: pattern, String: plain } = step.pattern ?? {};
    const found = typeof pattern === "string" ? translated(pattern, file) : literal(plain, file);
    if (step.invert === true) {
      return otherKind(file, "pre-tokenizer", ["a Split"], "a Split that is inverted");
    }
    if (step.behavior === "Isolated") return pieces(found, { keep: true });
    if (step.behavior === "Removed") return pieces(found, { keep: false });
    return otherKind(file, "behavior of a Split", ["Isolated", "Removed"], step.behavior);
  }
  return otherKind(file, "pre-tokenizer", ["Split", "Digits", "ByteLevel", "Sequence"], step.type);
}

function literal(text, file) {
  if (typeof text !== "string") {
    return otherKind(file, "pattern of a Split", ["Regex", "String"], "another one");
  }
  return new RegExp(text.replace(/[\^$\\.*+?()[\]{}|/]/gu, "\\$&"), "gu");
}

/**
 * Return a function that cuts a text at the matches of a pattern. The matches are words of their own, or left
 * out.
 */
function pieces(pattern, { keep }) {
  return (text) => {
    const found = [];
    let at = 0;
    for (const match of text.matchAll(pattern)) {
      if (match[0] === "") continue;
      if (match.index > at) found.push(text.slice(at, match.index));
      if (keep) found.push(match[0]);
      at = match.index + match[0].length;
    }
    if (at < text.length) found.push(text.slice(at));
    return found;
  };
}

/** Refuse a part of a tokenizer by its name. */
export function otherKind(file, part, known, got) {
  const hint = "This page has byte-level BPE: that of GPT-2, SmolLM2, Llama 3 and Qwen";
  return refuse("text.tokenizer", file, `a ${part} of these: ${known.join(", ")}`, String(got), hint);
}
