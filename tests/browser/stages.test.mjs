// Stages of the page without a library: a golden bundle, opened strictly, in one piece and token by token.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

import { openBundle } from "../../runtime/browser/reader/bundle.js";
import { boundOf } from "../../runtime/browser/run/golden_vectors.js";
import { openHeld } from "../../runtime/browser/run/held_source.js";
import { loadPipeline, loadText } from "../../runtime/browser/run/model.js";
import { DirectorySource } from "../../runtime/browser/sources/node.js";
import { FINGERPRINT, StandInServer } from "./stand_in_server.mjs";

const GOLDEN = fileURLToPath(new URL("../golden/v1.0/gpt2.splitbundle", import.meta.url));

/** A source whose bytes of one file are others from some time on. */
class Changing {
  constructor(path) {
    this.source = new DirectorySource(GOLDEN);
    this.path = path;
    this.changed = false;
  }

  stat(path) {
    return this.source.stat(path);
  }

  async read(path, start, end) {
    const bytes = Uint8Array.from(await this.source.read(path, start, end));
    if (this.changed && path === this.path) bytes[bytes.length - 1] ^= 1;
    return bytes;
  }

  list() {
    return this.source.list();
  }
}

const here = { ort: null, carrierOf: () => null };

test("a pipeline gives the golden vectors, and the same logits in pieces", async () => {
  const bundle = await openBundle(new DirectorySource(GOLDEN));
  const steps = [];
  const { pipeline, vectors } = await loadPipeline(bundle, { ...here, onStep: (what) => steps.push(what) });
  const [{ worst, most, name }] = vectors.checks;
  assert.equal(vectors.checks.length, 1);
  assert.ok(worst > 0 && worst < 1e-5, `${worst}`);
  assert.deepEqual([most, name, vectors.self], [1e-5, "float32", false]);
  assert.ok(steps.some((what) => what.includes("embedding.safetensors")));
  const ids = Array.from({ length: 9 }, (_, i) => (7 * i) % bundle.architecture.vocab_size);
  const whole = await pipeline.begin().feed(ids);
  const text = pipeline.begin();
  let last;
  for (let stop = 1; stop <= ids.length; stop += 1) last = await text.feed(ids.slice(0, stop));
  await text.feed([...ids.slice(0, 4), 1, 2]);
  const again = await text.feed(ids); // rolled back, and on
  for (const [i, each] of whole.entries()) {
    assert.ok(Math.abs(each - last[i]) < 1e-4 && Math.abs(each - again[i]) < 1e-4);
  }
  await text.end();
});

/** A source with other logits in its golden vectors, which it lists as they are. */
class WithLogits {
  constructor(change) {
    const source = new DirectorySource(GOLDEN);
    Object.assign(this, { stat: (path) => source.stat(path), list: () => source.list() });
    this.files = (async () => {
      const whole = async (path) => Uint8Array.from(await source.read(path, 0, (await source.stat(path)).size));
      const [vectors, manifest] = [await whole("vectors.safetensors"), await whole("manifest.json")];
      const before = sha256(vectors);
      const size = Number(new DataView(vectors.buffer).getBigUint64(0, true));
      const [start, end] = JSON.parse(text(vectors.subarray(8, 8 + size)))["case.0.logits"].data_offsets;
      const logits = new Float32Array(vectors.slice(8 + size + start, 8 + size + end).buffer);
      vectors.set(new Uint8Array(logits.map(change).buffer), 8 + size + start);
      const listed = text(manifest).replaceAll(before, sha256(vectors));
      return { "vectors.safetensors": vectors, "manifest.json": new TextEncoder().encode(listed) };
    })();
    this.read = async (path, from, to) =>
      (await this.files)[path]?.slice(from, to) ?? source.read(path, from, to);
  }
}

const text = (bytes) => new TextDecoder().decode(bytes);
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

test("a stage that is further off the golden vectors than its bound is refused", async () => {
  const load = async (change) => loadPipeline(await openBundle(new WithLogits(change)), here);
  await load((value) => value);
  for (const change of [(value) => 1.03 * value, (value) => 1.0001 * value, () => NaN]) {
    await assert.rejects(load(change), ({ problems: [{ code, argument, expected }] }) => {
      assert.deepEqual([code, argument], ["parity", "top"]);
      assert.match(expected, /0\.00001 of the largest value, with float32/);
      return true;
    });
  }
});

test("each way to compute has its bound", () => {
  for (const [variant, encodings, most] of [
    [null, ["rows8", "blocks4_32"], 1e-5],
    ["standard", [], 1e-5],
    ["standard", ["rows8"], 2e-2],
    ["float16", [], 1.024e-2],
    ["matmul_nbits", ["rows8", "blocks4_32"], Number.MAX_VALUE],
  ]) assert.equal(boundOf(variant, encodings).most, most, variant);
});

test("only bytes that were hashed are computed with", async () => {
  for (const [path, code] of [
    ["layer-001.safetensors", "file.digest"],
    ["architecture.json", "file.digest"],
    ["vectors.safetensors", "file.digest"],
  ]) {
    const source = new Changing(path);
    const bundle = await openBundle(source);
    source.changed = true;
    await assert.rejects(loadPipeline(bundle, here), ({ problems }) => problems[0].code === code, path);
  }
});

test("a held bundle reads each file of a unit once", async () => {
  const bundle = await openBundle(new DirectorySource(GOLDEN));
  const read = [];
  const held = await openHeld(bundle, (path) => read.push(path));
  for (const unit of ["embedding", "layer-000"]) await held.unitTensors(unit);
  await held.readRange("layer-000.safetensors", 0, 8);
  assert.deepEqual(read, ["architecture.json", "embedding.safetensors", "layer-000.safetensors"]);
});

test("a remote stage of another model is refused before weights are read", async () => {
  const bundle = await openBundle(new DirectorySource(GOLDEN));
  const [, middle] = bundle.manifest.shards;
  const server = new StandInServer();
  const carrierOf = (name) => (name === middle.name ? server : null);
  await assert.rejects(
    loadPipeline(bundle, { ort: null, carrierOf }),
    ({ problems }) => problems[0].code === "peer.fingerprint" && problems[0].got !== FINGERPRINT,
  );
  const [first] = bundle.manifest.shards;
  await assert.rejects(
    loadPipeline(bundle, { ort: null, carrierOf: (name) => (name === first.name ? server : null) }),
    ({ problems }) => problems[0].code === "stage.range",
  );
});

test("a bundle without a tokenizer makes no text", async () => {
  const bundle = await openBundle(new DirectorySource(GOLDEN));
  assert.equal(bundle.manifest.text.tokenizer, null);
  await assert.rejects(loadText(bundle), ({ problems }) => problems[0].code === "text.none");
});
