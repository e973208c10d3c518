/**
 * The messages of ONNX that a graph may consist of, read from the wire format of protocol buffers by the
 * table of SB-O-008: a field that isn't in the table is refused, and so is one that is written in another
 * way.
 *
 * Texts are strings of one character a byte. Numbers of 64 bits are JavaScript numbers if these are exact,
 * and BigInts otherwise: no rule allows such a number, and they compare unequal to everything that one does.
 */

import { refuse } from "./problems.js";

const VARINT = 0;
const BYTES = 2;
const FIXED32 = 5;
const ONE = { least: 1, most: 1, list: false };
const ANY = { least: 0, most: 1, list: false };
const upTo = (most) => ({ least: 0, most, list: true });

const int = (name, times = ONE) => ({ name, wire: VARINT, ...times });
const text = (name, times = ONE) => ({ name, wire: BYTES, ...times });
const float = (name, times = ONE) => ({ name, wire: FIXED32, ...times });
/** A message; `later`: its bytes are kept, and it is parsed when its turn comes (SB-O-022). */
const message = (name, kind, times = ONE) => ({ name, wire: BYTES, kind, ...times });
const later = (name, times = ONE) => ({ name, wire: BYTES, raw: true, ...times });

const MESSAGES = {
  ModelProto: {
    1: int("irVersion"),
    2: text("producerName", ANY),
    3: text("producerVersion", ANY),
    7: later("graph"),
    8: later("opsetImport", upTo(8)),
  },
  OperatorSetIdProto: { 1: text("domain", ANY), 2: int("version") },
  GraphProto: {
    1: later("node", upTo(32_768)),
    2: text("name"),
    5: later("initializer", upTo(16_384)),
    11: later("input", upTo(32_768)),
    12: later("output", upTo(32_768)),
  },
  NodeProto: {
    1: text("input", upTo(16)),
    2: text("output", upTo(2)),
    3: text("name", ANY),
    4: text("opType"),
    5: later("attribute", upTo(8)),
    7: text("domain", ANY),
  },
  AttributeProto: {
    1: text("name"),
    2: float("f", ANY),
    3: int("i", ANY),
    4: text("s", ANY),
    8: int("ints", upTo(8)),
    20: int("type"),
  },
  "AttributeProto of a Loop": { 1: text("name"), 6: later("g"), 20: int("type") },
  "GraphProto of a Loop": {
    1: later("node", upTo(256)),
    2: text("name"),
    11: later("input", upTo(3)),
    12: later("output", upTo(2)),
  },
  TensorProto: {
    1: int("dims", upTo(8)),
    2: int("dataType"),
    8: text("name"),
    9: later("rawData", ANY),
    13: message("externalData", "StringStringEntryProto", upTo(3)),
    14: int("dataLocation", ANY),
  },
  StringStringEntryProto: { 1: text("key"), 2: text("value") },
  ValueInfoProto: { 1: text("name"), 2: message("type", "TypeProto") },
  TypeProto: { 1: message("tensorType", "TypeProto.Tensor") },
  "TypeProto.Tensor": { 1: int("elemType"), 2: message("shape", "TensorShapeProto") },
  TensorShapeProto: { 1: message("dim", "TensorShapeProto.Dimension", upTo(8)) },
  "TensorShapeProto.Dimension": { 1: int("dimValue", ANY), 2: text("dimParam", ANY) },
};

/**
 * Parse one message.
 *
 * @param {string} kind a key of the table
 * @param {Uint8Array} bytes all of the message
 * @param {string} file named in problems
 * @returns {object} the fields by their names; those that aren't there are undefined, or empty lists
 * @throws {BundleError} graph.syntax, graph.size
 */
export function parseMessage(kind, bytes, file) {
  const reader = new WireReader(bytes, file);
  const table = MESSAGES[kind];
  const fields = {};
  const counts = {};
  for (const { name, list } of Object.values(table)) {
    fields[name] = list ? [] : undefined;
    counts[name] = 0;
  }
  while (reader.at < bytes.length) {
    const place = { offset: bytes.byteOffset + reader.at };
    const tag = reader.varint();
    const field = typeof tag === "number" ? table[Math.floor(tag / 8)] : undefined;
    if (!field || field.wire !== tag % 8) {
      refuse("graph.syntax", file, `only the fields of ${kind}`, `the tag ${tag}`, place);
    }
    if (++counts[field.name] > field.most) {
      const [code, times] = field.list ? ["size", `at most ${field.most} times`] : ["syntax", "once"];
      refuse(`graph.${code}`, file, `${field.name} of ${kind} ${times}`, "once more", place);
    }
    const value = reader.value(field);
    if (field.list) {
      fields[field.name].push(value);
    } else {
      fields[field.name] = value;
    }
  }
  for (const { name, least } of Object.values(table)) {
    if (counts[name] < least) {
      const place = { offset: bytes.byteOffset };
      refuse("graph.syntax", file, `${name} of ${kind}`, "a message without it", place);
    }
  }
  return fields;
}

class WireReader {
  constructor(bytes, file) {
    this.bytes = bytes;
    this.file = file;
    this.at = 0;
  }

  value({ wire, kind, raw }) {
    if (wire === VARINT) {
      return this.varint();
    }
    const length = wire === FIXED32 ? 4 : this.varint();
    if (!(typeof length === "number" && length >= 0 && length <= this.bytes.length - this.at)) {
      this.fault("a field that ends within its message", `a length of ${length}`);
    }
    const own = this.bytes.subarray(this.at, this.at + length);
    this.at += length;
    if (wire === FIXED32) {
      return new DataView(own.buffer, own.byteOffset, 4).getFloat32(0, true);
    }
    if (kind) {
      return parseMessage(kind, own, this.file);
    }
    return raw ? own : characters(own);
  }

  /** A signed number of 64 bits, in as few bytes as it needs. */
  varint() {
    let value = 0n;
    let small = 0;
    for (let i = 0; i < 10; i++) {
      const byte = this.bytes[this.at++];
      if (byte === undefined) {
        this.fault("a number", "the end");
      }
      if (i < 4) {
        small += (byte & 0x7f) * 2 ** (7 * i);
      } else {
        value = i === 4 ? BigInt(small) : value;
        value |= BigInt(byte & 0x7f) << BigInt(7 * i);
      }
      if (byte < 0x80) {
        if ((i > 0 && byte === 0) || (i === 9 && byte > 1)) {
          this.fault("a number of 64 bits in as few bytes as it needs", "another one");
        }
        return i < 4 ? small : exact(BigInt.asIntN(64, value));
      }
    }
    return this.fault("a number of at most 10 bytes", "a longer one");
  }

  fault(expected, got) {
    refuse("graph.syntax", this.file, expected, got, { offset: this.bytes.byteOffset + this.at });
  }
}

function exact(value) {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

function characters(bytes) {
  let result = "";
  for (let i = 0; i < bytes.length; i += 4096) {
    result += String.fromCharCode(...bytes.subarray(i, i + 4096));
  }
  return result;
}
