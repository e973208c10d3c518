// The text view: load the stages, and generate text with the ends of the model here and the rest on servers.

import { loadOnnxRuntime } from "../run/onnxruntime.js";
import { loadPipeline, loadText } from "../run/model.js";
import { HttpCarrier } from "../wire/http_carrier.js";
import { refuse } from "../wire/refusal.js";
import { breathe, byId, bytes, make, plural, told } from "./elements.js";
import { ONNXRUNTIME, headers, stageUrl } from "./gateway.js";

const CHAT = "chat";

/** What the view shows of one bundle. */
export class TextView {
  constructor() {
    this.bundle = null;
    this.gateway = null;
    this.model = null;
    this.running = null;
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
    byId("composer-panel").hidden = true;
    byId("load-panel").hidden = false;
    const places = bundle.manifest.shards.map((shard) => this.placeOf(shard));
    byId("places").replaceChildren(...places.map(({ line }) => line));
    const missing = this.missing(places);
    byId("load-about").textContent = missing
      ?? "The page computes the parts that are here, and asks servers for the rest.";
    byId("load").disabled = missing !== null;
    byId("load-state").textContent = "";
  }

  placeOf({ name, graph, bytes: size }) {
    const remote = this.gateway !== null && Object.hasOwn(this.gateway.stages, name);
    const where = remote ? "on a server, behind the gateway" : `in this browser: ${bytes(size)} to load`;
    const fault = remote || graph !== null ? null : `${name} has no graph`;
    const line = make(
      "li", {}, make("strong", {}, name), ` ${where}`, fault && make("span", { class: "bad" }, ` (${fault})`),
    );
    return { line, fault, remote };
  }

  /** Return why no text can be made, or null. */
  missing(places) {
    const faults = places.map(({ fault }) => fault).filter((fault) => fault !== null);
    if (faults.length) return `${faults.join("; ")}. splitbundle add-onnx adds graphs to a bundle.`;
    if (this.bundle.manifest.text.tokenizer === null) {
      return "This bundle has no tokenizer, so it makes no text.";
    }
    if (this.gateway !== null && !this.gateway.onnxruntime_web && places.some(({ remote }) => !remote)) {
      return "The gateway has no onnxruntime-web. On its machine, run npm install onnxruntime-web, and start "
        + "it there or with --onnxruntime-web DIR.";
    }
    return null;
  }

  async load() {
    const state = byId("load-state");
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
      const remote = (name) => this.gateway !== null && Object.hasOwn(this.gateway.stages, name);
      const here = this.bundle.manifest.shards.some(({ name }) => !remote(name));
      await say("loading onnxruntime-web");
      const ort = here ? await loadOnnxRuntime(ONNXRUNTIME) : null;
      const carrierOf = (name) =>
        remote(name) ? counted(new HttpCarrier(stageUrl(name), { headers }), sent) : null;
      const pipeline = await loadPipeline(
        this.bundle, { ort, carrierOf, onStep: (what) => (state.textContent = what) },
      );
      this.model = { tokenizer, chat, pipeline, sent, text: pipeline.begin(), messages: [] };
      this.loaded(performance.now() - began, golden, ort);
    } catch (failure) {
      state.replaceChildren(told(failure));
      byId("load").disabled = false;
    }
  }

  loaded(milliseconds, golden, ort) {
    const { chat } = this.model;
    byId("load-panel").hidden = true;
    byId("composer-panel").hidden = false;
    byId("mode").value = chat === null ? "text" : CHAT;
    byId("mode").disabled = chat === null;
    byId("log").replaceChildren();
    const threads = ort === null ? "" : ` with ${plural(ort.env.wasm.numThreads, "thread")}`;
    const seconds = (milliseconds / 1000).toFixed(1);
    const about = chat === null ? "It continues texts: this page doesn’t have the form of its chats. " : "";
    byId("announcer").textContent = "The model is loaded.";
    byId("log").append(make(
      "p", { class: "quiet", id: "loaded" },
      `Loaded in ${seconds} s${threads}. ${about}${plural(golden, "golden text")} gave the right ids.`,
    ));
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
    byId("prompt").value = "";
    this.start();
    const messages = [...model.messages, { role: "user", content: written }];
    try {
      const prompt = chats ? model.chat.encode(messages) : model.tokenizer.encode(written);
      const ended = await this.write(prompt, answer, numbers, chats ? [model.chat.end] : []);
      if (chats) model.messages = [...messages, { role: "assistant", content: answer.textContent }];
      byId("announcer").textContent = answer.textContent.slice(-1000) || "The answer is empty.";
      turn.dataset.ended = ended;
    } catch (failure) {
      turn.dataset.ended = "failed";
      const stopped = failure.name === "AbortError";
      turn.append(stopped ? make("p", { class: "quiet" }, "You stopped it.") : told(failure));
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
    byId("sent").textContent = frames === 0
      ? "Nothing: every stage is computed here."
      : `${plural(frames, "frame")} with hidden states and positions: ${bytes(out)} out, `
        + `${bytes(back)} back. No text, no ids.`;
  }
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
