// The pipeline and the draws of the page, over stages that are written down.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Pipeline } from "../../runtime/browser/run/pipeline.js";
import { Random } from "../../runtime/browser/run/random.js";
import { Sampler } from "../../runtime/browser/run/sampling.js";

const VOCABULARY = 10;

/** A stage that counts what it computes. The last one says that the next id is the last one plus 1. */
class Counting {
  constructor(name) {
    this.name = name;
    this.calls = [];
    this.fails = 0;
  }

  begin() {
    return this;
  }

  async run({ ids, hidden, past, count }) {
    if (this.fails > 0) {
      this.fails -= 1;
      throw new Error("it failed");
    }
    this.calls.push([past, count]);
    const values = this.name === "bottom" ? Float32Array.from(ids) : hidden;
    if (this.name !== "top") return { hidden: values, computed: this.name === "trunk" ? 1 : undefined };
    const logits = new Float32Array(VOCABULARY);
    logits[(values.at(-1) + 1) % VOCABULARY] = 5;
    return { logits };
  }

  async end() {
    this.calls = [];
  }
}

function chained({ context = null, scaling = "none", position = { kind: "none" } } = {}) {
  const names = ["bottom", "trunk", "top"];
  const bundle = {
    manifest: { shards: names.map((name) => ({ name })), model: { context_length: context } },
    architecture: {
      embedding: { position },
      layer_kinds: { full: { attention: { position: { scaling: { kind: scaling } } } } },
    },
  };
  const stages = names.map((name) => new Counting(name));
  return { bundle, stages, text: new Pipeline(bundle, stages).begin() };
}

async function generated(text, prompt, options) {
  const ids = [];
  const made = text.generate(prompt, options);
  for (;;) {
    const { done, value } = await made.next();
    if (done) return { ids, why: value };
    ids.push(value);
  }
}

test("a text is made token by token, and ends for a reason", async () => {
  const { stages, text } = chained();
  assert.deepEqual(await generated(text, [1, 2], { most: 3 }), { ids: [3, 4, 5], why: "length" });
  assert.deepEqual(stages[1].calls, [[0, 2], [2, 1], [3, 1]]);
  assert.deepEqual(await generated(text, [1, 2], { stopIds: [5] }), { ids: [3, 4], why: "stop" });
  assert.deepEqual(await generated(chained({ context: 4 }).text, [1, 2]), { ids: [3, 4, 5], why: "context" });
  assert.deepEqual(await generated(chained({ context: 1 }).text, [1, 2]), { ids: [], why: "context" });
  const learned = chained({ context: 100, position: { kind: "learned", count: 3 } });
  assert.deepEqual(await generated(learned.text, [1, 2]), { ids: [3, 4], why: "context" });
});

test("what two texts have in common isn't computed again", async () => {
  const { stages, text } = chained();
  await text.feed([1, 2, 3, 4]);
  await text.feed([1, 2, 3, 7, 8]);
  await text.feed([1, 2, 3, 7, 8]); // the last one is: its logits are wanted
  assert.deepEqual(stages[0].calls, [[0, 4], [3, 2], [4, 1]]);
  const dynamic = chained({ scaling: "dynamic" });
  await dynamic.text.feed([1, 2, 3]);
  await dynamic.text.feed([1, 2, 3, 4]); // nothing is forgotten, so what was computed stays
  await dynamic.text.feed([1, 2, 9]);
  assert.deepEqual(dynamic.stages[0].calls, [[0, 3], [3, 1], [0, 3]]);
});

test("a long prompt goes in pieces, and a failure leaves the text usable", async () => {
  const { stages, text } = chained();
  const ids = Array.from({ length: 600 }, (_, i) => i % VOCABULARY);
  stages[1].fails = 1;
  await assert.rejects(text.feed(ids));
  const logits = await text.feed(ids);
  assert.equal(logits[0], 5);
  assert.deepEqual(stages[1].calls, [[0, 256], [256, 256], [512, 88]]);
  const stop = new AbortController();
  stop.abort();
  await assert.rejects(text.feed([1], stop.signal), { name: "AbortError" });
});

test("stages in another order are refused", () => {
  const { bundle, stages } = chained();
  assert.throws(
    () => new Pipeline(bundle, stages.reverse()), ({ problems }) => problems[0].code === "pipeline.tiling",
  );
});

test("a seed draws as Python's random.Random does", () => {
  for (const [seed, first, second] of [
    [0, 0.8444218515250481, 0.7579544029403025],
    [42, 0.6394267984578837, 0.025010755222666936],
    [-7, 0.32383276483316237, 0.15084917392450192],
    [2 ** 40, 0.1036394562812375, 0.6705558677439764],
  ]) {
    const random = new Random(seed);
    assert.deepEqual([random.random(), random.random()], [first, second]);
  }
});

test("draws", () => {
  const logits = Float32Array.of(1, 3, 3, 0, -1);
  assert.equal(new Sampler().draw(logits), 1); // the lowest id among equals
  const drawn = (sampling, times = 2000) => {
    const sampler = new Sampler({ seed: 5, ...sampling });
    const found = Array(logits.length).fill(0);
    for (let i = 0; i < times; i += 1) found[sampler.draw(logits)] += 1;
    return found;
  };
  const all = drawn({ temperature: 1 });
  const powers = [...logits].map(Math.exp);
  const total = powers.reduce((sum, each) => sum + each);
  for (const [i, each] of all.entries()) {
    assert.ok(Math.abs(each / 2000 - powers[i] / total) < 0.04, `${all}`);
  }
  assert.deepEqual(drawn({ temperature: 1, topK: 1 }), [0, 2000, 0, 0, 0]);
  const two = drawn({ temperature: 1, topP: 0.6 });
  assert.deepEqual([two[0], two[3], two[4]], [0, 0, 0]);
  assert.deepEqual(drawn({ temperature: 1e-30 })[0], 0);
  assert.deepEqual(drawn({ temperature: 1, topP: 0.6 }), two);
  const wrongs = [{ temperature: -1 }, { topK: 0 }, { topP: 0 }, { topP: 2 }, { seed: 0.5 }];
  for (const wrong of [...wrongs, { temperature: NaN }]) {
    assert.throws(() => new Sampler(wrong), ({ problems }) => problems[0].code === "input.value");
  }
  for (const wrong of [NaN, Infinity]) {
    const refused = ({ problems }) => problems[0].argument === "logits";
    assert.throws(() => new Sampler().draw(Float32Array.of(1, wrong)), refused);
  }
});
