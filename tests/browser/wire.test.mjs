// The vectors of the protocol (tests/conformance/wire), held against the frames and the encodings of the
// page.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { test } from "node:test";

import { decode, encode } from "../../runtime/browser/wire/encodings.js";
import { MOST_FRAME, pack, tokensOf, unpack } from "../../runtime/browser/wire/frames.js";
import { KINDS } from "../../runtime/browser/wire/messages.js";

const HERE = new URL("../conformance/wire/", import.meta.url);

function vectors(kind) {
  const names = readdirSync(new URL(`${kind}/`, HERE)).filter((name) => name.endsWith(".json"));
  assert.ok(names.length);
  return names.map((name) => [name, JSON.parse(readFileSync(new URL(`${kind}/${name}`, HERE), "utf-8"))]);
}

const bytes = (digits) => Uint8Array.from(Buffer.from(digits, "hex"));
const hex = (data) => Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("hex");

function frameOf(vector) {
  if (vector.frame !== undefined) return bytes(vector.frame);
  const header = Buffer.from(vector.header + " ".repeat(vector.padding), "utf-8");
  const prefix = Buffer.from("SBW1\0\0\0\0", "latin1");
  prefix.writeUInt32LE(header.length, 4);
  return Uint8Array.from(Buffer.concat([prefix, header, bytes(vector.payload)]));
}

test("frames that a reader must take", () => {
  const canonical = new Set();
  for (const [name, vector] of vectors("accept")) {
    const { message, payload } = unpack(frameOf(vector));
    assert.deepEqual({ ...message }, vector.expect.header, name);
    if (vector.expect.numbers !== undefined) {
      const numbers = decode(payload, message.encoding, tokensOf(message), message.width);
      assert.equal(hex(numbers), vector.expect.numbers, name);
    }
    if (vector.canonical) {
      assert.equal(hex(pack(message, payload)), hex(frameOf(vector)), name);
      canonical.add(message.op);
    }
  }
  assert.deepEqual([...canonical].sort(), Object.keys(KINDS).sort());
});

test("frames that a reader must refuse", () => {
  for (const [name, vector] of vectors("reject")) {
    assert.throws(() => unpack(frameOf(vector), vector.limit ?? MOST_FRAME), ({ problems }) => {
      assert.equal(problems?.[0].code, vector.expect.code, name);
      if (vector.expect.argument !== undefined) {
        assert.equal(problems[0].argument, vector.expect.argument, name);
      }
      else assert.equal(problems[0].pointer, vector.expect.pointer, name);
      return true;
    }, name);
  }
});

test("the bytes of encodings", () => {
  for (const [name, { encoding, width, numbers, expect }] of vectors("encodings")) {
    if (numbers !== undefined) {
      const given = new Float32Array(Uint32Array.from(numbers, (each) => parseInt(each, 16)).buffer);
      if (expect.code !== undefined) {
        assert.throws(() => encode(given, encoding, width), ({ problems }) => {
          assert.equal(problems?.[0].code, expect.code, name);
          assert.doesNotMatch(problems[0].got, /\d/, name); // no number of a payload is told
          return true;
        });
        continue;
      }
      assert.equal(hex(encode(given, encoding, width)), expect.payload, name);
    }
    const found = decode(bytes(expect.payload), encoding, expect.numbers.length / width, width);
    const bits = Array.from(new Uint32Array(found.buffer), (each) => each.toString(16).padStart(8, "0"));
    assert.deepEqual(bits, expect.numbers, name);
  }
});

test("a header that is too long isn't packed", () => {
  const many = Array(4096).fill(2 ** 31 - 1);
  const run = {
    op: "run", session: null, number: 0, past: many, count: many, sequence: 1, width: 1, encoding: "float32",
    rows: many, order: many, // beyond their range: any other header fits
  };
  assert.throws(() => pack(run), ({ problems }) => problems[0].code === "wire.header");
});
