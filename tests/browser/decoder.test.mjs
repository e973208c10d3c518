import assert from "node:assert/strict";
import { test } from "node:test";

import { erf, softplus } from "../../runtime/browser/decoder/activations.js";
import { checkGolden } from "../../runtime/browser/decoder/golden.js";
import { slopes } from "../../runtime/browser/decoder/positions.js";
import { Stage } from "../../runtime/browser/decoder/stage.js";
import { openBundle } from "../../runtime/browser/reader/bundle.js";
import { MemorySource, refused } from "./support.mjs";

/** SB-C-001 */
const TOLERANCE = 1e-5;
const IDS = [
  [3, 1, 4, 1, 5, 9, 2],
  [6, 5, 3],
];

test("golden vectors are reproduced", async () => {
  for (const name of ["tiny", "quantized"]) {
    const { worst, tensors, self } = await checkGolden(await openBundle(new MemorySource(name)));
    assert.ok(worst > 0 && worst < TOLERANCE, `${name}: ${worst}`);
    assert.ok(tensors.length >= 4);
    assert.equal(self, name === "quantized");
  }
});

test("a changed weight shows", async () => {
  const bundle = await openBundle(new MemorySource("tiny"));
  const stage = await Stage.loadShard(bundle, "top");
  const weight = stage.weights.get("layers.0.attention.value.weight").row(0);
  const call = { hidden: { data: new Float32Array(8).fill(1), shape: [1, 1, 8] } };
  const before = stage.run(call).logits.data.slice();
  weight[0] += 0.1;
  assert.notDeepEqual(stage.run(call).logits.data, before);
});

test("pieces, padding and neighbours change nothing, and padding is zero", async () => {
  for (const name of ["tiny", "quantized"]) {
    const bundle = await openBundle(new MemorySource(name));
    const last = bundle.architecture.layers.length;
    const whole = await Stage.load(bundle, { start: 0, stop: last });
    const vocabulary = bundle.architecture.vocab_size;
    const alone = IDS.map((ids) => whole.run({ tokenIds: [ids] }).logits.data);
    const { shards } = bundle.manifest;
    const stages = await Promise.all(shards.map((shard) => Stage.loadShard(bundle, shard.name)));
    const caches = stages.map((stage) => stage.newCache({ rows: 2, slots: 8 }));
    const calls = [
      { past: [0, 0], count: [4, 0] },
      { past: [4, 0], count: [2, 3] },
      { past: [5, 3], count: [2, 0] }, // a rollback: one position again
    ];
    for (const { past, count } of calls) {
      const own = (ids, b) => ids.slice(past[b], past[b] + count[b]);
      const tokenIds = IDS.map((ids, b) => [...own(ids, b), 0, 0, 0, 0, 0].slice(0, 5));
      let given = { tokenIds };
      stages.forEach((stage, i) => {
        given = stage.run({ ...given, past, count, cache: caches[i] });
      });
      const { data, shape } = given.logits;
      assert.deepEqual(shape, [2, 5, vocabulary]);
      for (let b = 0; b < 2; b++) {
        for (let i = 0; i < 5; i++) {
          const own = data.subarray((b * 5 + i) * vocabulary, (b * 5 + i + 1) * vocabulary);
          const at = (past[b] + i) * vocabulary;
          const wanted = i < count[b] ? alone[b].subarray(at, at + vocabulary) : new Float32Array(vocabulary);
          assert.deepEqual(own, wanted);
        }
      }
    }
  }
});

test("the last logits alone stand at the last token of each row", async () => {
  const bundle = await openBundle(new MemorySource("tiny"));
  const stage = await Stage.load(bundle, { start: 0, stop: 1 });
  const vocabulary = bundle.architecture.vocab_size;
  const { logits } = stage.run({ tokenIds: IDS, last: true });
  assert.deepEqual(logits.shape, [2, 1, vocabulary]);
  IDS.forEach((ids, b) => {
    const all = stage.run({ tokenIds: [ids] }).logits.data;
    assert.deepEqual(logits.data.subarray(b * vocabulary, (b + 1) * vocabulary), all.subarray(-vocabulary));
  });
});

test("what can't be computed is refused, and the cache stays as it was", async () => {
  const bundle = await openBundle(new MemorySource("tiny"));
  const first = await Stage.load(bundle, { start: 0, stop: 1, head: false });
  const cache = first.newCache({ rows: 1, slots: 4 });
  first.run({ tokenIds: [[1, 2]], cache });
  const kept = cache.layers[0].keys.slice();
  const run = (call) => () => first.run({ cache, ...call });
  await refused(run({ tokenIds: [[1, 2, 3]], past: [2] }), "session.capacity");
  await refused(run({ tokenIds: [[1]], past: [3] }), "input.position");
  await refused(run({ tokenIds: [[24]], past: [2] }), "input.value");
  await refused(run({ tokenIds: [[-1]], past: [2] }), "input.value");
  await refused(run({ tokenIds: [[1.5]], past: [2] }), "input.value");
  await refused(run({ tokenIds: [[1]], past: [2], count: [2] }), "input.value");
  await refused(run({ tokenIds: [[1], [2]] }), "input.cache");
  await refused(run({ tokenIds: [[]] }), "input.shape");
  await refused(run({ hidden: { data: new Float32Array(8), shape: [1, 1, 8] } }), "input.shape");
  await refused(() => first.run({ tokenIds: [[1]], past: [1] }), "input.position");
  assert.deepEqual([cache.lengths[0], cache.layers[0].keys], [2, kept]);
  const second = await Stage.load(bundle, { start: 0, stop: 1, embeds: false });
  await refused(() => second.run({ hidden: { data: new Float32Array(7), shape: [1, 1, 7] } }), "input.shape");
  for (const range of [{ start: 0, stop: 2 }, { start: 1, stop: 0 }, { start: 1, stop: 1, head: false }]) {
    await refused(() => Stage.load(bundle, range), "stage.range");
  }
});

test("functions have the values of tables", () => {
  const table = [
    [0, 0],
    [0.5, 0.5204998778130465],
    [1, 0.8427007929497149],
    [-2, -0.9953222650189527],
    [3.5, 0.9999992569016276],
    [7, 1],
  ];
  for (const [x, value] of table) {
    assert.ok(Math.abs(erf(x) - value) < 1e-15, `erf(${x})`);
  }
  assert.deepEqual([softplus(1000), softplus(-1000)], [1000, 0]);
  assert.deepEqual(slopes(6, 8), [2 ** -2, 2 ** -4, 2 ** -6, 2 ** -8, 2 ** -1, 2 ** -3]);
  assert.deepEqual(slopes(4, 8), [2 ** -2, 2 ** -4, 2 ** -6, 2 ** -8]);
});
