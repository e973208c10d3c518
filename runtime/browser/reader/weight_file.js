/** Weight files: safetensors in the one canonical form of SB-W-001 to SB-W-015. */

import { LARGEST_INTEGER, array, integer, mapping, object, string, tuple } from "./fields.js";
import { parseJson } from "./json.js";
import { ITEM_SIZES, byteLength } from "./logical_tensors.js";
import { BundleError, Collector, escaped, problem, refuse } from "./problems.js";
import { sha256 } from "./sha256.js";

/** SB-W-002 */
const LARGEST_HEADER = 16_777_216;
/** SB-W-003 */
const PAGE = 4096;
/** SB-W-008 */
const ALIGNED = 64;
const SPACE = 0x20;
const METADATA = "__metadata__";

const digest = string({ holds: (value) => /^[0-9a-f]{64}$/.test(value), expected: "64 of 0-9a-f" });
const dtypes = Object.keys(ITEM_SIZES);
const metadata = object({ sha256: digest });
const entry = object({
  dtype: string({ holds: (value) => dtypes.includes(value), expected: dtypes.join(" or ") }),
  shape: array(integer(), { most: 8 }),
  data_offsets: tuple(integer(0, LARGEST_INTEGER), integer(0, LARGEST_INTEGER)),
});
const members = mapping((name) => (name === METADATA ? metadata : entry));

/**
 * A header that was read and whose fields were judged. `judgeHeader` judges it against what the file is to
 * hold.
 *
 * @typedef {object} Header
 * @property {string} path
 * @property {number} size the file's size
 * @property {number} dataStart the offset of the data
 * @property {Uint8Array} text the header with its padding
 * @property {string} dataDigest
 * @property {Map<string, {dtype: string, shape: readonly number[], data_offsets: readonly number[]}>} entries
 *
 * @typedef {{name: string, dtype: string, shape: readonly number[], file: string, offset: number, length:
 *   number, scale: boolean}} PlacedTensor offset and length are in bytes of the file
 */

/**
 * Read the beginning of a weight file, check its digest, and parse the header.
 *
 * @param {(start: number, end: number) => Promise<Uint8Array>} read
 * @param {string} path
 * @param {{size: number, header_sha256: string}} listed the file has this size
 * @param {number} most how many tensors the file may hold
 * @returns {Promise<Header>}
 * @throws {BundleError} weights.header, file.header-digest, json.*, weights.tensors, field.*
 */
export async function readHeader(read, path, { size, header_sha256: listedDigest }, most) {
  if (size < 8) {
    refuse("weights.header", path, "at least 8 bytes", size);
  }
  const view = new DataView((await read(0, 8)).slice().buffer);
  const length = view.getUint32(0, true) + view.getUint32(4, true) * 2 ** 32;
  if (length > LARGEST_HEADER || 8 + length > size || (8 + length) % PAGE) {
    const expected = "a header that ends at a page of the file, of at most 16 MiB";
    refuse("weights.header", path, expected, length, { offset: 0 });
  }
  const dataStart = 8 + length;
  const begin = await read(0, dataStart);
  if (sha256(begin) !== listedDigest) {
    // SB-W-004
    refuse("file.header-digest", path, `${listedDigest} for the first ${dataStart} bytes`, sha256(begin));
  }
  const text = begin.subarray(8);
  let end = text.length;
  while (end && text[end - 1] === SPACE) {
    end--;
  }
  const value = parseJson(text.subarray(0, end), path); // SB-W-005
  const found = new Collector(path);
  const count = value instanceof Map ? value.size - Number(value.has(METADATA)) : 0;
  if (count > most) {
    refuse("weights.tensors", path, `at most ${most} tensors`, count, { pointer: "" });
  }
  if (value instanceof Map && !value.has(METADATA)) {
    found.add("field.missing", "", `the field ${METADATA}`, "an object without it"); // SB-W-006
  }
  const fields = members(value, "", found);
  found.close();
  const entries = new Map(Object.entries(fields).filter(([name]) => name !== METADATA));
  return { path, size, dataStart, text, dataDigest: fields[METADATA].sha256, entries };
}

/**
 * Judge a header against the tensors that its file is to hold.
 *
 * @param {Header} header
 * @param {import("./logical_tensors.js").StoredTensor[]} tensors in order of use
 * @returns {PlacedTensor[]} in the order of the data
 * @throws {BundleError} weights.tensors, weights.layout
 */
