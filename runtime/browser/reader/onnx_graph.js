/**
 * Judges ONNX graphs (SB-O-006 to SB-O-021): what a graph may read, and what it consists of. Neither builds
 * nor runs it.
 *
 * The order is that of SB-O-022. So a message is parsed when its turn comes.
 */

import { graphPorts } from "./cross_rules.js";
import { parseMessage } from "./onnx_messages.js";
import {
  ELEMENT_TYPES,
  GRAPH,
  LOOP,
  MICROSOFT,
  OPERATORS,
  PRODUCT,
  PRODUCT_ATTRIBUTES,
  VALUE_FIELDS,
} from "./onnx_operators.js";
import { Scope, isCarried, isScalar, sameSize, sameType } from "./onnx_values.js";
import { refuse } from "./problems.js";

/** SB-O-008 */
const LARGEST_GRAPH = 16_777_216;
const MOST_NODES = 32_768;
/** SB-O-014 */
const MOST_CONSTANTS = 1_048_576;
/** SB-O-009 */
const IR_VERSION = 12;
const OPSET = 24;
const EXTERNAL = 1;
const STORED_TYPES = { F32: 1, F16: 10, BF16: 16, I8: 3, U8: 2 };
const CONSTANT_SIZES = new Map([
  [ELEMENT_TYPES.float32, 4],
  [ELEMENT_TYPES.float16, 2],
  [ELEMENT_TYPES.int64, 8],
  [ELEMENT_TYPES.uint8, 1],
]);
const DIGITS = /^(?:0|[1-9][0-9]{0,15})$/;

/**
 * Judge a shard's graph.
 *
 * @param {import("./bundle.js").Bundle} bundle
 * @param {object} shard of the manifest, with a graph
 * @param {Uint8Array} bytes the graph, whose digest was checked
 * @throws {BundleError} graph.*
 */
export async function judgeGraph(bundle, shard, bytes) {
  let tensors = await bundle.tensors(shard.name);
  if (shard.head && !shard.embeds) {
    // SB-O-013: an embedding that is listed for a tied head alone is only its table
    const table = ["embedding.token.weight", "embedding.token.weight_scale"];
    tensors = tensors.filter(({ unit, name }) => unit !== "embedding" || table.includes(name));
  }
  const products = shard.graph.variant === "matmul_nbits";
  judgeModel(bytes, shard.graph.file, { ports: graphPorts(shard, bundle.architecture), tensors, products });
}

/**
 * Judge any graph of a bundle.
 *
 * @param {Uint8Array} bytes
 * @param {string} file
 * @param {{ports: {inputs: object[], outputs: object[]}, tensors: object[], products: boolean}} wanted
 *   `products`: whether it may have the operator of SB-O-021
 */
export function judgeModel(bytes, file, { ports, tensors, products }) {
  if (bytes.length > LARGEST_GRAPH) {
    refuse("graph.size", file, `at most ${LARGEST_GRAPH} bytes`, bytes.length);
  }
  // A copy begins at 0, so that offsets within it are those of the file.
  const model = parseMessage("ModelProto", bytes.byteOffset ? bytes.slice() : bytes, file);
  new Judge(model, file, tensors, products).judge(ports);
}

class Judge {
  constructor(model, file, tensors, products) {
    this.model = model;
    this.file = file;
    this.tensors = new Map(tensors.map((tensor) => [tensor.name, tensor]));
    this.products = products;
    /** The names of all values, in the graph and in bodies. */
    this.names = new Set();
    this.taken = new Set();
    /** The operator that gives each value of the graph or of the body at hand. */
    this.makers = new Map();
    this.nodes = 0;
  }

  refuse(code, expected, got) {
    refuse(`graph.${code}`, this.file, expected, got);
  }

  parse(kind, bytes) {
    return parseMessage(kind, bytes, this.file);
  }

  judge({ inputs, outputs }) {
    this.versions();
    const graph = this.parse("GraphProto", this.model.graph);
    const known = new Scope();
    this.label(graph.name);
    this.ports(graph.input, inputs, "inputs", (name) => this.give(name, known));
    const initializers = this.initializers(graph.initializer, known);
    const made = this.walk(graph.node, known, false);
    this.ports(graph.output, outputs, "outputs", (name) => this.checkMade(name, made));
    for (const name of initializers) {
      if (!this.taken.has(name)) {
        this.refuse("values", "initializers that a node takes", name);
      }
    }
  }

  checkMade(name, made) {
    if (!made.has(name)) {
      this.refuse("values", "outputs that a node gives", name);
    }
  }

  /** SB-O-009, SB-O-021 */
  versions() {
    const { irVersion, opsetImport, producerName, producerVersion } = this.model;
    if (irVersion !== IR_VERSION) {
      this.refuse("version", `ir_version ${IR_VERSION}`, irVersion);
    }
    [producerName, producerVersion].forEach((name) => this.label(name));
    const wanted = new Map([["", OPSET], ...(this.products ? [[MICROSOFT, 1]] : [])]);
    for (const bytes of opsetImport) {
      const { domain = "", version } = this.parse("OperatorSetIdProto", bytes);
      if (wanted.get(domain) !== version) {
        this.refuse("version", "the operators of this variant, each set once", `${domain} ${version}`);
      }
      wanted.delete(domain);
    }
    if (wanted.size) {
      this.refuse("version", `the operators ${[...wanted].join(" ")}`, "a model without them");
    }
  }

