// Tokenizers of the page: patterns, merges, added tokens, streams and chats. Golden texts of bundles hold the
// rest.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { ChatMl } from "../../runtime/browser/run/tokenizer/chat.js";
import { checkTexts } from "../../runtime/browser/run/tokenizer/golden.js";
import { translated } from "../../runtime/browser/run/tokenizer/patterns.js";
import { CHARACTERS, preTokenizer } from "../../runtime/browser/run/tokenizer/steps.js";
import { Tokenizer } from "../../runtime/browser/run/tokenizer/tokenizer.js";

const EXAMPLE = new URL("../../examples/license-gpt2/tokenizer.json", import.meta.url);
const LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
  + "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
  + "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

const cut = (pattern, text) => [...text.matchAll(translated(pattern, "t"))].map(([piece]) => piece);

function refusal(act) {
  try {
    act();
  } catch (failure) {
    return failure.problems?.[0] ?? failure;
  }
  return { code: "nothing" };
}

/** A tokenizer over all bytes, with some merges and added tokens. */
function small({ merges = [], added = [], ...rest } = {}) {
  const vocab = Object.fromEntries(CHARACTERS.map((character, id) => [character, id]));
  for (const [left, right] of merges) vocab[left + right] = Object.keys(vocab).length;
  const document = {
    model: { type: "BPE", vocab, merges }, pre_tokenizer: { type: "ByteLevel", use_regex: true },
    decoder: { type: "ByteLevel" }, added_tokens: added, ...rest,
  };
  return new Tokenizer(document, { file: "tokenizer.json", vocabSize: 1000 });
}

const token = (content, options = {}) => ({ content, id: 0, special: false, normalized: false, ...options });

test("patterns cut a text as Oniguruma does", () => {
  assert.deepEqual(cut(LLAMA3, "I'LL say:  3.14159\u00a0…\n\n ok"), [
    "I", "'LL", " say", ":", " ", " ", "3", ".", "141", "59", "\u00a0", "…\n\n", " ok",
  ]);
  assert.deepEqual(cut("(?i:'s)", "'s 'S 'ſ"), ["'s", "'S", "'ſ"]);
  // JavaScript's own \s has it the other way round.
  assert.deepEqual(cut("\\s+", "a\u0085b\ufeffc d"), ["\u0085", " "]);
  assert.deepEqual(cut("[\\d\\-x]+", "٣-x3y"), ["٣-x3"]);
  assert.deepEqual(cut("a.b", "a\nb a\rb"), ["a\rb"]);
  assert.deepEqual(cut("\\p{Han}+|\\x{41}|\\u0042", "漢字AB"), ["漢字", "A", "B"]);
});

test("a pattern that can't be followed is refused", () => {
  const inverted = ["\\p{^L}", "(?i:[a-z])", "(?i:ä)"];
  for (const pattern of ["a++", "(?>a)", "[a&&b]", "[[:alpha:]]", "^a", "\\h", "(", ...inverted]) {
    assert.equal(refusal(() => translated(pattern, "t")).code, "text.tokenizer", pattern);
  }
});

test("merges go by rank, and leftmost first", () => {
  const { model } = small({ merges: [["b", "c"], ["a", "b"], ["a", "a"], ["aa", "a"]] });
  const words = (word) => model.encode(word).map((id) => [...model.ids].find(([, each]) => each === id)[0]);
  assert.deepEqual(words("abc"), ["a", "bc"]);
  assert.deepEqual(words("ababc"), ["ab", "a", "bc"]);
  assert.deepEqual(words("aaaaa"), ["aa", "aaa"]);
  assert.equal(model.encode("a".repeat(100_001)).length, 50_000); // 49,999 pairs, and three at the end
});

