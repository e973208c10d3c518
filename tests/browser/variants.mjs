/**
 * Compute variants of decoders: `node variants.mjs` reads a list of `{architecture, tensors, ids}` as JSON
 * from stdin, and writes for each the hidden states before the first layer and after each one, and all
 * logits.
 *
 * A tensor is `{shape, data}`. Nothing is compared here.
 */

import { text } from "node:stream/consumers";

import { Stage } from "../../runtime/browser/decoder/stage.js";
import { parseArchitecture } from "../../runtime/browser/reader/architecture.js";

function matrix({ shape, data }) {
  const columns = shape.at(-1);
  const numbers = Float32Array.from(data);
  const row = (index) => numbers.subarray(index * columns, (index + 1) * columns);
  return { rows: numbers.length / columns, columns, row };
}

function results({ architecture: document, tensors, ids }) {
  const architecture = parseArchitecture(new TextEncoder().encode(JSON.stringify(document)));
  const weights = new Map(Object.entries(tensors).map(([name, tensor]) => [name, matrix(tensor)]));
  const depth = architecture.layers.length;
  const run = (stop, head) => {
    return new Stage(architecture, { start: 0, stop, embeds: true, head }, weights).run({ tokenIds: [ids] });
  };
  const hidden = Array.from({ length: depth + 1 }, (_, stop) => run(stop, false).hidden);
  return [...hidden, run(depth, true).logits].map(({ data }) => Array.from(data));
}

process.stdout.write(JSON.stringify(JSON.parse(await text(process.stdin)).map(results)));
