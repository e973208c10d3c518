// The text view: load the stages, and generate text with the ends of the model here and the rest on servers.

import { loadOnnxRuntime } from "../run/onnxruntime.js";
import { loadPipeline, loadText } from "../run/model.js";
import { HttpCarrier } from "../wire/http_carrier.js";
import { refuse } from "../wire/refusal.js";
import { breathe, byId, bytes, make, plural, told } from "./elements.js";
import { ONNXRUNTIME, headers, stageUrl } from "./gateway.js";

const CHAT = "chat";
const ORT = "onnxruntime";
const OWN = "decoder";

/** What the view shows of one bundle. */
export class TextView {
  constructor() {
    this.bundle = null;
    this.gateway = null;
    this.model = null;
    this.running = null;
    this.line = byId("load-state"); // says for which stage the page waits
    byId("load").addEventListener("click", () => this.load());
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("forget").addEventListener("click", () => this.forget());
    byId("mode").addEventListener("change", () => this.forget());
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("composer").requestSubmit();
    });
    addEventListener("pagehide", () => this.model?.text.end());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.running?.abort();
    });
  }

  /** Take another bundle. Nothing is loaded yet. */
  suit(bundle, gateway) {
    this.running?.abort();
    this.model?.text.end();
    this.model = null;
    this.bundle = bundle;
    this.gateway = gateway?.bundle === bundle.id ? gateway : null;
    this.canUseOrt = gateway?.onnxruntime_web === true && bundle.manifest.shards.some(
      ({ graph }) => graph !== null,
    );
    byId("composer-panel").hidden = true;
    byId("load-panel").hidden = false;
    byId("places").replaceChildren(...bundle.manifest.shards.map((shard) => this.placeOf(shard)));
    const hasTokenizer = bundle.manifest.text.tokenizer !== null;
    byId("load-about").textContent = hasTokenizer
      ? "The page computes the parts that are here, and asks servers for the rest."
      : "This bundle has no tokenizer, so it makes no text.";
    byId("engine").value = this.canUseOrt ? ORT : OWN;
    byId("engine").disabled = !this.canUseOrt;
    byId("engine-about").textContent = this.canUseOrt ? "" : this.whyNoOrt(gateway);
    byId("load").disabled = !hasTokenizer;
    byId("load-state").textContent = "";
  }

  whyNoOrt(gateway) {
    if (gateway?.onnxruntime_web !== true) {
      return "onnxruntime-web is faster. A gateway serves it after npm install onnxruntime-web.";
    }
    return "onnxruntime-web is faster. It needs graphs, which splitbundle add-onnx adds.";
  }

  isRemote(name) {
    return this.gateway !== null && Object.hasOwn(this.gateway.stages, name);
  }

  placeOf({ name, bytes: size }) {
    const where = this.isRemote(name)
      ? "on a server, behind the gateway"
      : `in this browser: ${bytes(size)} to load`;
    return make("li", {}, make("strong", {}, name), ` ${where}`);
  }

  async load() {
    const state = byId("load-state");
    this.line = state;
    byId("load").disabled = true;
    const began = performance.now();
    try {
      const say = async (what) => {
        state.textContent = what;
        await breathe();
      };
      await say("reading the tokenizer");
      const { tokenizer, chat, golden } = await loadText(this.bundle);
      const sent = { frames: 0, bytes: 0, back: 0 };
      let ort = null;
      if (byId("engine").value === ORT) {
        await say("loading onnxruntime-web");
        ort = await loadOnnxRuntime(ONNXRUNTIME);
      }
      const carrierOf = (name) =>
        this.isRemote(name) ? counted(new HttpCarrier(stageUrl(name), { headers }), sent) : null;
      const onStep = (what) => (state.textContent = what);
      const onWait = (name) => this.wait(name);
      const { pipeline, vectors } = await loadPipeline(this.bundle, { ort, carrierOf, onStep, onWait });
      this.model = { tokenizer, chat, pipeline, sent, text: pipeline.begin(), messages: [] };
      this.loaded({ seconds: (performance.now() - began) / 1000, golden, vectors, ort });
    } catch (failure) {
      state.replaceChildren(told(failure));
      byId("load").disabled = false;
    }
  }

  /** Say which stage hasn't answered for some time. With null, show again what was there before. */
  wait(name) {
    const { line } = this;
    if (name === null) line.textContent = line.dataset.before;
    else {
      line.dataset.before = line.textContent;
      line.textContent = `Waiting for stage ${name} …`;
      if (line !== byId("load-state")) byId("announcer").textContent = line.textContent;
    }
  }

  loaded({ seconds, golden, vectors, ort }) {
    const { chat } = this.model;
    byId("load-panel").hidden = true;
    byId("composer-panel").hidden = false;
    byId("mode").value = chat === null ? "text" : CHAT;
    byId("mode").disabled = chat === null;
    byId("log").replaceChildren();
    const engine = ort === null
      ? "the page’s own decoder"
      : `onnxruntime-web, ${plural(ort.env.wasm.numThreads, "thread")}`;
    const lines = [`Loaded in ${seconds.toFixed(1)} s, with ${engine}.`];
    if (chat === null) lines.push("It continues texts: this page doesn’t have the form of its chats.");
    lines.push(`${plural(golden, "golden text")} gave the right ids.`);
    for (const check of vectors?.checks ?? []) lines.push(reproduced(check, vectors.self));
    byId("announcer").textContent = "The model is loaded.";
    byId("log").append(make("p", { class: "quiet", id: "loaded" }, lines.join(" ")));
    this.forget();
    this.account();
    byId("prompt").focus();
  }

  /** Begin a new text. */
  forget() {
    if (this.model === null) return;
    this.running?.abort();
    this.model.messages = [];
    for (const turn of document.querySelectorAll("#log .turn")) turn.remove();
    const chats = byId("mode").value === CHAT;
    byId("prompt-label").textContent = chats ? "Your message" : "Your text, which the model continues";
    byId("forget").disabled = true;
  }

  async send() {
    const written = byId("prompt").value;
    const { model } = this;
    if (model === null || this.running !== null || written === "") return;
    const chats = byId("mode").value === CHAT;
    const answer = make("pre", { class: "plain answer writing" });
    const numbers = make("p", { class: "quiet numbers" });
    const question = make("pre", { class: "plain question" }, written);
    const turn = make("div", { class: "turn" }, question, answer, numbers);
    byId("log").append(turn);
    this.line = numbers;
    byId("prompt").value = "";
    this.start();
    const messages = [...model.messages, { role: "user", content: written }];
    try {
      const prompt = chats ? model.chat.encode(messages) : model.tokenizer.encode(written);
      const ended = await this.write(prompt, answer, numbers, chats ? [model.chat.end] : []);
      const fits = prompt.length <= model.pipeline.context;
      // A message that is too long isn't kept: with it, no later one would fit either.
      if (chats && fits) model.messages = [...messages, { role: "assistant", content: answer.textContent }];
      turn.append(make("p", { class: "quiet ended" }, whyEnded(ended, prompt.length, model.pipeline.context)));
      const nothing = fits ? "The answer is empty." : turn.lastChild.textContent;
      byId("announcer").textContent = answer.textContent.slice(-1000) || nothing;
      turn.dataset.ended = ended;
    } catch (failure) {
      turn.dataset.ended = "failed";
      const stopped = failure.name === "AbortError";
      turn.append(stopped ? make("p", { class: "quiet ended" }, "You stopped it.") : told(failure));
      if (stopped && chats) {
        model.messages = [...messages, { role: "assistant", content: answer.textContent }];
      }
    } finally {
      answer.classList.remove("writing");
      this.end();
    }
  }

  /** Write what the model generates into an element, token by token, and return why it ended. */
  async write(prompt, answer, numbers, ends) {
    const { model } = this;
    const options = {
      most: number("most") ?? 256,
      sampling: {
        temperature: number("temperature") ?? 0,
        topK: number("top-k"),
        topP: number("top-p"),
        seed: number("seed"),
      },
      stopIds: [...this.bundle.manifest.text.stop_ids, ...ends],
      signal: this.running.signal,
    };
    const stream = model.tokenizer.stream();
    const began = performance.now();
    let first = null;
    let made = 0;
    model.text.remote = 0;
    const ids = model.text.generate(prompt, options);
    for (;;) {
      const { done, value } = await ids.next();
      if (done) {
        answer.append(stream.end());
        return value;
      }
      first ??= performance.now();
      made += 1;
      answer.append(stream.push(value));
      const seconds = (performance.now() - first) / 1000;
      const speed = made > 1 ? `, ${((made - 1) / seconds).toFixed(1)} tokens/s` : "";
      const share = Math.round((100 * model.text.remote) / (performance.now() - began));
      const waited = ((first - began) / 1000).toFixed(2);
      numbers.textContent = `${plural(prompt.length, "token")} read in ${waited} s, `
        + `${plural(made, "token")} written${speed}; ${share} % of the time at servers`;
      this.account();
      await breathe();
    }
  }

  start() {
    this.running = new AbortController();
    byId("send").hidden = true;
    byId("stop").hidden = false;
    byId("forget").disabled = false;
    byId("mode").disabled = true;
  }

  end() {
    this.running = null;
    byId("send").hidden = false;
    byId("stop").hidden = true;
    byId("mode").disabled = this.model?.chat === null;
    this.account();
    byId("prompt").focus();
  }

  /** Say what left the browser. */
  account() {
    const { frames, bytes: out, back } = this.model.sent;
    byId("sent-about").hidden = frames === 0;
    byId("sent").textContent = frames === 0
      ? "Nothing: every stage is computed here."
      : `${plural(frames, "frame")} with hidden states and positions: ${bytes(out)} out, `
        + `${bytes(back)} back. No text, no ids.`;
  }
}

