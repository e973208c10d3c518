// Stages in a row: local ones and remote ones. They make one model, and generate token after token.

import { refuse } from "../wire/refusal.js";
import { Sampler } from "./sampling.js";

/** The tokens of a prompt that are computed at once, so that a page stays alive and a frame stays small. */
const PIECE = 256;
/**
 * The kinds of rotary positions whose angles depend on the length of the row: nothing is rolled back
 * (SB-C-031).
 */
const BY_LENGTH = ["dynamic", "longrope"];

/** A model of stages in order. Token ids and logits stay with the first and the last one. */
export class Pipeline {
  /**
   * Chain stages.
   *
   * @param {object} bundle what `openBundle` returns
   * @param {{name: string, begin: () => object}[]} stages one for each shard, in order: `OrtStage` or
   *   `StageClient`
   * @throws {BundleError} `pipeline.tiling`
   */
  constructor(bundle, stages) {
    const names = bundle.manifest.shards.map((shard) => shard.name);
    const got = stages.map((stage) => stage.name);
    if (names.join() !== got.join()) refuse("pipeline.tiling", "stages", names.join(", "), got.join(", "));
    this.stages = stages;
    const { architecture, manifest } = bundle;
    const learned = architecture.embedding.position;
    this.context = learned.kind === "learned" ? learned.count : (manifest.model.context_length ?? Infinity);
    this.rollsBack = !Object.values(architecture.layer_kinds).some((kind) => {
      const scaling = kind.attention?.position?.scaling?.kind;
      return BY_LENGTH.includes(scaling);
    });
  }

  /** Begin a text. */
  begin() {
    return new Text(this);
  }
}

/** One text: the ids that the caches of all stages hold. */
export class Text {
  constructor(pipeline) {
    this.pipeline = pipeline;
    this.sessions = pipeline.stages.map((stage) => stage.begin());
    this.ids = [];
    this.remote = 0;
  }

  /**
   * Compute what is new of a text. What it has in common with the text before stays in the caches.
   *
   * @param {number[]} ids all ids of the text, at least one
   * @param {AbortSignal} [signal]
   * @returns {Promise<Float32Array>} the logits after the last id, (vocab)
   * @throws {BundleError} `input.position` for a text longer than the context; what stages throw
   */
  async feed(ids, signal) {
    const { context, rollsBack } = this.pipeline;
    if (ids.length === 0) refuse("input.value", "ids", "at least one id", "none");
    if (ids.length > context) {
      refuse("input.position", "ids", `at most ${context} tokens`, String(ids.length));
    }
    let kept = 0;
    while (kept < this.ids.length && kept < ids.length - 1 && this.ids[kept] === ids[kept]) kept += 1;
    if (kept < this.ids.length && !rollsBack) kept = 0;
    let logits;
    for (let past = kept; past < ids.length; past += PIECE) {
      const piece = ids.slice(past, past + PIECE);
      // A stage that fails leaves the others a step ahead. They forget it at the next call, by its `past`.
      this.ids = ids.slice(0, past);
      logits = await this.step(piece, past, past + piece.length === ids.length, signal);
    }
    this.ids = [...ids];
    return logits;
  }

  async step(ids, past, wanted, signal) {
    let call = { ids, past, count: ids.length, wanted };
    for (const session of this.sessions) {
      signal?.throwIfAborted();
      const began = performance.now();
      const found = await session.run(call, signal);
      if (found.computed !== undefined) this.remote += performance.now() - began;
      call = { hidden: found.hidden, past, count: ids.length, wanted };
      if (session === this.sessions.at(-1)) return found.logits;
    }
    return undefined;
  }

  /**
   * Generate the tokens after a prompt.
   *
   * @param {number[]} prompt
   * @param {object} [options]
   * @param {number} [options.most] the most new tokens
   * @param {number[]} [options.stopIds] ids that end a text; such an id isn't yielded
   * @param {import("./sampling.js").Sampling} [options.sampling]
   * @param {AbortSignal} [options.signal]
   * @yields {number} the id of each new token
   * @returns {AsyncGenerator<number, "stop" | "length" | "context">} why it ended
   */
  async *generate(prompt, { most = 256, stopIds = [], sampling = {}, signal } = {}) {
    const sampler = new Sampler(sampling);
    const ids = [...prompt];
    for (let made = 0; made < most; made += 1) {
      if (ids.length > this.pipeline.context) return "context";
      const id = sampler.draw(await this.feed(ids, signal));
      if (stopIds.includes(id)) return "stop";
      ids.push(id);
      yield id;
    }
    return "length";
  }

  /** End the sessions of all stages. */
  async end() {
    this.ids = [];
    await Promise.all(this.sessions.map((session) => session.end()));
  }
}
