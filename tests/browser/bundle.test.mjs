import assert from "node:assert/strict";
import { test } from "node:test";

import { openBundle } from "../../runtime/browser/reader/bundle.js";
import { judgeModel } from "../../runtime/browser/reader/onnx_graph.js";
import { graphPorts } from "../../runtime/browser/reader/cross_rules.js";
import { checkSourceNames } from "../../runtime/browser/reader/source_names.js";
import { BundleError, Collector } from "../../runtime/browser/reader/problems.js";
import { sumsOf } from "../../runtime/browser/reader/sums.js";
import { MemorySource, refused } from "./support.mjs";

const text = (bytes) => new TextDecoder().decode(bytes);

test("a bundle has its documents, ids and tensors", async () => {
  const source = new MemorySource("tiny");
  const bundle = await openBundle(source);
  assert.deepEqual([...new Set(source.opened)], ["manifest.json", "architecture.json"]);
  assert.match(bundle.id, /^sha256:[0-9a-f]{64}$/);
  assert.equal(bundle.fingerprint, bundle.manifest.model.fingerprint);
  assert.ok(Object.isFrozen(bundle.manifest.shards[0]) && Object.isFrozen(bundle.architecture.layers));
  const tensors = await bundle.tensors("top");
  const query = tensors.find(({ name }) => name === "layers.0.attention.query.weight");
  assert.deepEqual([query.dtype, query.unit], ["F32", "layer-000"]);
  assert.equal(query.length, query.shape[0] * query.shape[1] * 4);
  const range = [query.offset, query.offset + 4];
  const bytes = await bundle.readRange(query.file, ...range);
  assert.deepEqual(bytes, source.files.get(query.file).slice(...range));
  assert.equal(sumsOf(bundle.manifest.files, bundle.manifestDigest), text(source.files.get("SHA256SUMS")));
  await assert.rejects(() => bundle.bytes("../secret"), RangeError);
  await assert.rejects(() => bundle.readRange("notes.txt", 0, 1), RangeError);
  await refused(() => bundle.loadStage("middle"), "stage.name");
});

test("verification reports progress, what isn't listed, and what is absent", async () => {
  const source = new MemorySource("tiny");
  source.files.set("notes.txt", new Uint8Array(3));
  const bundle = await openBundle(source);
  let last = null;
  const found = await bundle.verify({ onProgress: (...progress) => (last = progress) });
  assert.deepEqual(found, { unlisted: ["notes.txt"], absent: [], shards: ["bottom", "top"] });
  assert.equal(last[1], last[2]);
  assert.ok(!source.opened.includes("notes.txt"));
  await refused(() => bundle.verify({ exact: true }), "file.unlisted", "notes.txt");
  for (const path of ["layer-000.safetensors", "head.safetensors", "top.onnx"]) {
    source.files.delete(path);
  }
  assert.deepEqual((await bundle.verify()).shards, ["bottom"]);
  await refused(() => bundle.verify({ whole: true }), "file.missing", "head.safetensors");
  await refused(() => bundle.bytes("top.onnx"), "file.missing", "top.onnx");
});

test("all problems of a group are reported", async () => {
  const source = new MemorySource("tiny");
  for (const path of ["README.md", "vectors.safetensors"]) {
    source.files.get(path)[0] ^= 1;
  }
  const bundle = await openBundle(source);
  await assert.rejects(() => bundle.verify(), (error) => {
    assert.deepEqual(error.problems.map(({ file }) => file), ["README.md", "vectors.safetensors"]);
    return error instanceof BundleError;
  });
});

function isGraphProblem(error) {
  return error instanceof BundleError && error.problems[0].code.startsWith("graph.");
}

test("every truncation of a graph is refused", async () => {
  for (const name of ["tiny", "quantized"]) {
    const bundle = await openBundle(new MemorySource(name));
    const shard = bundle.shard("bottom");
    const graph = await bundle.bytes(shard.graph.file);
    const wanted = {
      ports: graphPorts(shard, bundle.architecture),
      tensors: await bundle.tensors("bottom"),
      products: shard.graph.variant === "matmul_nbits",
    };
    judgeModel(graph, "x.onnx", wanted);
    for (let length = 0; length < graph.length; length++) {
      const judge = () => judgeModel(graph.subarray(0, length), "x.onnx", wanted);
      assert.throws(judge, isGraphProblem, `${length} bytes`);
    }
  }
});

test("source names that meet row by row are found without enumerating rows", () => {
  const shapes = { a: [2 ** 31 - 1, 4], b: [3, 4], c: [7, 4] };
  const judged = (...sources) => {
    const names = Object.keys(shapes).slice(0, sources.length);
    const tensors = {
      architecture: { head: { tied: false } },
      layers: 1,
      count: names.length,
      shape: (name) => shapes[name],
    };
    const entry = (source, i) => ({ source, tensors: [names[i]], groups: 1, transposed: false });
    const storage = { exceptions: {}, dtype: "float32" };
    const found = new Collector("manifest.json");
    checkSourceNames({ requires: [], storage, source_names: sources.map(entry) }, tensors, found);
    return found.problems.map(({ code, pointer }) => `${code} ${pointer}`);
  };
  const meets = ["manifest.sources /source_names"];
  assert.deepEqual(judged("x.{row}.y", "x.y"), []);
  assert.deepEqual(judged("x.{row}.y", "x.2147483647.y"), []);
  assert.deepEqual(judged("x.{row}.y", "x.2147483646.y"), meets);
  assert.deepEqual(judged("x.{row}.y", "x.01.y"), []);
  assert.deepEqual(judged("x.{row}", "x.{row}"), meets);
  assert.deepEqual(judged("x.{row}.2", "x.7.{row}"), meets);
  assert.deepEqual(judged("x.{row}.3", "x.7.{row}"), []);
  assert.deepEqual(judged("z", "x.{row}.2", "x.2.{row}"), meets);
  assert.deepEqual(judged("z", "x.{row}.2", "x.3.{row}"), []);
});
