/** What a `tokenizer.json` must be before any library parses it (SB-T-003 to SB-T-008). */

import { Fraction, parseJson } from "./json.js";
import { escaped, refuse } from "./problems.js";

/** SB-T-003 */
const LIMITS = { mostBytes: 268_435_456, mostValues: 8_388_608 };
const TYPES = ["BPE", "Unigram", "WordLevel", "WordPiece"];
const MOST_IDS = 2 ** 31 - 1;
const MOST_INSERTED = 1024; // SB-T-005
const MOST_OBJECTS = 1024; // SB-T-007
const MOST_GROWTH = 1024;
/** The growth of a step by its type. A Map, because a file may name any type, even `constructor`. */
const GROWTHS = new Map([["ByteLevel", 4], ["Metaspace", 2]]);

/**
 * @param {Uint8Array} bytes
 * @param {string} file
 * @param {number} vocabulary `vocab_size` of the architecture
 * @throws {BundleError} json.*, text.tokenizer
 */
export function checkTokenizer(bytes, file, vocabulary) {
  const value = parseJson(bytes, file, LIMITS);
  const wrong = (pointer, expected, got) => refuse("text.tokenizer", file, expected, got, { pointer });
  const document = value instanceof Map ? value : new Map();
  const model = document.get("model");
  if (!document.has("model")) {
    wrong("", "an object with a model", value);
  }
  if (!(model instanceof Map)) {
    wrong("/model", "an object", model);
  }
  const tokens = readVocabulary(model, wrong);
  const vocabularyList = model.get("vocab");
  const entries = Array.isArray(vocabularyList) ? vocabularyList.length : tokens.size;
  checkAddedTokens(document.get("added_tokens") ?? [], tokens, entries, wrong);
  const beyond = [...tokens.values()].filter((id) => id >= vocabulary).length;
  if (beyond * 100 > tokens.size) {
    // SB-T-008
    wrong("/model/vocab", `ids below ${vocabulary}, but for one in a hundred`, `${beyond} beyond`);
  }
  checkInsertedIds(document.get("post_processor"), vocabulary, wrong);
  for (const name of ["normalizer", "pre_tokenizer", "decoder"]) {
    checkGrowth(document.get(name), `/${name}`, wrong);
  }
}

/**
 * SB-T-004, SB-T-006
 *
 * @returns {Map<string, number>} token to id
 */
function readVocabulary(model, wrong) {
  const type = model.get("type");
  const vocabulary = model.get("vocab");
  if (model.has("type") && !TYPES.includes(type)) {
    wrong("/model/type", TYPES.join(" or "), type);
  }
  const listed = type === "Unigram" || (!model.has("type") && Array.isArray(vocabulary));
  if (!model.has("vocab")) {
    wrong("/model", "a vocabulary", model);
  }
  if (listed ? !Array.isArray(vocabulary) : !(vocabulary instanceof Map)) {
    wrong("/model/vocab", listed ? "an array of pairs" : "an object", vocabulary);
  }
  const tokens = new Map();
  if (listed) {
    for (const [id, pair] of vocabulary.entries()) {
      if (!isPair(pair)) {
        wrong(`/model/vocab/${id}`, "a token and a score", pair);
      }
      tokens.set(pair[0], id);
    }
    return tokens;
  }
  const owners = new Set();
  for (const [token, id] of vocabulary) {
    const pointer = `/model/vocab/${escaped(token)}`;
    checkId(id, MOST_IDS, pointer, wrong);
    if (owners.has(id)) {
      wrong(pointer, "an id of its own", id); // SB-T-006
    }
    owners.add(id);
    tokens.set(token, id);
  }
  return tokens;
}

function isPair(value) {
  const score = Array.isArray(value) && value.length === 2 ? value[1] : undefined;
  return typeof value?.[0] === "string" && (typeof score === "number" || score instanceof Fraction);
}

function checkId(id, most, pointer, wrong) {
  if (typeof id !== "number" || id < 0 || id > most) {
    wrong(pointer, `an integer from 0 to ${most}`, id);
  }
}

