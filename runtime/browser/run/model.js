// A whole model of a bundle: stages here and elsewhere, its tokenizer, and the form of its chats.

import { parseJson, plain } from "../reader/json.js";
import { parseTextDocument } from "../reader/text_document.js";
import { checkTokenizer } from "../reader/tokenizer_rules.js";
import { StageClient } from "../wire/client.js";
import { refuse } from "../wire/refusal.js";
import { OrtStage } from "./ort_stage.js";
import { Pipeline } from "./pipeline.js";
import { ChatMl } from "./tokenizer/chat.js";
import { checkTexts } from "./tokenizer/golden.js";
import { Tokenizer } from "./tokenizer/tokenizer.js";

/** The limits of a tokenizer.json (SB-T-003). */
const TOKENIZER_LIMITS = { mostBytes: 268_435_456, mostValues: 8_388_608 };
const NOTHING = { templates: [], defaults: {}, cases: [], chats: [] };

/**
 * Load the tokenizer of a bundle. It is held against the golden texts before it is used.
 *
 * @param {object} bundle what `openBundle` returns
 * @returns {Promise<{tokenizer: Tokenizer, chat: ChatMl | null, golden: number, defaults: object}>} `golden`:
 *   how many golden texts were checked
 * @throws {BundleError} `text.none`, `text.tokenizer`, `text.ids`, and what reading throws
 */
export async function loadText(bundle) {
  const { text, model } = bundle.manifest;
  if (text.tokenizer === null) refuse("text.none", "bundle", "a tokenizer", "a bundle without one");
  const vocabSize = bundle.architecture.vocab_size;
  const file = text.tokenizer;
  const data = await bundle.bytes(file);
  checkTokenizer(data, file, vocabSize);
  const document = model.text_file === undefined
    ? NOTHING
    : parseTextDocument(await bundle.bytes(model.text_file), model.text_file, vocabSize);
  const templates = document.templates.map(({ template }) => template);
  const parsed = plain(parseJson(data, file, TOKENIZER_LIMITS));
  const tokenizer = new Tokenizer(parsed, { file, vocabSize, templates });
  const golden = checkTexts(tokenizer, document);
  return { tokenizer, chat: ChatMl.of(tokenizer, document), golden, defaults: document.defaults };
}

/**
 * Load the stages of a bundle.
 *
 * @param {object} bundle what `openBundle` returns
 * @param {object} options
 * @param {object | null} options.ort the module onnxruntime-web, if some stage is computed here
 * @param {(shard: string) => object | null} options.carrierOf returns what brings frames to a stage, or null
 *   for one that is computed here
 * @param {(what: string) => void} [options.onStep] called with what comes next
 * @param {AbortSignal} [options.signal]
 * @returns {Promise<Pipeline>}
 * @throws {BundleError} `peer.*`, `stage.graph`, and what reading throws
 */
export async function loadPipeline(bundle, { ort, carrierOf, onStep = () => {}, signal }) {
  const { shards } = bundle.manifest;
  const stages = new Map();
  for (const { name, layers, embeds, head } of shards) {
    const carrier = carrierOf(name);
    if (carrier === null) continue;
    if (embeds || head) {
      // SB-X-001
      refuse("stage.range", name, "a stage that neither embeds nor has the head", "one that does");
    }
    onStep(`asking the server of ${name}`);
    const expected = {
      name, layers, fingerprint: bundle.fingerprint, width: bundle.architecture.hidden_size,
    };
    const client = new StageClient(carrier, expected);
    await client.connect(signal); // before weights are read, which takes longer
    stages.set(name, client);
  }
  const reading = readOnce(bundle, shards.filter(({ name }) => !stages.has(name)));
  for (const { name } of shards) {
    if (stages.has(name)) continue;
    signal?.throwIfAborted();
    onStep(`loading ${name}`);
    stages.set(name, await OrtStage.load(ort, reading, name, (path) => onStep(`loading ${name}: ${path}`)));
  }
  return new Pipeline(bundle, shards.map(({ name }) => stages.get(name)));
}

/**
 * Return a view of a bundle that reads a file that several shards need only once: a tied head needs the
 * embedding.
 */
function readOnce(bundle, shards) {
  const uses = new Map();
  for (const unit of shards.flatMap(({ units }) => units)) {
    for (const path of bundle.manifest.units[unit].files) uses.set(path, (uses.get(path) ?? 0) + 1);
  }
  const held = new Map();
  const bytes = (path) => {
    const left = (uses.get(path) ?? 1) - 1;
    uses.set(path, left);
    const found = held.get(path) ?? bundle.bytes(path);
    if (left > 0) held.set(path, found);
    else held.delete(path); // the memory is wanted for the weights of others
    return found;
  };
  return {
    manifest: bundle.manifest,
    architecture: bundle.architecture,
    bytes,
    loadStage: (name) => bundle.loadStage(name),
  };
}
