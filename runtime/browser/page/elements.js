// Small helpers for the document. Text goes in as text nodes only, so nothing that a bundle says becomes
// markup.

/** Return the element with an id. */
export const byId = (id) => document.getElementById(id);

/**
 * Return a new element.
 *
 * @param {string} tag
 * @param {Object<string, string|boolean|Function>} [properties] attributes; a function listens to the event
 *   of its name
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

const short = (number) =>
  number >= 100 ? count(Math.round(number)) : String(Number(number.toPrecision(number >= 10 ? 3 : 2)));

function scaled(number, units) {
  let at = 0;
  for (; number >= 1000 && at < units.length - 1; at += 1) number /= 1000;
  return `${at === 0 ? count(number) : short(number)}${units[at] && ` ${units[at]}`}`;
}

/** Return a number of bytes as "98.1 MB". */
export const bytes = (number) => scaled(number, ["B", "kB", "MB", "GB", "TB"]);

/** Return a number of parameters as "135 million". */
export const many = (number) => scaled(number, ["", "thousand", "million", "billion", "trillion"]);

/** Return a bar that shows a share. Screen readers pass over it: the number is beside it. */
export function bar(share) {
  const filled = make("span", { class: "filled" });
  filled.style.width = `${Math.max(100 * share, 1)}%`;
  return make("span", { class: "bar", "aria-hidden": "true" }, filled);
}

/** Return the problems of an error as a list, or its text for an error of another kind. */
export function told(failure) {
  const problems = failure?.problems;
  if (!Array.isArray(problems)) {
    return make("p", {}, `${failure?.name ?? "Error"}: ${failure?.message ?? failure}`);
  }
  const items = problems.slice(0, 20).map((each) => make(
    "li", {},
    make("code", {}, each.code), " ",
    ...placeOf(each),
    `expected ${each.expected}, got ${each.got}`,
    ...(each.hint ? [".", make("br"), make("span", { class: "advice" }, `${each.hint}.`)] : []),
  ));
  if (problems.length > 20) items.push(make("li", {}, `and ${problems.length - 20} more`));
  return make("ul", { class: "problems" }, ...items);
}

function placeOf({ file, argument, pointer }) {
  const place = file ?? argument;
  return place ? [make("code", {}, `${place}${pointer ?? ""}`), ": "] : [];
}

/** Let the browser draw, and take clicks, before a long piece of work goes on. */
export const breathe = () => new Promise((resolve) => setTimeout(resolve));