  /** SB-O-011; `then` gets the name of each port when it was compared. */
  ports(messages, wanted, side, then) {
    for (const [i, bytes] of messages.entries()) {
      const own = this.parse("ValueInfoProto", bytes);
      const { elemType, shape } = own.type.tensorType;
      const port = wanted[i];
      const fits =
        port &&
        own.name === port.name &&
        elemType === ELEMENT_TYPES[port.dtype] &&
        shape.dim.length === port.shape.length &&
        port.shape.every((size, k) => sameSize(shape.dim[k], size));
      if (!fits) {
        const expected = port ? `${port.name}: ${port.dtype} [${port.shape}]` : `no more ${side}`;
        this.refuse("ports", expected, own.name);
      }
      then(own.name);
    }
    if (messages.length !== wanted.length) {
      this.refuse("ports", `${wanted.length} ${side}`, messages.length);
    }
  }

  /** SB-O-006, SB-O-013, SB-O-014 */
  initializers(messages, known) {
    const names = [];
    let size = 0;
    for (const bytes of messages) {
      const own = this.parse("TensorProto", bytes);
      const tensor = this.tensors.get(own.name);
      if (own.externalData.length || own.dataLocation === EXTERNAL || tensor) {
        this.weight(own, tensor);
      } else {
        size += this.constant(own);
      }
      if (size > MOST_CONSTANTS) {
        this.refuse("size", `at most ${MOST_CONSTANTS} bytes of numbers`, size);
      }
      this.give(own.name, known);
      names.push(own.name);
    }
    for (const name of this.tensors.keys()) {
      if (!known.has(name)) {
        this.refuse("weights", `the weight ${name}`, "a graph without it");
      }
    }
    return names;
  }

  weight({ name, dims, dataType, rawData, externalData, dataLocation }, tensor) {
    if (!tensor) {
      this.refuse("weights", "external data of the shard's tensors alone", name);
    }
    const entries = new Map(externalData.map(({ key, value }) => [key, value]));
    const number = (key) => (DIGITS.test(entries.get(key) ?? "") ? Number(entries.get(key)) : null);
    const fits =
      dataType === STORED_TYPES[tensor.dtype] &&
      dims.length === tensor.shape.length &&
      dims.every((size, i) => size === tensor.shape[i]) &&
      dataLocation === EXTERNAL &&
      rawData === undefined &&
      externalData.length === 3 &&
      entries.get("location") === tensor.file &&
      number("offset") === tensor.offset &&
      number("length") === tensor.length;
    if (!fits) {
      const expected = `${tensor.dtype} [${tensor.shape}] at ${tensor.offset} of ${tensor.file}`;
      this.refuse("weights", `${name}: ${expected}`, [...entries].map((entry) => entry.join("=")).join(" "));
    }
  }

  /** Returns the bytes of a constant. */
  constant({ name, dims, dataType, rawData, dataLocation = 0 }) {
    const item = CONSTANT_SIZES.get(dataType);
    const positive = dims.every((size) => typeof size === "number" && size >= 1);
    const bytes = dims.reduce((product, size) => product * Number(size), item ?? 0);
    if (dataLocation !== 0 || item === undefined || !positive || rawData?.length !== bytes) {
      const expected = "raw data of float32, float16, int64 or uint8, as much as the dimensions take";
      const got = `type ${dataType} [${dims}], ${rawData?.length ?? "no"} bytes`;
      this.refuse("constants", `${name}: ${expected}`, got);
    }
    return bytes;
  }

  /** SB-O-012, of what isn't a value */
  label(name = "") {
    if (!/^[\x20-\x7e]{0,256}$/.test(name)) {
      this.refuse("values", "names of at most 256 characters of printable ASCII", name);
    }
  }

  /** A new value, of a name that no value has. */
  give(name, known) {
    if (!/^[\x21-\x7e]{1,256}$/.test(name)) {
      this.refuse("values", "values of 1 to 256 characters of printable ASCII without the space", name);
    }
    if (this.names.has(name)) {
      this.refuse("values", "values of different names", name);
    }
    this.names.add(name);
    known.add(name);
  }

  /**
   * Judge nodes in order.
   *
   * @param {Uint8Array[]} nodes
   * @param {Scope} known the values that they may take; those that they give are added
   * @param {boolean} inBody
   * @returns {Set<string>} what they give
   */
  walk(nodes, known, inBody) {
    const made = new Set();
    this.nodes += nodes.length;
    if (this.nodes > MOST_NODES) {
      this.refuse("size", `at most ${MOST_NODES} nodes together`, this.nodes);
    }
    for (const bytes of nodes) {
      const node = this.parse("NodeProto", bytes);
      this.operator(node, known, inBody);
      for (const name of node.input) {
        if (!known.has(name)) {
          this.refuse("values", "values that stand before the node", name);
        }
        this.taken.add(name);
      }
      for (const name of node.output) {
        this.give(name, known);
        this.makers.set(name, node.opType);
        made.add(name);
      }
    }
    return made;
  }

