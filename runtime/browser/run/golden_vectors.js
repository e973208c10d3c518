// Hold the loaded stages against the golden vectors of their bundle (SB-G-001 to SB-G-004).

import { openVectors, relativeDifference } from "../decoder/golden.js";
import { refuse } from "../wire/refusal.js";

/** SB-C-001. The own decoder keeps it with every kind of weights: it rounds no factor. */
const FLOAT32 = { most: 1e-5, name: "float32" };
/** SB-C-001, for graphs that round the factors of products with `rows8` to 13 bits. */
const ROWS8 = { most: 2e-2, name: "factors of 13 bits" };
/** SB-C-001 gives none. This is what the runtime allows, too: 1.7 times the largest known difference. */
const FLOAT16 = { most: 1e-5 * 2 ** 10, name: "float16" };
/** SB-C-001 gives none, and onnxruntime-web rounds the factors, so the numbers must be finite, no more. */
const BLOCKS4 = { most: Number.MAX_VALUE, name: "factors of 8 bits" };

/**
 * Return how far a stage may be off the golden vectors.
 *
 * @param {string | null} variant of the stage's graph; null for the own decoder
 * @param {string[]} encodings those of the bundle's weights
 * @returns {{most: number, name: string}} `most`: a share of the largest value, and `Number.MAX_VALUE` where
 *   only NaN and infinity are wrong; `name`: what the stage computes with
 */
export function boundOf(variant, encodings) {
  if (variant === null) return FLOAT32;
  if (variant === "matmul_nbits") return BLOCKS4;
  if (variant === "float16") return FLOAT16;
  return encodings.includes("rows8") ? ROWS8 : FLOAT32;
}

/**
 * Compute every case with every stage that is here, from the golden hidden state before it, and compare.
 *
 * @param {object} bundle what `openHeld` returns
 * @param {object[]} stages `OrtStage` and `DecoderStage`; others are left out
 * @returns {Promise<{checks: {worst: number, most: number, name: string}[], self: boolean} | null>} a check
 *   for each bound that held, with the largest difference relative to the largest value that SB-C-001
 *   compares with; and whether the vectors come from the bundle's own stages. null without golden vectors
 * @throws {BundleError} `parity` for a stage that is further off than its bound
 */
export async function checkStages(bundle, stages) {
  const { vectors, storage } = bundle.manifest;
  if (vectors === null) return null;
  const read = await openVectors(bundle, vectors);
  const encodings = Object.values(storage.encodings ?? {});
  const checks = new Map();
  for (const stage of stages.filter((each) => each.release !== undefined)) {
    const bound = boundOf(stage.variant, encodings);
    for (const i of vectors.lengths.keys()) {
      const difference = await differenceOf(stage, i, vectors.lengths[i], read);
      if (!(difference <= bound.most)) refuseParity(stage, bound, difference);
      checks.set(bound, Math.max(difference, checks.get(bound) ?? 0));
    }
  }
  const held = [...checks].map(([bound, worst]) => ({ worst, ...bound }));
  return { checks: held, self: vectors.origin === "self" };
}

async function differenceOf(stage, i, count, read) {
  const [start, stop] = stage.layers;
  const input = stage.embeds
    ? { ids: await read(`case.${i}.ids`) }
    : { hidden: await read(`case.${i}.hidden.${start}`) };
  const { hidden, logits } = await stage.begin().run({ ...input, past: 0, count });
  if (stage.head) return relativeDifference(logits, await read(`case.${i}.logits`), []);
  const before = [];
  for (let k = 0; k < stop; k += 1) before.push(await read(`case.${i}.hidden.${k}`));
  return relativeDifference(hidden, await read(`case.${i}.hidden.${stop}`), before);
}

function refuseParity(stage, { most, name }, difference) {
  const expected = most === Number.MAX_VALUE
    ? "finite numbers"
    : `the golden vectors to ${most.toPrecision(1)} of the largest value, with ${name}`;
  const got = Number.isFinite(difference) ? difference.toPrecision(2) : "NaN or infinity";
  refuse("parity", stage.name, expected, got, "This stage computes something else than the model: report it");
}
