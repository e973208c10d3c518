/** Verification: every digest, and every rule about the content of files (SB-D-006 to SB-D-013). */

import { checkGenai } from "./genai.js";
import { vectorTensors } from "./cross_rules.js";
import { judgeGraph } from "./onnx_graph.js";
import { byBytes, isSignature, parents } from "./paths.js";
import { BundleError, MOST_PROBLEMS, problem } from "./problems.js";
import { checkSums, sumsOf } from "./sums.js";
import { parseTextDocument } from "./text_document.js";
import { checkTokenizer } from "./tokenizer_rules.js";
import { judgeHeader, readHeader } from "./weight_file.js";

const SUMS = "SHA256SUMS";
/** SB-D-014 */
const MOST_SIGNATURES = 64;
const LARGEST_SIGNATURE = 16_777_216;
/** SB-D-010 */
const LARGEST_SUMS = 16_777_216;

/**
 * Verify a bundle. `Bundle.verify` describes the options and the result.
 *
 * The groups are: what is there, and of which kind and size; `SHA256SUMS`; digests; content. No group follows
 * one with a problem.
 */
export async function verifyBundle(bundle, { exact = false, whole = false, onProgress = () => {} } = {}) {
  const state = await survey(bundle, whole);
  const unlisted = await findUnlisted(bundle, exact);
  if (state.sums) {
    await verifySums(bundle);
  }
  const total = state.present.reduce((sum, path) => sum + bundle.manifest.files[path].size, 0);
  let done = 0;
  await inGroup(state.present, async (path) => {
    await bundle.files.checkDigest(path, (own) => onProgress(path, done + own, total));
    done += bundle.manifest.files[path].size;
  });
  await verifyContent(bundle, state);
  return { unlisted, absent: state.absent, shards: state.shards };
}

/** Do a step for all items, and report the problems of all. */
async function inGroup(items, step) {
  const problems = [];
  for (const item of items) {
    try {
      await step(item);
    } catch (error) {
      if (!(error instanceof BundleError)) {
        throw error;
      }
      problems.push(...error.problems);
    }
    if (problems.length >= MOST_PROBLEMS) {
      break;
    }
  }
  if (problems.length) {
    throw new BundleError(problems.slice(0, MOST_PROBLEMS));
  }
}

/** What is there, by kinds and sizes alone. */
async function survey({ files, manifest }, whole) {
  const faults = [];
  const absent = [];
  const present = [];
  for (const path of Object.keys(manifest.files).sort(byBytes)) {
    const fault = await files.fault(path);
    if (fault?.code === "file.missing") {
      absent.push(path);
    } else if (fault) {
      faults.push(fault);
    } else {
      present.push(path);
    }
  }
  const gone = new Set(absent);
  const there = (path) => !gone.has(path);
  const shardFiles = ({ units, graph }) => [
    ...units.flatMap((unit) => manifest.units[unit].files),
    ...(graph ? [graph.file] : []),
  ];
  const shards = manifest.shards.filter((shard) => shardFiles(shard).every(there));
  const ofWhole = new Set(shards.flatMap(shardFiles));
  const stray = manifest.shards.flatMap(shardFiles).some((path) => there(path) && !ofWhole.has(path));
  const part = shards.length > 0 && shards.length < manifest.shards.length && !stray; // SB-D-013
  const sums = await files.isThere(SUMS);
  if (!part || whole) {
    const missing = sums ? absent : [SUMS, ...absent];
    faults.push(...missing.map((path) => problem("file.missing", path, "the file", "nothing")));
  }
  if (faults.length) {
    throw new BundleError(faults.sort((one, other) => byBytes(one.file, other.file)).slice(0, MOST_PROBLEMS));
  }
  return { present, absent, sums, shards: shards.map((shard) => shard.name) };
}

/** SB-D-006 */
async function findUnlisted({ files, manifest }, exact) {
  const entries = await files.source.list();
  if (entries === null) {
    if (exact) {
      const hint = "verify a copy of the directory, or without exact";
      const expected = "false, because this source can't list its files (HTTP can't)";
      throw new BundleError(problem("input.value", null, expected, exact, { argument: "exact", hint }));
    }
    return [];
  }
  const listed = new Set(["manifest.json", SUMS, ...Object.keys(manifest.files)]);
  const directories = new Set([...listed].flatMap(parents)).add("signatures");
  const filled = new Set(entries.flatMap(({ path }) => parents(path)));
  const signatures = await findSignatures(files, entries);
  const unlisted = entries
    .filter(({ path, kind }) => {
      if (kind === "directory") {
        return !filled.has(path) && !directories.has(path) && !listed.has(path);
      }
      return !listed.has(path) && !signatures.has(path);
    })
    .map(({ path }) => path)
    .sort(byBytes);
  if (exact && unlisted.length) {
    const one = (path) => problem("file.unlisted", path, "listed files alone", "another one");
    throw new BundleError(unlisted.slice(0, MOST_PROBLEMS).map(one));
  }
  return unlisted;
}

/** SB-D-014: regular files of a size, the first 64 by their names. */
async function findSignatures(files, entries) {
  const found = new Set();
  const regular = entries.filter(({ path, kind }) => kind === "file" && isSignature(path));
  for (const path of regular.map((entry) => entry.path).sort(byBytes)) {
    const { size } = (await files.source.stat(path)) ?? { size: Infinity };
    if (size <= LARGEST_SIGNATURE && found.size < MOST_SIGNATURES) {
      found.add(path);
    }
  }
  return found;
}

async function verifySums({ files, manifest, manifestDigest }) {
  const wanted = sumsOf(manifest.files, manifestDigest);
  await files.check(SUMS);
  const { size } = await files.source.stat(SUMS);
  if (size > LARGEST_SUMS) {
    throw new BundleError(problem("file.size", SUMS, `at most ${LARGEST_SUMS} bytes`, size)); // SB-D-010
  }
  checkSums(await files.read(SUMS, 0, size), wanted, manifestDigest);
}

async function verifyContent(bundle, { present, absent }) {
  const { manifest, architecture, files } = bundle;
  const there = new Set(present);
  const whole = (unit) => manifest.units[unit].files.every((path) => there.has(path));
  await inGroup(Object.keys(manifest.units).filter(whole), async (unit) => {
    for (const tensor of await bundle.unitTensors(unit)) {
      await bundle.checkScales(tensor);
    }
  });
  const { vectors, text, model } = manifest;
  const results = [vectors?.file, vectors?.original].filter((path) => there.has(path));
  await inGroup(results, async (path) => {
    const read = (start, end) => files.read(path, start, end);
    const wanted = vectorTensors(vectors, architecture);
    judgeHeader(await readHeader(read, path, manifest.files[path], wanted.length), wanted);
  });
  const graphs = manifest.shards.filter(({ graph }) => graph && there.has(graph.file));
  await inGroup(graphs, async (shard) => judgeGraph(bundle, shard, await bundle.bytes(shard.graph.file)));
  if (there.has(text.tokenizer)) {
    checkTokenizer(await bundle.bytes(text.tokenizer), text.tokenizer, architecture.vocab_size);
  }
  if (there.has(model.text_file)) {
    parseTextDocument(await bundle.bytes(model.text_file), model.text_file, architecture.vocab_size);
  }
  if (!absent.length) {
    await checkGenai(bundle);
  }
}
