/** The types and sizes of a graph's inputs and outputs (SB-O-011, SB-O-019). */

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

/** Whether a body takes and gives the same floating-point value, of sizes that are names or at least 1. */
export function sameCarried(one, other) {
  const [a, b] = [one.type.tensorType, other.type.tensorType];
  const floating = [ELEMENT_TYPES.float32, ELEMENT_TYPES.float16].includes(a.elemType);
  const size = ({ dimValue, dimParam }) => {
    const named = dimValue === undefined && dimParam !== "";
    return dimParam === undefined ? typeof dimValue === "number" && dimValue >= 1 : named;
  };
  return (
    floating &&
    a.elemType === b.elemType &&
    a.shape.dim.length === b.shape.dim.length &&
    a.shape.dim.every((own, i) => {
      const same = own.dimValue === b.shape.dim[i].dimValue && own.dimParam === b.shape.dim[i].dimParam;
      return same && size(own);
    })
  );
}
