// The messages of spec/v1/wire.md: the members of each kind, and what each member may be.

import { Fraction } from "../reader/json.js";
import { ENCODINGS, EXACT } from "./encodings.js";

/** The version of the protocol. */
export const PROTOCOL = 1;
/** The name of the header in problems. */
export const HEADER = "header";

const MOST_ROWS = 4096;
const MOST_POSITION = 2 ** 31 - 1;
const MOST_WIDTH = 2 ** 20;
const MOST_LEASE = 86_400;
const MOST_TEXT = 1024;
/** The numbers of a hidden state with its padding, if it has many more of them than of tokens (SB-X-009). */
const MOST_PADDED = 2 ** 28;
const MOST_PADDING = 16;
const LEAST_RATE = 1e-37;
const MOST_RATE = 1e37;

/** A judge of one value: it adds what is wrong to the problems, and returns the value as it is used. */
const integer = (least = 0, most = Number.MAX_SAFE_INTEGER) => (value, at, problems) => {
  if (typeof value !== "number") problems.add("field.type", at, "an integer", value);
  else if (value < least || value > most) {
    problems.add("field.value", at, `an integer from ${least} to ${most}`, value);
  }
  return value;
};

const string = (pattern, expected) => (value, at, problems) => {
  if (typeof value !== "string") problems.add("field.type", at, "a string", value);
  else if (value.length > MOST_TEXT && [...value].length > MOST_TEXT) {
    problems.add("field.value", at, `at most ${MOST_TEXT} characters`, value);
  } else if (pattern && !pattern.test(value)) problems.add("field.value", at, expected, value);
  return value;
};

const choice = (choices) => (value, at, problems) => {
  if (typeof value !== "string") problems.add("field.type", at, "a string", value);
  else if (!choices.includes(value)) problems.add("field.value", at, `one of ${choices.join(", ")}`, value);
  return value;
};

const array = (item, least, most) => (value, at, problems) => {
  if (!Array.isArray(value)) {
    problems.add("field.type", at, "an array", value);
    return value;
  }
  if (value.length < least || value.length > most) {
    problems.add("field.value", at, `${least} to ${most} items`, value);
    if (value.length > most) return value;
  }
  return value.map((each, i) => item(each, `${at}/${i}`, problems));
};

/** A number, which may be written with a fraction or an exponent, in a range. */
const number = (fits, expected) => (value, at, problems) => {
  const found = value instanceof Fraction ? value.fraction : value;
  if (typeof found !== "number") problems.add("field.type", at, "a number", value);
  else if (!fits(found)) problems.add("field.value", at, expected, found);
  return found;
};

const boolean = (value, at, problems) => {
  if (typeof value !== "boolean") problems.add("field.type", at, "a boolean", value);
  return value;
};

const orNull = (judge) => (value, at, problems) => (value === null ? null : judge(value, at, problems));

const lease = number((value) => value > 0 && value <= MOST_LEASE, `above 0, at most ${MOST_LEASE}`);
const id = string(/^[0-9a-f]{32}$/u, "32 hexadecimal digits");
const digest = string(/^sha256:[0-9a-f]{64}$/u, "sha256: and 64 hexadecimal digits");
const text = string();
const encoding = choice(ENCODINGS);
const layers = array(integer(0, MOST_POSITION), 2, 2);
const positions = array(integer(0, MOST_POSITION), 1, MOST_ROWS);
const rowNumbers = array(integer(0, MOST_ROWS - 1), 1, MOST_ROWS);
const capacity = integer(1, MOST_POSITION);
const width = integer(1, MOST_WIDTH);
const tokens = integer(0, MOST_POSITION);
const sequence = integer(1, MOST_POSITION);
const ticket = integer(1);
const whole = integer();

const LIMITS = {
  message: whole, rows: whole, capacity: whole, slots: whole, sessions: whole, tickets: whole, lease,
};
const limits = (value, at, problems) => object(value, at, problems, LIMITS, []);

const run = {
  session: orNull(id), number: whole, past: positions, count: positions, sequence, width, encoding,
};
const gradient = { ticket, tokens, width, encoding };

