// Encode texts with the page's tokenizer: node encode_texts.mjs tokenizer.json < texts in JSON > results in
// JSON.

import { readFileSync } from "node:fs";

import { Tokenizer } from "../../runtime/browser/run/tokenizer/tokenizer.js";

const document = JSON.parse(readFileSync(process.argv[2], "utf-8"));
const tokenizer = new Tokenizer(document, { file: "tokenizer.json", vocabSize: 2 ** 31 });
const texts = JSON.parse(readFileSync(0, "utf-8"));
const results = texts.map((text) => {
  const ids = tokenizer.encode(text);
  const stream = tokenizer.stream();
  const pieces = ids.map((id) => stream.push(id));
  return { ids, text: pieces.join("") + stream.end(), composed: text.normalize("NFC") };
});
process.stdout.write(JSON.stringify(results));
