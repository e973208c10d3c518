/**
 * A bundle: its two documents, and its listed files.
 *
 * A *source* gives the bytes. `stat` never follows a link, and `read` is called only for regular files.
 *
 * @typedef {object} Source
 * @property {(path: string) => Promise<{kind: "file" | "directory" | "link" | "other", size: number}
 *   | null>} stat
 * @property {(path: string, start: number, end: number) => Promise<Uint8Array>} read
 * @property {() => Promise<{path: string, kind: string}[] | null>} list null where a source can't list its
 *   files
 */

import { parseArchitecture } from "./architecture.js";
import { checkTogether } from "./cross_rules.js";
import { Files } from "./files.js";
import { MOST_BYTES } from "./json.js";
import { storedTensors } from "./logical_tensors.js";
import { parseManifest } from "./manifest.js";
import { judgeGraph } from "./onnx_graph.js";
import { BundleError, problem, refuse } from "./problems.js";
import { sha256 } from "./sha256.js";
import { verifyBundle } from "./verify.js";
import { checkScales, judgeParts, readHeader } from "./weight_file.js";

const MANIFEST = "manifest.json";
const ARCHITECTURE = "architecture.json";

/**
 * Open a bundle: read and judge both documents. Reads no weights.
 *
 * @param {Source} source
 * @returns {Promise<Bundle>}
 * @throws {BundleError}
 */
export async function openBundle(source) {
  const bytes = await readManifest(source);
  const manifest = parseManifest(bytes);
  const files = new Files(source, manifest.files);
  await checkListedDocument(files);
  const architecture = parseArchitecture(await files.bytes(ARCHITECTURE));
  const tensors = checkTogether(manifest, architecture);
  return new Bundle({ files, manifest, architecture, tensors, manifestDigest: sha256(bytes) });
}

async function readManifest(source) {
  const found = await source.stat(MANIFEST);
  if (found === null) {
    // SB-D-001
    throw new BundleError(problem("file.missing", MANIFEST, "a bundle with a manifest", "nothing"));
  }
  const files = new Files(source);
  await files.check(MANIFEST);
  if (found.size > MOST_BYTES) {
    refuse("json.size", MANIFEST, `at most ${MOST_BYTES} bytes`, found.size);
  }
  return files.read(MANIFEST, 0, found.size);
}

/** The document's size is a limit of JSON (SB-J-006), and is judged before the file is read. */
async function checkListedDocument(files) {
  await files.check(ARCHITECTURE);
  const { size } = files.listed[ARCHITECTURE];
  if (size > MOST_BYTES) {
    refuse("json.size", ARCHITECTURE, `at most ${MOST_BYTES} bytes`, size);
  }
}

/** An open bundle. `manifest` and `architecture` are plain frozen data. */
export class Bundle {
  #units = new Map();

  /** Use `openBundle`. */
  constructor({ files, manifest, architecture, tensors, manifestDigest }) {
    this.files = files;
    this.manifest = manifest;
    this.architecture = architecture;
    this.logicalTensors = tensors;
    this.manifestDigest = manifestDigest;
    /** SB-I-001 */
    this.id = `sha256:${manifestDigest}`;
    this.fingerprint = manifest.model.fingerprint;
  }

  /**
   * @param {string} name
   * @returns {object} the shard of this name in the manifest
   */
  shard(name) {
    const found = this.manifest.shards.find((shard) => shard.name === name);
    return found ?? refuse("stage.name", null, "the name of a shard", name);
  }

  /**
   * The stored tensors of a unit. Reads and judges the headers of its files once.
   *
   * @param {string} unit
   * @returns {Promise<import("./weight_file.js").PlacedTensor[]>} in the order of the data
   */
  unitTensors(unit) {
    if (!this.#units.has(unit)) {
      this.#units.set(unit, this.#readUnit(unit));
    }
    return this.#units.get(unit);
  }

  async #readUnit(unit) {
    const headers = [];
    const wanted = storedTensors(this.logicalTensors.of(unit), this.manifest.storage);
    for (const path of this.manifest.units[unit].files) {
      await this.files.check(path);
      const read = (start, end) => this.files.read(path, start, end);
      headers.push(await readHeader(read, path, this.manifest.files[path], wanted.length));
    }
    return judgeParts(headers, wanted);
  }

  /**
   * The stored tensors of a shard, after reading and checking the headers of its files.
   *
   * @param {string} name
   * @returns {Promise<{name: string, dtype: string, shape: readonly number[], file: string, offset: number,
   *   length: number, unit: string}[]>}
   */
  async tensors(name) {
    const found = [];
    for (const unit of this.shard(name).units) {
      const own = await this.unitTensors(unit);
      found.push(...own.map((tensor) => ({ ...tensor, unit })));
    }
    return found;
  }

  /** A listed file, checked against its digest. */
  bytes(path) {
    return this.files.bytes(path);
  }

  /** Bytes of a listed file of the listed size. The digest isn't checked. */
  async readRange(path, start, end) {
    if (!(path in this.manifest.files)) {
      throw new RangeError(`${path} isn't listed, so it isn't opened`); // SB-D-005
    }
    await this.files.check(path);
    return this.files.read(path, start, end);
  }

  /**
   * Check sizes and header digests of a shard's weight files, its scales, and its graph if there is one
   * (SB-O-007).
   *
   * @param {string} name
   * @returns {Promise<object[]>} its tensors, as `tensors` returns them
   */
  async loadStage(name) {
    const tensors = await this.tensors(name);
    for (const tensor of tensors) {
      await this.checkScales(tensor);
    }
    const { graph } = this.shard(name);
    if (graph && (await this.files.isThere(graph.file))) {
      await judgeGraph(this, this.shard(name), await this.bytes(graph.file));
    }
    return tensors;
  }

  /** SB-W-015; nothing for a tensor without scales. */
  async checkScales(tensor) {
    if (tensor.scale) {
      checkScales(tensor, await this.files.read(tensor.file, tensor.offset, tensor.offset + tensor.length));
    }
  }

  /**
   * Verify all files that are there, by their digests and by every rule about their content.
   *
   * @param {{exact?: boolean, whole?: boolean, onProgress?: (path: string, done: number, total: number) =>
   *   void}} [options] `exact`: files that aren't listed are refused, and so is a source that can't list its
   *   files; `whole`: so is every absent file
   * @returns {Promise<{unlisted: string[], absent: string[], shards: string[]}>} `shards`: the whole ones
   * @throws {BundleError} input.value for `exact` with such a source; file.*, sums.mismatch, and all that
   *   `openBundle` and `loadStage` throw
   */
  verify(options) {
    return verifyBundle(this, options);
  }
}