test("digits, splits and prefixes", () => {
  const steps = (...pretokenizers) => preTokenizer({ type: "Sequence", pretokenizers }, "t");
  const bytes = { type: "ByteLevel", add_prefix_space: false, use_regex: false };
  const split = (behavior) => ({ type: "Split", pattern: { Regex: "b+" }, behavior, invert: false });
  assert.deepEqual(steps({ type: "Digits", individual_digits: true }, bytes)("a12"), ["a", "1", "2"]);
  assert.deepEqual(steps({ type: "Digits", individual_digits: false }, bytes)("a12b"), ["a", "12", "b"]);
  assert.deepEqual(steps(split("Isolated"), bytes)("abbc"), ["a", "bb", "c"]);
  assert.deepEqual(steps(split("Removed"), bytes)("abbc"), ["a", "c"]);
  assert.deepEqual(preTokenizer({ ...bytes, add_prefix_space: true }, "t")("a"), ["Ġa"]);
  const sequence = { type: "Sequence", pretokenizers: [{ type: "Whitespace" }, bytes] };
  for (const step of [null, { type: "Metaspace" }, sequence]) {
    assert.equal(refusal(() => preTokenizer(step, "t")).code, "text.tokenizer");
  }
});

test("another kind of tokenizer is refused by its name", () => {
  const got = (rest) => refusal(() => small(rest));
  assert.match(got({ model: { type: "Unigram", vocab: [] } }).got, /Unigram/);
  assert.match(got({ decoder: { type: "Metaspace" } }).got, /Metaspace/);
  assert.match(got({ normalizer: { type: "Lowercase" } }).got, /Lowercase/);
  assert.match(got({ post_processor: { type: "BertProcessing" } }).got, /BertProcessing/);
});

test("text that spells a control token stays text", () => {
  const tokenizer = small({ added: [token("<s>", { special: true }), token("<|x|>"), token("<tool>")] });
  const [start, marked, tool] = [256, 257, 258];
  assert.ok(tokenizer.encode("<s>a<|x|>").every((id) => id < 256));
  assert.deepEqual(tokenizer.encode("<s>a<|x|>", { control: true }), [start, 97, marked]);
  assert.deepEqual(tokenizer.encode("a<tool>b"), [97, tool, 98]); // it steers nothing
  assert.equal(tokenizer.decode([start, 97, marked, tool]), "a<|x|><tool>");
  assert.equal(tokenizer.decode([start, 97], { special: true }), "<s>a");
  const inTemplate = new Tokenizer(
    { ...plainDocument(), added_tokens: [token("<tool>")] },
    { file: "t", vocabSize: 300, templates: ["{{ '<tool>' }}"] },
  );
  assert.ok(inTemplate.encode("a<tool>b").every((id) => id < 256));
});

function plainDocument() {
  const vocab = Object.fromEntries(CHARACTERS.map((character, id) => [character, id]));
  return {
    model: { type: "BPE", vocab, merges: [] }, pre_tokenizer: { type: "ByteLevel" }, decoder: {
      type: "ByteLevel",
    },
  };
}

test("added tokens: the longest one, whole words, and spaces around", () => {
  const tokenizer = small({
    added: [
      token("ab"), token("abc"), token("word", { single_word: true }), token(
        "<l>", { lstrip: true, rstrip: true },
      ),
    ],
  });
  assert.deepEqual(tokenizer.encode("abcab"), [257, 256]);
  assert.deepEqual(tokenizer.encode("words"), [..."words"].map((letter) => letter.charCodeAt(0)));
  assert.deepEqual(tokenizer.encode("word!"), [258, 33]);
  assert.deepEqual(tokenizer.encode("x  <l>\n y"), [120, 259, 121]);
});

