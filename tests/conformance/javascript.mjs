/**
 * Adapter of the JavaScript reader for the kit: `node javascript.mjs STEP DIRECTORY`. README.md has the
 * protocol.
 *
 * `node javascript.mjs --serve` reads lines `STEP DIRECTORY` from stdin and answers each with one line, so
 * that a test needn't start Node a thousand times.
 */

import { createInterface } from "node:readline";

import { openBundle } from "../../runtime/browser/reader/bundle.js";
import { BundleError } from "../../runtime/browser/reader/problems.js";
import { DirectorySource } from "../../runtime/browser/sources/node.js";

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

/** @returns {Promise<object>} the verdict */
async function judge(step, directory) {
  try {
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
  if (!Object.hasOwn(STEPS, first) || directory === undefined) {
    throw new Error(`usage: node javascript.mjs ${Object.keys(STEPS).join("|")} DIRECTORY`);
  }
  process.stdout.write(`${JSON.stringify(await judge(first, directory))}\n`);
}

await main(process.argv.slice(2));
