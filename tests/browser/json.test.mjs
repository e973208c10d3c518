import assert from "node:assert/strict";
import { test } from "node:test";

import { Fraction, parseJson, plain } from "../../runtime/browser/reader/json.js";
import { refused } from "./support.mjs";

const bytes = (text) => new TextEncoder().encode(text);
const parse = (text, limits) => parseJson(bytes(text), "x.json", limits);

test("documents mean what JSON.parse says", () => {
  for (const text of [
    '{"a": [1, -2, 0.5, 1e3, true, false, null, "x"], "b": {}, "c": []}',
    ' [ "\\u00e9\\ud83d\\ude00\\n\\/\\\\ \u2028" , "" ] \n\t\r ',
    "-0.0",
    "9007199254740991",
    "1E-2",
    '"é😀"',
  ]) {
    assert.equal(JSON.stringify(plain(parse(text))), JSON.stringify(JSON.parse(text)), text);
  }
});

test("integers and fractions stay apart, and keys have no meaning", () => {
  assert.equal(parse("1"), 1);
  assert.ok(Object.is(parse("-0"), 0));
  assert.ok(parse("1.0") instanceof Fraction);
  assert.ok(parse("1e0") instanceof Fraction);
  const odd = plain(parse('{"__proto__": {"x": 1}, "constructor": 2}'));
  assert.deepEqual(Object.keys(odd), ["__proto__", "constructor"]);
  assert.equal(odd.x, undefined);
});

test("what can be read in two ways is refused", async () => {
  const cases = {
    "json.syntax": [
      ...["", " ", "{", "[1", '{"a"}', '{"a":}', '{"a":1,}', "[1,]", "[,]", "{1:2}", "[1 2]", "1 2"],
      ...["01", "-", "1.", ".5", "1e", "+1", "tru", "nulll", "\u00a01", "//", "\0"],
      ...["'a'", '"a', '"\\x"', '"\\u12"', '"\t"'],
    ],
    "json.number": [
      ...["NaN", "Infinity", "-Infinity", "1e999", "-1e999"],
      ...["9007199254740992", "-9007199254740992", "1".repeat(400)],
    ],
    "json.duplicate-key": ['{"a":1,"a":1}', '{"a":1,"\\u0061":1}', '[{"b":{"x":1,"x":2}}]'],
    "json.depth": ["[".repeat(65), `${"[".repeat(64)}1${"]".repeat(64)}`, '{"a":'.repeat(100_000)],
    "json.encoding": ["\ufeff{}", '"\\ud800"', '"\\udc00\\ud800"', '{"\\ud800x":1}'],
  };
  for (const [code, texts] of Object.entries(cases)) {
    for (const text of texts) {
      await refused(() => parse(text), code, "x.json");
    }
  }
  for (const other of [[0xff], [0x22, 0xc0, 0xaf, 0x22], [0x22, 0xed, 0xa0, 0x80, 0x22]]) {
    await refused(() => parseJson(new Uint8Array(other), "x.json"), "json.encoding");
  }
});

test("limits hold before anything is parsed", async () => {
  assert.deepEqual(parse("[".repeat(63) + "1" + "]".repeat(63)).flat(Infinity), [1]);
  await refused(() => parse("[1,2]", { mostBytes: 4 }), "json.size");
  await refused(() => parse("[1,2,3]", { mostValues: 2 }), "json.size");
  await refused(() => parse('"[,,"', { mostValues: 2 }), "json.size");
});

test("an offset is one of bytes", async () => {
  const { offset } = await refused(() => parse('["é", x]'), "json.syntax");
  assert.equal(offset, 7);
});