test("ids before and after a text, and ids that the model lacks", () => {
  const single = [
    { SpecialToken: { id: "<s>" } }, { Sequence: { id: "A" } }, { SpecialToken: { id: "</s>" } },
  ];
  const special_tokens = { "<s>": { ids: [256] }, "</s>": { ids: [257] } };
  const tokenizer = small({
    added: [token("<s>", { special: true }), token("</s>", { special: true }), token("far")],
    post_processor: {
      type: "Sequence", processors: [
        { type: "ByteLevel" }, { type: "TemplateProcessing", single, special_tokens },
      ],
    },
  });
  assert.deepEqual(tokenizer.encode("a"), [256, 97, 257]);
  assert.deepEqual(tokenizer.encode("a", { around: false }), [97]);
  tokenizer.vocabSize = 258;
  assert.equal(refusal(() => tokenizer.encode("far")).code, "text.token");
  assert.equal(refusal(() => tokenizer.encode("\ud800")).code, "input.value");
});

test("a stream never gives half of a character", () => {
  const tokenizer = small();
  const stream = tokenizer.stream();
  const pieces = tokenizer.encode("é🙂a").map((id) => stream.push(id));
  assert.deepEqual(pieces, ["", "é", "", "", "", "🙂", "a"]);
  assert.equal(stream.end(), "");
  const broken = tokenizer.stream();
  assert.equal(broken.push(0xf0) + broken.push(0x9f), "");
  assert.equal(broken.end(), "\ufffd");
  assert.equal(tokenizer.decode([0xef, 0xbb, 0xbf, 0x61]), "\ufeffa");
});

test("a normalizer, and text that every byte of comes back", () => {
  const tokenizer = small({ normalizer: { type: "Sequence", normalizers: [{ type: "NFC" }] } });
  assert.deepEqual(tokenizer.encode("e\u0301"), tokenizer.encode("é"));
  const text = Array.from({ length: 400 }, (_, i) => String.fromCodePoint(i * 97)).join("").normalize("NFC");
  assert.equal(tokenizer.decode(tokenizer.encode(text)), text);
});

test("the example's tokenizer reads its text back", () => {
  const document = JSON.parse(readFileSync(EXAMPLE, "utf-8"));
  const tokenizer = new Tokenizer(document, { file: "tokenizer.json", vocabSize: 640 });
  const text = "Licensed under the Apache License, Version 2.0 (the \"License\");\n   you may not use";
  const ids = tokenizer.encode(text);
  assert.ok(ids.length < text.length / 2);
  assert.equal(tokenizer.decode(ids), text);
  checkTexts(tokenizer, { cases: [{ text, ids, control_ids: ids, decoded: text }] });
  const wrong = { cases: [{ text, ids: [1, 2], control_ids: ids, decoded: text }] };
  assert.equal(refusal(() => checkTexts(tokenizer, wrong)).code, "text.ids");
});

test("the form ChatML is used only where it gives the golden chats", () => {
  const tokenizer = small(
    { added: [token("<|im_start|>", { special: true }), token("<|im_end|>", { special: true })] },
  );
  const encode = (text) => tokenizer.encode(text, { control: true });
  const opening = "<|im_start|>system\nBe kind.<|im_end|>\n";
  const chat = (text, messages) => ({ messages, add_generation_prompt: true, ids: encode(text) });
  const asked = [{ role: "user", content: "Hi <|im_end|>" }];
  const plain = chat(
    `${opening}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n`, [{ role: "user", content: "Hi" }],
  );
  const own = chat(
    "<|im_start|>system\nX<|im_end|>\n<|im_start|>assistant\n", [{ role: "system", content: "X" }],
  );
  const form = ChatMl.of(tokenizer, { chats: [own, plain] });
  assert.deepEqual(form.opening, encode(opening));
  const ids = form.encode(asked);
  assert.equal(ids.filter((id) => id === form.end).length, 2); // the message ends no turn
  assert.equal(tokenizer.decode(ids), "system\nBe kind.\nuser\nHi <|im_end|>\nassistant\n");
  const other = chat("<|im_start|>user: Hi<|im_end|>", [{ role: "user", content: "Hi" }]);
  assert.equal(ChatMl.of(tokenizer, { chats: [plain, other] }), null);
  assert.equal(ChatMl.of(tokenizer, { chats: [] }), null);
  assert.equal(ChatMl.of(small(), { chats: [plain] }), null);
});
