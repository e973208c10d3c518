// Stages of the page without a library: a golden bundle, opened strictly, in one piece and token by token.

import assert from "node:assert/strict";
import { test } from "node:test";
import { fileURLToPath } from "node:url";

import { openBundle } from "../../runtime/browser/reader/bundle.js";
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
  assert.ok(vectors.worst < 1e-5, `${vectors.worst}`);
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
