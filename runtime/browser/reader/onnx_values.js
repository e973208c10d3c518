/**
 * Values of a graph: their names, and the types and sizes of inputs and outputs (SB-O-011, SB-O-012,
 * SB-O-019).
 */

import { ELEMENT_TYPES } from "./onnx_operators.js";

/** Whether a dimension is a size, or a name, and nothing else. */
export function sameSize({ dimValue, dimParam }, size) {
  return typeof size === "number"
    ? dimValue === size && dimParam === undefined
    : dimParam === size && dimValue === undefined;
}

/** Whether a value has a dtype and no dimensions. */
export function isScalar({ type: { tensorType } }, dtype) {
  return tensorType.elemType === ELEMENT_TYPES[dtype] && tensorType.shape.dim.length === 0;
}

/** Whether a value can be carried: of a floating-point dtype, with sizes that are names or at least 1. */
export function isCarried({ type: { tensorType } }) {
  const { elemType, shape } = tensorType;
  const floating = elemType === ELEMENT_TYPES.float32 || elemType === ELEMENT_TYPES.float16;
  return floating && shape.dim.every(isSize);
}

function isSize({ dimValue, dimParam }) {
  if (dimParam !== undefined) {
    return dimValue === undefined && dimParam !== "";
  }
  return typeof dimValue === "number" && dimValue >= 1;
}

/** Whether two values have one dtype and one shape. */
export function sameType(one, other) {
  const [a, b] = [one.type.tensorType, other.type.tensorType];
  const sizes = ({ shape }) => shape.dim.map(({ dimValue, dimParam }) => `${dimValue} ${dimParam}`).join();
  return a.elemType === b.elemType && sizes(a) === sizes(b);
}

/** Names that a node may take. A body also has those around it: they aren't copied for each body. */
export class Scope {
  #own = new Set();

  constructor(outer = null) {
    this.outer = outer;
  }

  add(name) {
    this.#own.add(name);
  }

  has(name) {
    return this.#own.has(name) || (this.outer?.has(name) ?? false);
  }
}
