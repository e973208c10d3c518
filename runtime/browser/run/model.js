// A whole model of a bundle: stages here and elsewhere, its tokenizer, and the form of its chats.

import { parseJson, plain } from "../reader/json.js";
import { parseTextDocument } from "../reader/text_document.js";
import { checkTokenizer } from "../reader/tokenizer_rules.js";
import { StageClient } from "../wire/client.js";
import { refuse } from "../wire/refusal.js";
import { checkStages } from "./golden_vectors.js";
import { DecoderStage } from "./decoder_stage.js";
import { openHeld } from "./held_source.js";
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
 * @param {object | null} options.ort the module onnxruntime-web, for shards with a graph; null for the own
 *   decoder
 * @param {(shard: string) => object | null} options.carrierOf returns what brings frames to a stage, or null
 *   for one that is computed here
 * @param {(what: string) => void} [options.onStep] called with what comes next
 * @param {(shard: string | null) => void} [options.onWait] called with the stage that hasn't answered for 2 s,
 *   now or at a later step, and with null when this wait has ended
 * @param {AbortSignal} [options.signal]
 * @returns {Promise<{pipeline: Pipeline, vectors: object | null}>} `vectors`: what `checkStages` found; null
 *   for a bundle without golden vectors
 * @throws {BundleError} `peer.*`, `parity`, and what reading throws
 */
export async function loadPipeline(bundle, { ort, carrierOf, onStep = () => {}, onWait = () => {}, signal }) {
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
    const client = new StageClient(carrier, expected, { onWait: (waits) => onWait(waits ? name : null) });
    await client.connect(signal); // before weights are read, which takes longer
    stages.set(name, client);
  }
  const held = await openHeld(bundle, (path) => onStep(`loading ${path}`));
  for (const { name, graph } of shards) {
    if (stages.has(name)) continue;
    signal?.throwIfAborted();
    onStep(`loading ${name}`);
    const own = ort !== null && graph !== null ? OrtStage.load(ort, held, name) : DecoderStage.load(
      held, name,
    );
    stages.set(name, await own);
  }
  const pipeline = new Pipeline(bundle, shards.map(({ name }) => stages.get(name)));
  onStep("comparing with the golden vectors");
  const vectors = await checkStages(held, pipeline.stages);
  return { pipeline, vectors };
}
