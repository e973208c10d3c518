// The chat view: the composer, the turns, and the request of each answer.

import { Failure, post } from "./api.js";
import { button, byId, download, make } from "./elements.js";
import { Sampling, WrongValue } from "./sampling.js";
import { Turn } from "./turns.js";

const WORDS = {
  chat: {
    label: "Your question",
    send: "Send",
    welcome: "Ask something. The answer appears here as the model writes it.",
  },
  text: {
    label: "A text to continue",
    send: "Continue",
    welcome: "Begin a text. The model writes on where it ends, and remembers no earlier text.",
  },
};
const SPOKEN = 5000; // milliseconds that a text stays for screen readers; longer, and they meet it twice
const NEAR = 80; // pixels from the end of the page within which the page follows the answer
const MOST_OF_A_TEXT = 512; // tokens; without a number, the server would end a completion after 16

export class Chat {
  #turns = [];
  #stop = null;
  #editing = null;
  #follows = true;

  /** @param {{model: function(): ?string, askForKey: function(Function)}} page */
  constructor(page) {
    this.page = page;
    this.question = byId("question");
    this.sampling = new Sampling(byId("sampling"), (changed) => {
      byId("sampling-state").textContent = changed ? ` · ${changed} set` : "";
      byId("sampling-reset").disabled = changed === 0;
    });
    byId("sampling-reset").addEventListener("click", () => this.sampling.reset());
    byId("system").addEventListener("input", () => {
      byId("system-state").textContent = this.#system ? " · set" : "";
    });
    byId("mode").addEventListener("change", () => this.setMode(byId("mode").value));
    byId("new-chat").addEventListener("click", () => this.#clear());
    byId("save-chat").addEventListener("click", () => this.#save());
    byId("stop").addEventListener("click", () => this.#stop?.abort());
    byId("cancel-edit").addEventListener("click", () => this.#endEdit(true));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.question.addEventListener("keydown", (event) => {
      const composing = event.isComposing || event.keyCode === 229; // Enter ends a word of an input method
      if (event.key !== "Enter" || event.shiftKey || composing) return;
      event.preventDefault();
      this.#send();
    });
    this.question.addEventListener("input", () => this.#fit());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      if (this.#stop) this.#stop.abort();
      else if (this.#editing) this.#endEdit(true);
    });
    addEventListener("scroll", () => {
      const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
      this.#follows = scrollHeight - clientHeight - scrollTop < NEAR;
    }, { passive: true });
  }

  get #system() {
    return byId("system").value.trim();
  }

  /** Choose between answering ("chat") and continuing a text ("text"). */
  setMode(mode) {
    byId("mode").value = mode;
    byId("question-label").textContent = WORDS[mode].label;
    this.question.placeholder = WORDS[mode].label;
    byId("send").textContent = WORDS[mode].send;
    byId("welcome").textContent = WORDS[mode].welcome;
    byId("system-panel").hidden = mode === "text";
  }

  /** Choose the mode that a model can do, while there is no chat that it would cut. */
  suit(hasTemplate) {
    if (this.#turns.length === 0) this.setMode(hasTemplate ? "chat" : "text");
  }

  #fit() {
    this.question.style.height = "auto"; // so that it can shrink too
    this.question.style.height = `${this.question.scrollHeight + 2}px`;
  }

  #write(text) {
    this.question.value = text;
    this.#fit();
  }

  #send() {
    const mode = byId("mode").value;
    const question = mode === "text" ? this.question.value : this.question.value.trim();
    if (this.#stop || question.trim() === "") return;
    if (this.#editing) this.#remove(this.#editing.turn);
    this.#endEdit(false);
    this.#write("");
    this.#ask(question, mode);
  }

  #ask(question, mode) {
    const turn = new Turn({ mode, question, model: this.page.model() ?? "" }, {
      speak: (text) => this.#speak(text),
      grown: () => this.#follow(),
    });
    this.#turns.at(-1)?.offer(null);
    this.#turns.push(turn);
    byId("log").append(turn.element);
    byId("welcome").hidden = true;
    this.#follows = true;
    this.#run(turn);
  }