/** The members of each kind, in the order in which a writer writes them. */
export const KINDS = {
  boundary: { past: positions, count: positions, sequence, width, encoding },
  hello: { protocol: whole, fingerprint: orNull(digest), layers: orNull(layers) },
  welcome: {
    protocol: whole, fingerprint: digest, bundle: digest, layers, width, dtype: choice(Object.keys(EXACT)),
    encodings: array(encoding, 1, ENCODINGS.length), backend: text, version: text, instance: id,
    trainable: boolean, number: whole, limits,
  },
  open: { rows: integer(1, MOST_ROWS), capacity },
  opened: { session: id, instance: id, lease },
  run: { ...run, rows: rowNumbers, order: rowNumbers, capacity },
  ran: { number: whole, instance: id, tokens, width, encoding, queued: whole, computed: whole },
  renew: { session: id },
  renewed: { lease },
  close: { session: id },
  closed: {},
  health: {},
  healthy: { computed: whole },
  train: {},
  training: { run: id, number: whole, lease },
  forward: { run: id, ticket, count: positions, sequence, width, encoding },
  forwarded: gradient,
  backward: { run: id, ...gradient },
  backwarded: gradient,
  discard: { run: id },
  discarded: { number: whole },
  step: {
    run: id, number: whole,
    learning_rate: number((value) => value >= LEAST_RATE && value <= MOST_RATE, "a number above 0"),
  },
  stepped: { number: whole },
  error: {
    code: string(/^[a-z]+(\.[a-z-]+)?$/u, "a code"), expected: text, got: text, argument: orNull(text),
    retry: choice(["never", "same", "other", "replay"]),
  },
};

/** The members that may be absent, of the kinds that have some. */
export const OPTIONAL = { run: ["rows", "order", "capacity"], step: ["learning_rate"] };

/** The members that a writer writes with a fraction, even if they are whole (SB-J-009). */
export const NUMBERS = ["lease", "learning_rate"];

/** The kind of a request -> the kind of its answer, unless that is `error`. */
export const ANSWERS = {
  hello: "welcome", open: "opened", run: "ran", renew: "renewed", close: "closed", health: "healthy",
  train: "training", forward: "forwarded", backward: "backwarded", discard: "discarded", step: "stepped",
};

/**
 * Return the members of an object of a closed table.
 *
 * @param {unknown} value
 * @param {string} at its pointer
 * @param {import("../reader/problems.js").Collector} problems
 * @param {Object<string, Function>} table name -> the judge of its value
 * @param {string[]} optional names that may be absent
 */
export function object(value, at, problems, table, optional) {
  if (!(value instanceof Map)) {
    problems.add("field.type", at, "an object", value);
    return {};
  }
  for (const name of Object.keys(table)) {
    if (!value.has(name) && !optional.includes(name)) {
      problems.add("field.missing", at, `a field ${name}`, "an object without it");
    }
  }
  for (const name of value.keys()) {
    if (!Object.hasOwn(table, name)) {
      const escaped = name.replaceAll("~", "~0").replaceAll("/", "~1");
      problems.add("field.unknown", `${at}/${escaped}`, `one of ${Object.keys(table).join(", ")}`, name);
    }
  }
  const found = {};
  for (const [name, judge] of Object.entries(table)) {
    if (value.has(name)) found[name] = judge(value.get(name), `${at}/${name}`, problems);
  }
  return found;
}

/**
 * Check the members that must fit each other (SB-X-009).
 *
 * @param {object} message
 * @param {import("../reader/problems.js").Collector} problems
 */
export function checkRows(message, problems) {
  const { count } = message;
  for (const name of ["past", "rows"]) {
    if (message[name] !== undefined && message[name].length !== count.length) {
      problems.add("field.value", `/${name}`, `${count.length} integers, as in count`, message[name]);
    }
  }
  const most = count.reduce((largest, each) => Math.max(largest, each));
  if (most > message.sequence) {
    problems.add("field.value", "/count", `at most ${message.sequence}, the sequence`, most);
  }
  // A reader makes room for the padding, too. A few bytes must not ask for much of it. Floats are exact
  // enough.
  const padded = count.length * message.sequence * message.width;
  const own = count.reduce((sum, each) => sum + each, 0) * message.width;
  if (padded > Math.max(MOST_PADDED, MOST_PADDING * own)) {
    problems.add("field.value", "/sequence", `at most ${MOST_PADDED} numbers with padding`, message.sequence);
  }
}
