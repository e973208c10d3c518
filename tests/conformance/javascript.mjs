/**
 * Adapter of the JavaScript reader for the kit: `node javascript.mjs STEP DIRECTORY`. README.md has the
 * protocol.
 *
 * `node javascript.mjs --serve` reads lines `STEP DIRECTORY` from stdin and answers each with one line, so
 * that a test needn't start Node a thousand times.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";

import { Stage } from "../../runtime/browser/decoder/stage.js";
import { openBundle } from "../../runtime/browser/reader/bundle.js";
import { BundleError } from "../../runtime/browser/reader/problems.js";
import { DirectorySource } from "../../runtime/browser/sources/node.js";
import { decode, encode, payloadBytes } from "../../runtime/browser/wire/encodings.js";
import { tokensOf, unpack } from "../../runtime/browser/wire/frames.js";

const STEPS = {
  open: async () => {},
  stage: async (bundle) => {
    for (const { name } of bundle.manifest.shards) {
      await bundle.loadStage(name);
    }
  },
  verify: (bundle) => bundle.verify(),
  exact: (bundle) => bundle.verify({ exact: true }),
};

/** Slots of a cache: more than the calls of the kit need. */
const SLOTS = 40;

/** Compute the calls of `calls.json`. */
async function compute(directory) {
  const bundle = await openBundle(new DirectorySource(join(directory, "model.splitbundle")));
  const { cases } = JSON.parse(await readFile(join(directory, "calls.json"), "utf8"));
  const results = [];
  for (const { cuts, calls } of cases) {
    const ends = [0, ...cuts, bundle.architecture.layers.length];
    const stages = [];
    for (let i = 0; i + 1 < ends.length; i++) {
      const [embeds, head] = [i === 0, i + 2 === ends.length];
      stages.push(await Stage.load(bundle, { start: ends[i], stop: ends[i + 1], embeds, head }));
    }
    const caches = stages.map((stage) => stage.newCache({ rows: calls[0].past.length, slots: SLOTS }));
    results.push(calls.map((call) => callResults(stages, caches, call)));
  }
  return { verdict: "computed", cases: results };
}

/** What the stages give for one call, without padding; or the code of its refusal. */
function callResults(stages, caches, { past, rows }) {
  const count = rows.map((row) => row.length);
  const longest = Math.max(...count);
  let given = { tokenIds: rows.map((row) => [...row, ...Array(longest - row.length).fill(0)]) };
  const states = [];
  try {
    caches.forEach((cache) => cache.check(past, count)); // a call is refused by all stages or by none
    stages.forEach((stage, i) => {
      given = stage.run({ ...given, past, count, cache: caches[i] });
      states.push(rowsOf(given.hidden ?? given.logits, count));
    });
  } catch (error) {
    if (!(error instanceof BundleError)) {
      throw error;
    }
    return { code: error.problems[0].code };
  }
  return { hidden: states.slice(0, -1), logits: states.at(-1) };
}

/** A batch as nested arrays: row, token, number. */
function rowsOf({ data, shape: [, sequence, width] }, count) {
  return count.map((tokens, row) => {
    return Array.from({ length: tokens }, (_, i) => {
      const start = (row * sequence + i) * width;
      return Array.from(data.subarray(start, start + width));
    });
  });
}

/** The steps of `--wire`: frames, and the payloads of one row of tokens. */
const WIRE = {
  frame: async (file) => {
    const { message, payload } = unpack(await file("frame"), Number(await file.text("limit")));
    if (message.encoding === undefined) {
      return { header: message };
    }
    const numbers = decode(payload, message.encoding, tokensOf(message), message.width);
    return { header: message, numbers: hexOf(numbers) };
  },
  encode: async (file) => {
    const numbers = new Float32Array((await file("numbers")).slice().buffer);
    const payload = encode(numbers, await file.text("encoding"), Number(await file.text("width")));
    return { payload: hexOf(payload) };
  },
  decode: async (file) => {
    const [payload, encoding] = [await file("payload"), await file.text("encoding")];
    const width = Number(await file.text("width"));
    const tokens = Math.floor(payload.length / payloadBytes(encoding, 1, width));
    return { numbers: hexOf(decode(payload, encoding, tokens, width)) };
  },
};

/** A function that reads a file of a directory as bytes; its `text` reads one as text. */
function filesOf(directory) {
  const bytes = async (name) => new Uint8Array(await readFile(join(directory, name)));
  return Object.assign(bytes, { text: (name) => readFile(join(directory, name), "latin1") });
}

/** The bytes of a typed array in hexadecimal digits; of numbers, on a little-endian machine. */
function hexOf({ buffer, byteOffset, byteLength }) {
  return Buffer.from(buffer, byteOffset, byteLength).toString("hex");
}

/** @returns {Promise<object>} the verdict */
async function judge(step, directory) {
  if (step === "numbers") {
    return compute(directory);
  }
  try {
    if (Object.hasOwn(WIRE, step)) {
      return { verdict: "accepted", ...(await WIRE[step](filesOf(directory))) };
    }
    await STEPS[step](await openBundle(new DirectorySource(directory)));
    return { verdict: "accepted" };
  } catch (error) {
    if (!(error instanceof BundleError)) {
      throw error;
    }
    return { verdict: "refused", problems: error.problems };
  }
}

async function main([first, directory]) {
  if (first === "--serve") {
    for await (const line of createInterface({ input: process.stdin })) {
      const at = line.indexOf(" ");
      const asked = judge(line.slice(0, at), line.slice(at + 1));
      const verdict = await asked.catch((error) => ({ error: error.stack }));
      process.stdout.write(`${JSON.stringify(verdict)}\n`);
    }
    return;
  }
  const steps = [...Object.keys(STEPS), ...Object.keys(WIRE), "numbers"];
  if (!steps.includes(first) || directory === undefined) {
    throw new Error(`usage: node javascript.mjs ${steps.join("|")} DIRECTORY`);
  }
  process.stdout.write(`${JSON.stringify(await judge(first, directory))}\n`);
}

await main(process.argv.slice(2));
