// Small helpers for the document. Text goes in as text nodes only, so nothing that a server says becomes markup.

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/**
 * Return a new element.
 *
 * @param {string} tag
 * @param {Object<string, string|boolean|Function>} properties attributes; a function listens to the event of its name
 * @param {...(Node|string|null)} children null is left out
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Return a button that calls a function. */
export const button = (text, pressed, properties = {}) =>
  make("button", { type: "button", click: pressed, ...properties }, text);

const NUMBERS = new Intl.NumberFormat("en");

/** Return 1234567 as "1,234,567". */
export const count = (number) => NUMBERS.format(number);

/** Return "1 token", "2 tokens". */
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** Return a number with at most three digits that matter, such as "0.042", "3.2", "41" or "1,234". */
export const short = (number) =>
  number >= 100 ? count(Math.round(number)) : String(Number(number.toPrecision(number >= 10 ? 3 : 2)));

function scaled(number, step, units) {
  let at = 0;
  for (; number >= step && at < units.length - 1; at += 1) number /= step;
  return `${at === 0 ? count(number) : short(number)}${units[at] && ` ${units[at]}`}`;
}

/** Return a number of bytes as "98.1 MB". */
export const bytes = (number) => scaled(number, 1000, ["B", "kB", "MB", "GB", "TB"]);

/** Return a number of parameters as "135 million". */
export const many = (number) => scaled(number, 1000, ["", "thousand", "million", "billion", "trillion"]);

/** Copy a text, also where the page isn't served over TLS and browsers hide the clipboard. */
export async function copy(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // a browser may refuse it; the older way below often works then
    }
  }
  const focused = document.activeElement;
  const area = make("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return copied;
}

/** Return a button that copies what a function returns, and says for two seconds that it did. */
export function copyButton(label, text) {
  const made = button(label, async () => {
    made.textContent = (await copy(text())) ? "Copied" : "Couldn’t copy";
    setTimeout(() => (made.textContent = label), 2000);
  }, { "aria-live": "polite" });
  return made;
}

/** Let the browser save a text as a file. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