/** SB-T-004, and the half of SB-T-006 that is about ids after the vocabulary's */
function checkAddedTokens(added, tokens, entries, wrong) {
  if (!Array.isArray(added)) {
    wrong("/added_tokens", "an array", added);
  }
  let follows = false;
  for (const [i, own] of added.entries()) {
    const pointer = `/added_tokens/${i}`;
    if (!(own instanceof Map)) {
      wrong(pointer, "an object", own);
    }
    const content = own.get("content");
    if (typeof content !== "string") {
      wrong(own.has("content") ? `${pointer}/content` : pointer, "content, a string", content);
    }
    if (!own.has("id")) {
      wrong(pointer, "an id", own);
    }
    checkId(own.get("id"), MOST_IDS, `${pointer}/id`, wrong);
    follows ||= content !== "" && !tokens.has(content);
  }
  if (follows) {
    for (const id of tokens.values()) {
      if (id >= entries) {
        wrong("/model/vocab", "ids without holes, because added tokens follow", id);
      }
    }
  }
}

/** SB-T-005: at any depth of the post-processor. A member of another type counts as empty. */
function checkInsertedIds(processor, vocabulary, wrong) {
  const list = (value) => (Array.isArray(value) ? value : []);
  const check = (id, pointer) => checkId(id, vocabulary - 1, pointer, wrong);
  for (const [pointer, value] of objects(processor, "/post_processor")) {
    for (const name of ["cls", "sep"]) {
      const pair = list(value.get(name));
      if (pair.length > 1) {
        check(pair[1], `${pointer}/${name}/1`);
      }
    }
    const used = namedTokens(value.get("single"));
    const special = value.get("special_tokens");
    let inserted = list(value.get("single")).length + list(value.get("pair")).length;
    for (const [name, token] of special instanceof Map ? special : []) {
      const ids = list(token instanceof Map ? token.get("ids") : undefined);
      inserted += ids.length;
      if (used.has(name)) {
        ids.forEach((id, i) => check(id, `${pointer}/special_tokens/${escaped(name)}/ids/${i}`));
      }
    }
    if (inserted > MOST_INSERTED) {
      wrong(pointer, `at most ${MOST_INSERTED} items in templates`, inserted);
    }
  }
}

function namedTokens(single) {
  const pieces = Array.isArray(single) ? single : [];
  const named = pieces.map((piece) => (piece instanceof Map ? piece.get("SpecialToken") : undefined));
  return new Set(named.map((token) => (token instanceof Map ? token.get("id") : undefined)));
}

/** All objects at any depth, in the order of the document, each with its pointer. */
function* objects(value, pointer) {
  if (value instanceof Map) {
    yield [pointer, value];
  }
  const members = value instanceof Map || Array.isArray(value) ? value.entries() : [];
  for (const [key, member] of members) {
    if (member !== null && typeof member === "object") {
      yield* objects(member, `${pointer}/${escaped(key)}`);
    }
  }
}

/** SB-T-007: a few steps, each on the output of the one before, could turn a word into gigabytes. */
function checkGrowth(steps, place, wrong) {
  let count = 0;
  let product = 1;
  for (const [pointer, value] of objects(steps, place)) {
    product *= factor(value);
    if (++count > MOST_OBJECTS || product > MOST_GROWTH) {
      const expected = `at most ${MOST_OBJECTS} objects, and a growth of ${MOST_GROWTH}`;
      wrong(pointer, expected, `${count}, and ${product}`);
    }
  }
}

function factor(value) {
  const [content, pattern] = [value.get("content"), value.get("pattern")];
  let result = 1;
  if (typeof content === "string" && value.has("pattern")) {
    const from = pattern instanceof Map ? pattern.get("String") : undefined;
    const divisor = typeof from === "string" ? characters(from) : 0;
    result *= divisor ? Math.max(1, characters(content) / divisor) : characters(content) + 1;
  }
  if (typeof value.get("prepend") === "string") {
    result *= characters(value.get("prepend")) + 1;
  }
  if (typeof value.get("precompiled_charsmap") === "string") {
    result *= longestReplacement(value.get("precompiled_charsmap"));
  }
  return result * (GROWTHS.get(value.get("type")) ?? 1);
}

function characters(text) {
  return [...text].length;
}

/**
 * The map is 4 bytes with the size of a trie, the trie, and texts that end with a zero byte. What isn't
 * base64 counts as 1: no library makes a step of it (SB-T-007).
 */
function longestReplacement(base64) {
  if (base64.length % 4 || !/^[A-Za-z0-9+/]*={0,2}$/.test(base64)) return 1;
  const map = atob(base64);
  const size = [3, 2, 1, 0].reduce((sum, i) => sum * 256 + (map.charCodeAt(i) || 0), 0);
  const texts = map.slice(4 + size - (size % 4)).split("\0");
  return texts.reduce((longest, text) => Math.max(longest, text.length), 1);
}