export function judgeHeader(header, tensors) {
  const { path, entries, dataStart } = header;
  const found = new Collector(path);
  const wrong = (pointer, expected, got) => found.add("weights.tensors", pointer, expected, got);
  const wanted = new Set(tensors.map((tensor) => tensor.name));
  for (const { name, dtype, shape } of tensors) {
    const own = entries.get(name);
    if (!own) {
      wrong("", `the tensor ${name}`, "a header without it");
    } else if (own.dtype !== dtype || own.shape.join() !== shape.join()) {
      wrong(`/${escaped(name)}`, `${name} as ${dtype} [${shape}]`, `${own.dtype} [${own.shape}]`);
    }
  }
  for (const name of entries.keys()) {
    if (!wanted.has(name)) {
      wrong(`/${escaped(name)}`, "no other tensors", name);
    }
  }
  found.close();
  const placed = [];
  let offset = 0;
  for (const { name, dtype, shape, scale } of inOrder(tensors)) {
    const length = byteLength({ dtype, shape });
    placed.push({ name, dtype, shape, file: path, offset: dataStart + offset, length, scale });
    offset += length;
  }
  checkText(header, placed);
  if (dataStart + offset !== header.size) {
    // SB-W-010
    refuse("weights.layout", path, `${dataStart + offset} bytes, to the end of the last tensor`, header.size);
  }
  return placed;
}

/**
 * Give each part of a unit the tensors that it is to hold (SB-W-012): the first part holds the first few, and
 * so on.
 *
 * @param {Header[]} headers of all parts in order
 * @param {import("./logical_tensors.js").StoredTensor[]} tensors of the unit, in order of use
 * @returns {PlacedTensor[]}
 */
export function judgeParts(headers, tensors) {
  let first = 0;
  return headers.flatMap((header, i) => {
    const last = i === headers.length - 1;
    const count = headers.length === 1 || last ? tensors.length - first : header.entries.size;
    if (headers.length > 1 && (count < 1 || header.entries.size < 1)) {
      refuse("weights.tensors", header.path, "at least one tensor in each part", header.entries.size);
    }
    const own = tensors.slice(first, first + count);
    first += count;
    return judgeHeader(header, own);
  });
}

/** The order of the data (SB-W-008). */
function inOrder(tensors) {
  const group = ({ scale, shape, dtype }) => {
    if (byteLength({ shape, dtype }) % ALIGNED) {
      return 3;
    }
    return scale ? 1 : shape.length >= 2 ? 0 : 2;
  };
  const rank = (tensor) => {
    const own = group(tensor);
    return [own, own === 3 ? -ITEM_SIZES[tensor.dtype] : 0, own === 3 && !tensor.scale ? 1 : 0];
  };
  const ranked = tensors.map((tensor) => ({ tensor, rank: rank(tensor) }));
  ranked.sort((a, b) => a.rank[0] - b.rank[0] || a.rank[1] - b.rank[1] || a.rank[2] - b.rank[2]);
  return ranked.map(({ tensor }) => tensor);
}

/** SB-W-009 */
function checkText({ path, text, dataDigest, dataStart }, placed) {
  const parts = placed.map(({ name, dtype, shape, offset, length }) => {
    const start = offset - dataStart;
    return `,"${name}":{"dtype":"${dtype}","shape":[${shape}],"data_offsets":[${start},${start + length}]}`;
  });
  const canonical = new TextEncoder().encode(`{"${METADATA}":{"sha256":"${dataDigest}"}${parts.join("")}}`);
  const padded = Math.ceil((8 + canonical.length) / PAGE) * PAGE - 8;
  const other = canonical.findIndex((byte, i) => byte !== text[i]);
  const rest = text.subarray(canonical.length);
  if (padded !== text.length || other >= 0 || rest.some((byte) => byte !== SPACE)) {
    const offset = 8 + (other >= 0 ? other : canonical.length);
    throw new BundleError(problem("weights.layout", path, "the canonical header", "another one", { offset }));
  }
}

/** SB-W-015: a BF16 number is NaN or infinite if all bits of its exponent are set. */
export function checkScales(tensor, bytes) {
  for (let i = 1; i < bytes.length; i += 2) {
    if ((bytes[i] & 0x7f) === 0x7f && (bytes[i - 1] & 0x80) !== 0) {
      const offset = tensor.offset + i - 1;
      refuse("weights.scale", tensor.file, `finite scales in ${tensor.name}`, "NaN or infinity", { offset });
    }
  }
}
