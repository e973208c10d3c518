// One question and its answer, as the chat shows them.

import { button, copyButton, count, make, plural, short } from "./elements.js";
import { MarkdownView } from "./markdown.js";

const ENDINGS = {
  length: "The answer was cut: it has its most tokens, or the context is full. See “Most tokens of an answer”.",
  tool_calls: "The model asks for a tool. This page has none; programs that use the API can answer it.",
  content_filter: "The server cut the answer.",
};

const duration = (spent) => (spent < 1000 ? `${Math.round(spent)} ms` : `${short(spent / 1000)} s`);

/** A turn: a question, and an answer that may still be missing. In mode "text" the answer continues the question. */
export class Turn {
  content = "";
  reasoning = "";
  #tools = [];
  #frame = null;
  #spoken = 0;

  /**
   * @param {{mode: string, question: string, model: string}} given
   * @param {{speak: function(string), grown: function()}} listener hears finished blocks, and of every change of size
   */
  constructor({ mode, question, model }, listener) {
    Object.assign(this, { mode, question, listener });
    const text = make("div", { class: "plain" }, question);
    this.questionActions = make("div", { class: "buttons" });
    const top = make("div", { class: "row" }, make("h3", {}, "You"), this.questionActions);
    const asked = make("section", { class: "question" }, top, text);
    this.thought = make("pre", { class: "plain", tabindex: "0", "aria-label": "Thinking" });
    this.thinkingTitle = make("summary", {}, "Thinking…");
    this.thinking = make("details", { class: "thinking", hidden: true }, this.thinkingTitle, this.thought);
    this.body = make("div", { class: mode === "text" ? "plain" : "markdown" });
    this.view = mode === "text" ? null : new MarkdownView(this.body);
    this.note = make("div", { class: "note", hidden: true });
    this.numbers = make("p", { class: "quiet numbers" });
    this.actions = make("div", { class: "buttons" });
    this.title = make("h3", {}, model);
    this.answer = make(
      "section", { class: "answer" },
      this.title, this.thinking, this.body, this.note, make("div", { class: "row" }, this.numbers, this.actions),
    );
    this.element = make("article", { class: `turn ${mode}` }, asked, this.answer);
  }

  /** What is sent of this turn later on: nothing, if it has no answer. */
  get messages() {
    if (this.mode === "text" || this.content === "") return [];
    return [{ role: "user", content: this.question }, { role: "assistant", content: this.content }];
  }

  /** Whether the answer has neither text nor a call of a tool. */
  get empty() {
    return this.content === "" && this.#tools.length === 0;
  }

  /** Get ready for a (new) answer. */
  begin(model) {
    Object.assign(this, { content: "", reasoning: "", usage: null, ending: null, first: null, last: null });
    this.#tools = [];
    this.#spoken = 0;
    this.started = performance.now();
    this.title.textContent = model;
    this.thinking.hidden = true;
    this.thinking.open = false;
    this.note.hidden = true;
    this.numbers.textContent = "";
    this.actions.replaceChildren();
    this.questionActions.replaceChildren();
    this.answer.setAttribute("aria-busy", "true");
    this.#show();
  }

  /** Take a chunk of the stream. */
  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? { content: choice.text };
    for (const call of delta.tool_calls ?? []) {
      const known = (this.#tools[call.index ?? 0] ??= { name: "", arguments: "" });
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
    if (delta.content || delta.reasoning_content || delta.tool_calls) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (delta.reasoning_content) this.reasoning += delta.reasoning_content;
    if (delta.content) {
      if (this.content === "" && this.reasoning) this.thoughtFor = this.last - this.first;
      this.content += delta.content;
    }
    this.ending = choice.finish_reason ?? this.ending;
    this.#frame ??= requestAnimationFrame(() => this.#show());
  }

  #show() {
    if (this.#frame !== null) cancelAnimationFrame(this.#frame);
    this.#frame = null;
    const busy = this.answer.getAttribute("aria-busy") === "true";
    this.body.classList.toggle("waiting", busy && this.empty && !this.reasoning);
    this.body.classList.toggle("writing", busy && !this.empty);
    if (this.reasoning) {
      this.thinking.hidden = false;
      this.thinkingTitle.textContent =
        this.content === "" ? (busy ? "Thinking…" : "Thoughts") : `Thought for ${duration(this.thoughtFor)}`;
      this.thought.textContent = this.reasoning;
    }
    if (this.view) {
      const blocks = this.view.update(this.content + this.#toolText());
      const whole = busy ? blocks - 1 : blocks; // the last block still grows
      for (; this.#spoken < whole; this.#spoken += 1) this.listener.speak(this.view.spoken(this.#spoken));
    } else {
      this.body.textContent = this.content;
      if (!busy && this.content) this.listener.speak(this.content);
    }
    this.listener.grown();
  }

  #toolText() {
    const texts = this.#tools.map(({ name, arguments: given }) => `${name} ${given}`);
    return texts.length ? `\n\n\`\`\`\`\`tool\n${texts.join("\n")}\n\`\`\`\`\`` : "";
  }

  /** End the answer as the model did. */
  finish() {
    this.#end(this.#counted());
    if (this.ending in ENDINGS) this.say(ENDINGS[this.ending]);
    else if (this.empty) this.say("The model ended its answer without a word. You can try again.");
  }

  /** End the answer because the reader stopped it. */
  stopped() {
    this.#end(`stopped after ${duration(performance.now() - this.started)}`);
  }

  /** End the answer with an error. */
  fail(failure) {
    this.#end("");
    this.say(failure.message, failure.advice, "error");
  }

  #end(numbers) {
    this.answer.setAttribute("aria-busy", "false");
    this.#show();
    this.numbers.textContent = numbers;
  }

  /** Say something below the answer. */
  say(message, advice = "", kind = "hint") {
    this.note.className = `note ${kind}`;
    this.note.replaceChildren(make("p", {}, message), ...(advice ? [make("p", { class: "advice" }, advice)] : []));
    this.note.hidden = false;
    this.listener.speak(`${message} ${advice}`);
    this.listener.grown();
  }

  #counted() {
    const { prompt_tokens: read, completion_tokens: written, prompt_tokens_details: details } = this.usage ?? {};
    const parts = [];
    if (written !== undefined) {
      const spent = (this.last - this.first) / 1000;
      parts.push(plural(written, "token"));
      if (written > 1 && spent > 0) parts.push(`${short((written - 1) / spent)} tokens/s`);
    }
    if (this.first !== null) parts.push(`first after ${duration(this.first - this.started)}`);
    if (read !== undefined) {
      const cached = details?.cached_tokens ?? 0;
      parts.push(`prompt of ${plural(read, "token")}${cached ? `, ${count(cached)} of them cached` : ""}`);
    }
    return parts.join(" · ");
  }

  /**
   * Offer what can be done with the turn. The last turn can be asked again, changed, or gone on with.
   *
   * @param {?{retry: Function, edit: Function, goOn: Function}} last null if another turn follows
   */
  offer(last) {
    if (!last && this.mode === "chat" && this.content === "") {
      this.numbers.textContent = "This question has no answer, so the model doesn’t see it any more.";
    }
    const whole = () => (this.mode === "text" ? this.question + this.content : this.content);
    const actions = this.content === "" ? [] : [copyButton("Copy", whole)];
    if (last && this.mode === "text" && this.content !== "") actions.push(button("Go on", last.goOn));
    if (last) actions.push(button("Retry", last.retry));
    this.actions.replaceChildren(...actions);
    this.questionActions.replaceChildren(...(last ? [button("Edit", last.edit)] : []));
  }
}
