/** Golden vectors: what the original model gave at every cut (SB-G-001 to SB-G-004). */

import { Stage } from "./stage.js";
import { vectorTensors } from "../reader/cross_rules.js";
import { refuse } from "../reader/problems.js";
import { judgeHeader, readHeader } from "../reader/weight_file.js";

/**
 * Compute every case with every shard, from the golden hidden state before it, and compare.
 *
 * @param {import("../reader/bundle.js").Bundle} bundle
 * @returns {Promise<{worst: number, tensors: {name: string, shard: string, difference: number}[], self:
 *   boolean}>} differences relative to the largest value that SB-C-001 compares with; Infinity where a number
 *   isn't finite. `self`: the vectors come from the bundle's own stages (SB-G-004)
 * @throws {BundleError} vectors.none, file.*, weights.*
 */
export async function checkGolden(bundle) {
  const { vectors, shards } = bundle.manifest;
  if (!vectors) {
    refuse("vectors.none", null, "golden vectors", "a bundle without them");
  }
  const read = await openVectors(bundle, vectors);
  const width = bundle.architecture.hidden_size;
  const tensors = [];
  for (const { name: shard, layers, head } of shards) {
    const stage = await Stage.loadShard(bundle, shard);
    for (const [i, length] of vectors.lengths.entries()) {
      const call = stage.range.embeds
        ? { tokenIds: [await read(`case.${i}.ids`)] }
        : { hidden: { data: await read(`case.${i}.hidden.${layers[0]}`), shape: [1, length, width] } };
      const name = head ? `case.${i}.logits` : `case.${i}.hidden.${layers[1]}`;
      const given = stage.run({ ...call, last: true });
      const scale = head ? [] : await Promise.all(range(layers[1]).map((k) => read(`case.${i}.hidden.${k}`)));
      const difference = relativeDifference((given.logits ?? given.hidden).data, await read(name), scale);
      tensors.push({ name, shard, difference });
    }
  }
  const worst = Math.max(...tensors.map((tensor) => tensor.difference));
  return { worst, tensors, self: vectors.origin === "self" };
}

/**
 * Read and judge the header of a bundle's golden vectors.
 *
 * @param {import("../reader/bundle.js").Bundle} bundle
 * @param {object} vectors the manifest's member
 * @returns {Promise<(name: string) => Promise<number[] | Float32Array>>} from a tensor's name to its numbers
 */
export async function openVectors(bundle, vectors) {
  const { files } = bundle;
  const path = vectors.file;
  await files.check(path);
  const wanted = vectorTensors(vectors, bundle.architecture);
  const read = (start, end) => files.read(path, start, end);
  const header = await readHeader(read, path, bundle.manifest.files[path], wanted.length);
  const tensors = judgeHeader(header, wanted);
  const placed = new Map(tensors.map((own) => [own.name, own]));
  return async (name) => {
    const { dtype, offset, length } = placed.get(name);
    const { buffer } = (await files.read(path, offset, offset + length)).slice();
    return dtype === "I64" ? Array.from(new BigInt64Array(buffer), Number) : new Float32Array(buffer);
  };
}

const range = (stop) => Array.from({ length: stop }, (_, i) => i);

/**
 * Return the largest difference, relative to the largest value of `wanted` and of `before`: for a hidden
 * state, SB-C-001 also seeks it in the states before. Infinity if a number isn't finite.
 */
export function relativeDifference(own, wanted, before) {
  let largest = 0;
  for (const tensor of [wanted, ...before]) {
    for (const value of tensor) {
      largest = Math.max(largest, Math.abs(value));
    }
  }
  let difference = own.length === wanted.length ? 0 : Infinity;
  for (let i = 0; i < wanted.length; i++) {
    const off = Math.abs(own[i] - wanted[i]);
    difference = Number.isFinite(off) ? Math.max(difference, off) : Infinity;
  }
  return difference === 0 ? 0 : difference / largest;
}
