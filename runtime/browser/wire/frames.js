// Frames: the bytes of a message (spec/v1/wire.md, section "Frames"). Nothing here opens a connection.

import { parseJson } from "../reader/json.js";
import { Collector } from "../reader/problems.js";
import { payloadBytes } from "./encodings.js";
import { HEADER, KINDS, NUMBERS, OPTIONAL, PROTOCOL, checkRows, object } from "./messages.js";
import { refuse } from "./refusal.js";

/** The longest frame that a client takes (SB-X-006). */
export const MOST_FRAME = 64 * 2 ** 20;
/** The longest header (SB-X-002). */
export const MOST_HEADER = 2 ** 17;

const MAGIC = [0x53, 0x42, 0x57, 0x31]; // SBW1
const PREFIX = 8;
const ALIGNMENT = 16;

/**
 * Return the frame of a message.
 *
 * @param {object} message the members of its kind, with `op`; those that may be absent may be undefined
 * @param {Uint8Array} [payload]
 * @returns {Uint8Array}
 * @throws {BundleError} `wire.header` for a header that is too long
 */
export function pack(message, payload = new Uint8Array(0)) {
  const header = new TextEncoder().encode(dumped(message));
  const length = Math.ceil((PREFIX + header.length) / ALIGNMENT) * ALIGNMENT - PREFIX;
  if (length > MOST_HEADER) {
    refuse("wire.header", "frame", `at most ${MOST_HEADER} bytes of header`, `${length} bytes`);
  }
  const frame = new Uint8Array(PREFIX + length + payload.length);
  frame.set(MAGIC);
  new DataView(frame.buffer).setUint32(4, length, true);
  frame.set(header, PREFIX);
  frame.fill(0x20, PREFIX + header.length, PREFIX + length);
  frame.set(payload, PREFIX + length);
  return frame;
}

/**
 * Return the message of a frame, and its payload, which is a view of the frame.
 *
 * @param {Uint8Array} frame
 * @param {number} [limit] the longest frame that is taken
 * @returns {{message: object, payload: Uint8Array}}
 * @throws {BundleError} `wire.size`, `wire.frame`, `wire.header`, `wire.payload`, `json.*`, `field.*`
 */
export function unpack(frame, limit = MOST_FRAME) {
  if (frame.length > limit) refuse("wire.size", "frame", `at most ${limit} bytes`, `${frame.length} bytes`);
  if (frame.length < PREFIX || MAGIC.some((letter, i) => frame[i] !== letter)) {
    refuse("wire.frame", "frame", "a frame, which begins with SBW1", `${frame.length} bytes that don't`);
  }
  const length = new DataView(frame.buffer, frame.byteOffset, PREFIX).getUint32(4, true);
  if (length > MOST_HEADER) {
    refuse("wire.header", "frame", `at most ${MOST_HEADER} bytes of header`, `${length} bytes`);
  }
  if (PREFIX + length > frame.length) {
    refuse("wire.frame", "frame", `a header of ${length} bytes`, `${frame.length - PREFIX} bytes`);
  }
  const message = parseHeader(frame.subarray(PREFIX, PREFIX + length));
  const payload = frame.subarray(PREFIX + length);
  const size = payloadSize(message);
  if (payload.length !== size) {
    refuse(
      "wire.payload", "frame", `a payload of ${size} bytes, as the header says`, `${payload.length} bytes`,
    );
  }
  return { message, payload };
}

/** Return the size in bytes that the payload of a message must have (SB-X-005). */
export function payloadSize(message) {
  if (message.encoding === undefined) return 0;
  return payloadBytes(message.encoding, tokensOf(message), message.width);
}

/** Return the tokens of a message that has a payload. */
export const tokensOf = (message) => message.tokens ?? message.count.reduce((sum, each) => sum + each, 0);

function parseHeader(bytes) {
  const document = parseJson(bytes, HEADER, { mostBytes: MOST_HEADER });
  const problems = new Collector(HEADER);
  const op = kindOf(document, problems);
  problems.close();
  const protocol = document.get("protocol");
  if (op === "hello" && Number.isInteger(protocol) && protocol >= 0 && protocol !== PROTOCOL) {
    return { op, protocol }; // of another version, no further member is known (SB-X-010)
  }
  const table = { op: (value) => value, ...KINDS[op] };
  const message = object(document, "", problems, table, OPTIONAL[op] ?? []);
  problems.close();
  if (message.count !== undefined) checkRows(message, problems);
  problems.close();
  return message;
}

function kindOf(document, problems) {
  if (!(document instanceof Map)) problems.add("field.type", "", "an object", document);
  else if (!document.has("op")) problems.add("field.missing", "", "a field op", "an object without it");
  else {
    const op = document.get("op");
    if (typeof op !== "string") problems.add("field.type", "/op", "a string", op);
    else if (!Object.hasOwn(KINDS, op)) problems.add("field.value", "/op", "a kind of message", op);
    return op;
  }
  return "";
}

function dumped(message) {
  const table = ["op", ...Object.keys(KINDS[message.op])];
  return dumpedObject(message, table.filter((name) => message[name] !== undefined));
}

function dumpedObject(value, names) {
  const members = names.map((name) => `${JSON.stringify(name)}:${dumpedValue(name, value[name])}`);
  return `{${members.join(",")}}`;
}

function dumpedValue(name, value) {
  if (NUMBERS.includes(name)) return dumpedNumber(value);
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    return dumpedObject(value, Object.keys(value));
  }
  const escape = (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(value).replace(/[\u007f-\uffff]/g, escape);
}

/**
 * Return a number as a writer writes it (SB-J-009): the fewest digits, and `.0` or an exponent with two
 * digits.
 */
function dumpedNumber(value) {
  const [mantissa, exponent] = value.toExponential().split("e");
  const power = Number(exponent);
  if (power < -4 || power >= 16) {
    return `${mantissa}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  return Number.isInteger(value) ? `${value}.0` : String(value);
}