  #remove(turn) {
    this.#turns = this.#turns.filter((each) => each !== turn);
    turn.element.remove();
    byId("welcome").hidden = this.#turns.length > 0;
  }

  /** Return the messages before a turn, and its question. */
  #messages(turn) {
    const system = this.#system ? [{ role: "system", content: this.#system }] : [];
    const before = this.#turns.slice(0, this.#turns.indexOf(turn)).flatMap((each) => each.messages);
    return [...system, ...before, { role: "user", content: turn.question }];
  }

  async #run(turn) {
    const model = this.page.model();
    const asked = turn.mode === "text" ? { prompt: turn.question } : { messages: this.#messages(turn) };
    const path = turn.mode === "text" ? "v1/completions" : "v1/chat/completions";
    this.#stop = new AbortController();
    this.#busy(true);
    turn.begin(model ?? "No model");
    let failure = null;
    try {
      if (model === null) throw new Failure({ message: "No model is chosen.", advice: "Load the page again." });
      const streaming = { stream: true, stream_options: { include_usage: true } };
      const most = turn.mode === "text" ? { max_tokens: MOST_OF_A_TEXT } : {};
      const body = { model, ...asked, ...streaming, ...most, ...this.sampling.values() };
      for await (const chunk of post(path, body, this.#stop.signal)) turn.take(chunk);
      turn.finish();
    } catch (error) {
      failure = error;
      if (error.name === "AbortError") turn.stopped();
      else if (error instanceof WrongValue) turn.fail({ message: error.message, advice: "Change it, then try again." });
      else if (error instanceof Failure) turn.fail(error);
      else {
        turn.fail({ message: "The page made a mistake.", advice: "Try again, or load the page again." });
        throw error; // the console shows where
      }
    } finally {
      this.#stop = null;
      this.#busy(false);
      this.#offer();
      this.#follow();
    }
    if (failure instanceof WrongValue) this.#show(failure.control);
    if (failure?.status === 401) {
      this.page.askForKey(() => this.#turns.includes(turn) && this.#whenIdle(() => this.#run(turn)));
    }
    if (failure?.status === 400 && turn.mode === "chat" && /template/i.test(`${failure.code} ${failure.message}`)) {
      this.#offerText(turn);
    }
  }

  #show(control) {
    byId("sampling-panel").open = true;
    control.focus();
  }

  #offerText(turn) {
    const instead = button("Continue this text instead", () => {
      this.#remove(turn);
      this.setMode("text");
      this.#ask(turn.question, "text");
      this.question.focus();
    });
    turn.say("This model has no chat template, so it can’t answer in a chat.", "It can continue a text.", "error");
    turn.note.append(instead);
  }

  #offer() {
    const turn = this.#turns.at(-1);
    byId("save-chat").disabled = !this.#turns.some((each) => each.messages.length);
    turn?.offer({
      retry: () => this.#whenIdle(() => this.#run(turn)),
      edit: () => this.#whenIdle(() => this.#edit(turn)),
      goOn: () => this.#whenIdle(() => this.#ask(turn.question + turn.content, "text")),
    });
  }

  #whenIdle(action) {
    if (this.#stop) return;
    this.#endEdit(true);
    action();
    this.question.focus(); // the button that was pressed has gone
  }

  #edit(turn) {
    this.#editing = { turn, draft: this.question.value };
    this.setMode(turn.mode);
    turn.element.classList.add("edited");
    byId("editing").hidden = false;
    this.#write(turn.question);
  }

  #endEdit(restore) {
    if (!this.#editing) return;
    this.#editing.turn.element.classList.remove("edited");
    if (restore) this.#write(this.#editing.draft);
    this.#editing = null;
    byId("editing").hidden = true;
    this.question.focus();
  }

  #busy(busy) {
    const focused = document.activeElement;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (focused === byId("send") || focused === byId("stop")) this.question.focus();
  }

  #clear() {
    this.#stop?.abort();
    this.#endEdit(false);
    this.#turns = [];
    byId("log").replaceChildren();
    byId("welcome").hidden = false;
    byId("save-chat").disabled = true;
    this.#write("");
    this.question.focus();
  }

  #save() {
    const system = this.#system ? [{ role: "system", content: this.#system }] : [];
    const messages = [...system, ...this.#turns.flatMap((turn) => turn.messages)];
    const name = (this.page.model() ?? "model").replace(/[^\w.-]+/g, "-");
    const day = new Date().toISOString().slice(0, 16).replace(/[T:]/g, "-");
    download(`chat-${name}-${day}.json`, "application/json", `${JSON.stringify({ messages }, null, 2)}\n`);
  }

  #speak(text) {
    const said = make("p", {}, text);
    byId("announcer").append(said);
    setTimeout(() => said.remove(), SPOKEN);
  }

  #follow() {
    if (!this.#follows || this.#turns.length === 0) return;
    scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
  }
}
