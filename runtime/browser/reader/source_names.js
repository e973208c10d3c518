/** The table back to the source's tensors (SB-M-080 to SB-M-091). */

import { product } from "./logical_tensors.js";

const LAYER = "{layer}";
const ROW = "{row}";
/** SB-M-085: a source may keep copies of it. */
const KEPT_AGAIN = "embedding.token.weight";

/**
 * @param {object} manifest
 * @param {import("./logical_tensors.js").LogicalTensors} tensors
 * @param {import("./problems.js").Collector} found gets manifest.sources
 */
export function checkSourceNames(manifest, tensors, found) {
  const table = new SourceTable(manifest, tensors, found);
  for (const [i, entry] of manifest.source_names.entries()) {
    if (found.full) {
      return;
    }
    table.take(entry, `/source_names/${i}`);
  }
  table.close();
}

class SourceTable {
  constructor(manifest, tensors, found) {
    this.storage = manifest.storage;
    this.experts = manifest.requires.includes("experts");
    this.tensors = tensors;
    this.found = found;
    /** The logical tensors that entries name. */
    this.named = new Set();
    this.sources = new Set();
    /** Source names with a row in them, in two halves around the row. */
    this.rows = [];
  }

  wrong(pointer, expected, got) {
    this.found.add("manifest.sources", pointer, expected, got);
    return false;
  }

  /** Judge one entry. Its first problem is reported. */
  take(entry, pointer) {
    const { source, tensors: names } = entry;
    const layered = source.includes(LAYER);
    if (names.some((name) => name.includes(LAYER) !== layered)) {
      // SB-M-081
      return this.wrong(`${pointer}/tensors`, "{layer} in the source and all tensors, or in none", source);
    }
    const layers = layered ? this.tensors.layers : 1;
    for (let layer = 0; layer < layers; layer++) {
      const name = source.replaceAll(LAYER, layer);
      if (!this.addSource(name, pointer)) {
        return false;
      }
      const shapes = this.name(names.map((name) => name.replaceAll(LAYER, layer)), pointer);
      if (!shapes || !this.fits(entry, shapes, layer, pointer)) {
        return false;
      }
      this.addRow(name, shapes[0][0]);
    }
    return true;
  }

  /** Note the logical tensors of an entry. Returns their shapes, or null. */
  name(names, pointer) {
    const shapes = [];
    if (new Set(names).size < names.length) {
      this.wrong(`${pointer}/tensors`, "no logical tensor twice", names[0]); // SB-M-085
      return null;
    }
    for (const name of names) {
      const shape = this.tensors.shape(name);
      if (!shape) {
        this.wrong(`${pointer}/tensors`, "logical tensors", name); // SB-M-083
        return null;
      }
      if (this.named.has(name) && name !== KEPT_AGAIN) {
        this.wrong(`${pointer}/tensors`, "no logical tensor twice", name); // SB-M-085
        return null;
      }
      this.named.add(name);
      shapes.push(shape);
    }
    return shapes;
  }

  fits(entry, shapes, layer, pointer) {
    const { source, groups, transposed, axis = 0, shape } = entry;
    const [first] = shapes;
    if (entry.axis !== undefined && (axis >= first.length || (axis !== 0 && !this.experts))) {
      return this.wrong(`${pointer}/axis`, "a dimension of the tensors; 0 without experts", axis); // SB-M-090
    }
    const others = (own) => own.filter((_, i) => i !== axis).join();
    const dtypes = new Set(entry.tensors.map((name) => this.stored(name.replaceAll(LAYER, layer))));
    const alike = shapes.every((own) => own.length === first.length && others(own) === others(first));
    if (!alike || dtypes.size > 1) {
      const expected = "tensors of one dtype that differ in one dimension";
      return this.wrong(`${pointer}/tensors`, expected, entry.tensors[0]);
    }
    if (transposed && first.length < 2) {
      return this.wrong(`${pointer}/transposed`, "false for a vector", true); // SB-M-086
    }
    if (shapes.some((own) => own[axis] % groups)) {
      return this.wrong(`${pointer}/groups`, "a divisor of each number of rows", groups); // SB-M-087
    }
    if (source.includes(ROW) && !rowFits(entry, first)) {
      const expected = "{row} once, between dots, for the rows of one matrix as it is";
      return this.wrong(`${pointer}/source`, expected, source); // SB-M-088
    }
    if (shape !== undefined) {
      const numbers = shapes.reduce((sum, own) => sum + product(own), 0n);
      if (source.includes(ROW) || !this.experts || product(shape) !== numbers) {
        const expected = `a shape of ${numbers} numbers, in a bundle with experts`;
        return this.wrong(`${pointer}/shape`, expected, String(shape));
      }
    }
    return true;
  }