  /** SB-O-010, SB-O-019, SB-O-021 */
  operator({ opType, name, domain = "", input, output, attribute }, values, inBody) {
    const loop = opType === LOOP && domain === "" && !inBody;
    const product = this.products && domain === MICROSOFT && opType === PRODUCT;
    const known = product
      ? { least: 3, most: 3, attributes: PRODUCT_ATTRIBUTES }
      : domain === "" && (loop || opType !== LOOP) && OPERATORS.get(opType);
    if (!known) {
      this.refuse("operator", inBody ? "an operator of a body" : "a known operator", `${domain} ${opType}`);
    }
    this.label(name);
    if (output.length !== (opType === "TopK" ? 2 : 1)) {
      this.refuse("syntax", `the outputs of ${opType}`, output.length);
    }
    if (input.length < known.least || input.length > known.most) {
      this.refuse("operator", `${known.least} to ${known.most} inputs of ${opType}`, input.length);
    }
    if (loop) {
      this.loop(attribute, input[0], values);
      return;
    }
    const attributes = this.attributes(attribute, known, opType);
    if (product) {
      this.product(input[1], attributes);
    }
  }

  attributes(messages, known, opType) {
    const found = new Map();
    for (const bytes of messages) {
      const own = this.parse("AttributeProto", bytes);
      const wanted = Object.hasOwn(known.attributes, own.name) ? known.attributes[own.name] : undefined;
      if (!wanted || found.has(own.name)) {
        this.refuse("operator", `known attributes of ${opType}, each once`, own.name);
      }
      // An attribute without numbers is an empty list; every other field says whether it is there.
      const isThere = (field) => (field === "ints" ? own.ints.length > 0 : own[field] !== undefined);
      const filled = VALUE_FIELDS.filter(isThere);
      const typed = own.type === wanted.type && filled.length === 1 && filled[0] === wanted.field;
      if (!typed || (wanted.among && !wanted.among.includes(own[wanted.field]))) {
        const expected = `${own.name} of ${opType} in its type, with a value it may have`;
        this.refuse("operator", expected, `type ${own.type}`);
      }
      found.set(own.name, own);
    }
    return found;
  }

  /** SB-O-019 */
  loop(messages, count, values) {
    let body = null;
    for (const bytes of messages) {
      const own = this.parse("AttributeProto of a Loop", bytes);
      if (own.name !== "body" || own.type !== GRAPH || body !== null) {
        this.refuse("operator", "a loop with one body and no other attribute", own.name);
      }
      body = own.g;
    }
    if (body === null) {
      this.refuse("operator", "a loop with a body", "none");
    }
    if (this.makers.get(count) !== "Size") {
      this.refuse("operator", "a loop whose count is the output of Size", count);
    }
    this.body(body, values);
  }

  /** SB-O-021 */
  product(name, attributes) {
    const tensor = this.tensors.get(name);
    const codes = tensor?.dtype === "U8" && tensor.shape.length === 3;
    const [rows, blocks, half] = codes ? tensor.shape : [];
    const wanted = { K: blocks * half * 2, N: rows, bits: 4, block_size: half * 2, accuracy_level: 4 };
    if (!codes || Object.entries(wanted).some(([key, value]) => attributes.get(key)?.i !== value)) {
      this.refuse("operator", `${PRODUCT} over the codes of a stored matrix, with its sizes`, name);
    }
  }

  /** SB-O-019 and, for the values, SB-O-012 */
  body(bytes, outer) {
    const graph = this.parse("GraphProto of a Loop", bytes);
    this.label(graph.name);
    const known = new Scope(outer);
    const count = (port) => isScalar(port, "int64");
    const condition = (port) => isScalar(port, "bool");
    const give = (name) => this.give(name, known);
    const given = this.bodyPorts(graph.input, [count, condition, isCarried], give);
    const made = this.walk(graph.node, known, true);
    const check = (name) => this.checkMade(name, made);
    const results = this.bodyPorts(graph.output, [condition, isCarried], check);
    if (!sameType(given.at(-1), results.at(-1))) {
      this.refuse("ports", "a carried value of one dtype and shape", graph.name);
    }
  }

  /** Returns the messages. */
  bodyPorts(messages, kinds, then) {
    const ports = messages.map((bytes, i) => {
      const port = this.parse("ValueInfoProto", bytes);
      port.type.tensorType.shape.dim.forEach(({ dimParam }) => this.label(dimParam));
      if (!kinds[i]?.(port)) {
        this.refuse("ports", "a count, conditions and a carried value", port.name);
      }
      then(port.name);
      return port;
    });
    if (ports.length !== kinds.length) {
      this.refuse("ports", `${kinds.length} inputs or outputs of a body`, ports.length);
    }
    return ports;
  }
}
