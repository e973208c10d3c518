// The controls of sampling. One that is untouched is empty, and isn't sent: then the model's own value holds.

import { make } from "./elements.js";

// name, label, what it does, and its range; `start` is where the slider of an untouched control stands
const CONTROLS = [
  ["temperature", "Temperature", "0 always takes the likeliest token", { low: 0, high: 2, step: 0.05, start: 1 }],
  ["top_p", "Top P", "draws among the likeliest tokens that reach this probability together",
    { low: 0.01, high: 1, step: 0.01, start: 1 }],
  ["top_k", "Top K", "draws among this many of the likeliest tokens",
    { low: 1, high: 200, most: 1e6, step: 1, start: 50 }],
  ["min_p", "Min P", "draws among tokens of at least this share of the likeliest one’s probability",
    { low: 0, high: 1, step: 0.01, start: 0 }],
  ["repetition_penalty", "Repetition penalty", "1 changes nothing; more avoids tokens that are there",
    { low: 0.5, high: 2, step: 0.01, start: 1 }],
  ["presence_penalty", "Presence penalty", "lowers tokens that were written before",
    { low: -2, high: 2, step: 0.1, start: 0 }],
  ["frequency_penalty", "Frequency penalty", "lowers tokens each time that they are written",
    { low: -2, high: 2, step: 0.1, start: 0 }],
  ["max_tokens", "Most tokens of an answer", "cuts an answer that reaches it", { low: 1, most: 1e9, step: 1 }],
  ["seed", "Seed", "draws the same answer again", { low: 0, most: 2 ** 53 - 1, step: 1 }],
];
const OWN = "model’s own";
const MOST_STOPS = 4;

/** A value that the server would refuse. `control` is where it stands. */
export class WrongValue extends Error {
  constructor(message, control) {
    super(message);
    this.control = control;
  }
}

export class Sampling {
  #inputs = new Map();

  /**
   * @param {Element} place where the controls go
   * @param {Function} changed is called with the number of controls that were touched
   */
  constructor(place, changed) {
    this.changed = () => changed(Object.keys(this.#given()).length);
    place.append(...CONTROLS.map((control) => this.#row(control)));
    this.stop = make("textarea", { id: "stop-texts", rows: "2", input: this.changed, placeholder: "none" });
    const words = `one a line, at most ${MOST_STOPS}; \\n is a line break`;
    const about = make("p", { id: "stop-about", class: "quiet" }, words);
    this.stop.setAttribute("aria-describedby", about.id);
    const label = make("label", { for: this.stop.id }, "Stop at these texts");
    place.append(make("div", { class: "field" }, label, this.stop, about));
  }

  #row([name, label, about, { low, high, most = high, step, start }]) {
    const id = `sampling-${name}`;
    const range = { type: "number", min: String(low), max: String(most), step: step === 1 ? "1" : "any" };
    const input = make("input", { id, ...range, placeholder: OWN, "aria-describedby": `${id}-about` });
    const slider = high === undefined ? null : make("input", {
      type: "range", min: String(low), max: String(high), step: String(step),
      "aria-label": label, "aria-valuetext": OWN, class: "untouched",
    });
    const show = () => {
      if (slider) {
        slider.value = input.value === "" ? String(start) : input.value;
        slider.classList.toggle("untouched", input.value === "");
        slider.setAttribute("aria-valuetext", input.value === "" ? OWN : input.value);
      }
      this.changed();
    };
    if (slider) {
      slider.value = String(start);
      slider.addEventListener("input", () => {
        input.value = slider.value;
        show();
      });
    }
    input.addEventListener("input", show);
    this.#inputs.set(name, { input, label, show });
    const top = make("div", { class: "row" }, make("label", { for: id }, label), input);
    return make("div", { class: "field" }, top, slider, make("p", { id: `${id}-about`, class: "quiet" }, about));
  }

  #stops() {
    const lines = this.stop.value.split("\n").filter((line) => line !== "");
    return lines.map((line) => line.replace(/\\([nt\\])/g, (_, letter) => ({ n: "\n", t: "\t", "\\": "\\" })[letter]));
  }

  #given() {
    const given = {};
    for (const [name, { input }] of this.#inputs) {
      if (input.value !== "") given[name] = Number(input.value);
    }
    const stops = this.#stops();
    if (stops.length) given.stop = stops;
    return given;
  }

  /**
   * Return the fields of a request that were set.
   *
   * @throws {WrongValue}
   */
  values() {
    for (const { input, label } of this.#inputs.values()) {
      const { min, max, step } = input;
      const kind = step === "1" ? "a whole number" : "a number";
      if (!input.validity.valid) throw new WrongValue(`“${label}” takes ${kind} from ${min} to ${max}.`, input);
    }
    if (this.#stops().length > MOST_STOPS) {
      throw new WrongValue(`At most ${MOST_STOPS} texts can stop an answer.`, this.stop);
    }
    return this.#given();
  }

  /** Take back everything that was set. */
  reset() {
    this.stop.value = "";
    for (const { input, show } of this.#inputs.values()) {
      input.value = "";
      show();
    }
    this.changed();
  }
}