/** Say why a text ended, by what `generate` returns. */
function whyEnded(ended, prompted, context) {
  if (ended === "stop") return "The model ended the text.";
  if (ended === "length") return "The text has the most new tokens of the settings.";
  return prompted > context
    ? `Nothing was written: the model’s context has ${plural(context, "token")}, and this text ${prompted}. `
      + "Shorten it, or begin anew."
    : `The text has filled the model’s context of ${plural(context, "token")}.`;
}

/** Say how closely golden vectors are reproduced, and which bound held. */
function reproduced({ worst, most, name }, self) {
  const bound = most === Number.MAX_VALUE ? "no bound" : `at most ${most.toExponential(0)}`;
  return `Golden vectors ${self ? "of the bundle itself " : ""}are reproduced to `
    + `${worst.toExponential(0)} of the largest value (${bound} with ${name}).`;
}

/** Return a carrier that counts what passes through it. */
function counted(carrier, sent) {
  return {
    text: carrier.text,
    async call(frame, signal) {
      sent.frames += 1;
      sent.bytes += frame.length;
      const answer = await carrier.call(frame, signal);
      sent.back += answer.length;
      return answer;
    },
    send(frame) {
      sent.frames += 1;
      sent.bytes += frame.length;
      carrier.send(frame);
    },
  };
}

/** Return the number of a field, or null if it is empty. */
function number(id) {
  const field = byId(id);
  if (!field.checkValidity()) {
    const got = field.value || "another one";
    refuse("input.value", field.labels[0].textContent, "a number that the field can have", got);
  }
  return field.value === "" ? null : field.valueAsNumber;
}