  stored(name) {
    return this.storage.exceptions[name] ?? this.storage.dtype;
  }

  /** SB-M-082 */
  addSource(name, pointer) {
    if (this.sources.has(name)) {
      return this.wrong(`${pointer}/source`, "source names that differ", name);
    }
    if (!name.includes(ROW)) {
      this.sources.add(name);
    }
    return true;
  }

  /** Names with a row are compared at the end, when all are known. */
  addRow(name, rows) {
    const at = name.indexOf(ROW);
    if (at >= 0) {
      this.rows.push({ before: name.slice(0, at), after: name.slice(at + ROW.length), rows });
    }
  }

  close() {
    if (this.found.problems.length) {
      return;
    }
    if (this.rows.length) {
      const twice = repeatedRow(this.rows, this.sources);
      if (twice !== null) {
        this.wrong("/source_names", "source names that differ, row by row", twice);
      }
    }
    const missing = this.tensors.count - this.named.size;
    if (missing) {
      this.wrong("/source_names", "an entry for every logical tensor", `${missing} without one`); // SB-M-084
    }
  }
}

/** SB-M-088 */
function rowFits({ source, tensors, groups, transposed }, shape) {
  const [before, after, ...more] = source.replaceAll(LAYER, "0").split(ROW);
  const alone = more.length === 0 && !/[{}]/.test(before + after);
  const between = (before === "" || /^.+\.$/s.test(before)) && (after === "" || /^\..+$/s.test(after));
  return alone && between && tensors.length === 1 && shape.length >= 2 && groups === 1 && !transposed;
}

/**
 * Find a source name that two entries give, where one or both have a row in it. Rows aren't enumerated: there
 * may be 2^31 of them. A name is compared with a row's halves once for each of its parts that is a number.
 */
function repeatedRow(rows, sources) {
  const key = (...parts) => JSON.stringify(parts);
  const known = new Map();
  for (const own of rows) {
    const halves = key(own.before, own.after);
    if (known.has(halves)) {
      return `${own.before}${ROW}${own.after}`;
    }
    known.set(halves, own.rows);
  }
  for (const name of sources) {
    for (const [before, number, after] of numbers(name)) {
      if (number < (known.get(key(before, after)) ?? 0)) {
        return name;
      }
    }
  }
  // Two names with rows at different places: a.{row}.1 and a.1.{row} both give a.1.1.
  const crossings = new Map();
  for (const own of rows) {
    const sides = [
      ...numbers(own.before).map(([b, number, between]) => [number, key(b, between, own.after), false]),
      ...numbers(own.after).map(([between, number, a]) => [number, key(own.before, between, a), true]),
    ];
    for (const [number, crossing, later] of sides) {
      const met = crossings.get(crossing) ?? [];
      if (met.some((other) => other.later !== later && number < other.rows && other.number < own.rows)) {
        return `${own.before}${ROW}${own.after}`;
      }
      met.push({ number, later, rows: own.rows });
      crossings.set(crossing, met);
    }
  }
  return null;
}

/** The parts of a name that are numbers without leading zeros, each with what stands before and after it. */
function numbers(name) {
  const found = [];
  for (const match of name.matchAll(/(?<=^|\.)(?:0|[1-9][0-9]{0,9})(?=\.|$)/g)) {
    found.push([name.slice(0, match.index), Number(match[0]), name.slice(match.index + match[0].length)]);
  }
  return found;
}
