// Hold the loaded stages against the golden vectors of their bundle (SB-G-001 to SB-G-004).

import { openVectors, relativeDifference } from "../decoder/golden.js";

/**
 * Compute every case with every stage that is here, from the golden hidden state before it.
 *
 * @param {object} bundle what `openHeld` returns
 * @param {object[]} stages `OrtStage` and `DecoderStage`; others are left out
 * @returns {Promise<{worst: number, self: boolean} | null>} the largest difference relative to the largest
 *   value of its tensor, and whether the vectors come from the bundle's own stages; null without golden
 *   vectors
 */
export async function measureStages(bundle, stages) {
  const { vectors } = bundle.manifest;
  if (vectors === null) return null;
  const read = await openVectors(bundle, vectors);
  let worst = 0;
  for (const stage of stages.filter((each) => each.release !== undefined)) {
    for (const [i, count] of vectors.lengths.entries()) {
      const [start, stop] = stage.layers;
      const input = stage.embeds
        ? { ids: await read(`case.${i}.ids`) }
        : { hidden: await read(`case.${i}.hidden.${start}`) };
      const found = await stage.begin().run({ ...input, past: 0, count });
      const wanted = await read(stage.head ? `case.${i}.logits` : `case.${i}.hidden.${stop}`);
      worst = Math.max(worst, relativeDifference(found.logits ?? found.hidden, wanted, []));
    }
  }
  return { worst, self: vectors.origin === "self" };
}
