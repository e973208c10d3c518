/** The operators that a graph may have, their inputs and attributes (SB-O-010, SB-O-019, SB-O-021). */

const INT = { type: 2, field: "i" };
const FLOAT = { type: 1, field: "f" };
const STRING = { type: 3, field: "s" };
const INTS = { type: 7, field: "ints" };
/** AttributeProto.AttributeType of a graph */
export const GRAPH = 5;
/** The fields of an attribute that can hold a value. */
export const VALUE_FIELDS = ["f", "i", "s", "ints"];
/** TensorProto.DataType */
export const ELEMENT_TYPES = {
  float32: 1,
  uint8: 2,
  int8: 3,
  int64: 7,
  bool: 9,
  float16: 10,
  bfloat16: 16,
};
const CASTS = ["float32", "uint8", "int8", "int64", "float16", "bfloat16"].map((name) => ELEMENT_TYPES[name]);

export const LOOP = "Loop";
export const MICROSOFT = "com.microsoft";
/** The one operator of another domain, and its attributes (SB-O-021). */
export const PRODUCT = "MatMulNBits";
export const PRODUCT_ATTRIBUTES = { K: INT, N: INT, bits: INT, block_size: INT, accuracy_level: INT };

const TABLE = [
  ["Abs Cos Exp Identity Log Neg NonZero Reciprocal Relu Round Sigmoid", 1, 1],
  ["Sin Size Softplus Squeeze Tanh Unique", 1, 1],
  ["Cast", 1, 1, { to: { ...INT, among: CASTS } }],
  ["Gelu", 1, 1, { approximate: { ...STRING, among: ["none", "tanh"] } }],
  ["Shape", 1, 1, { start: INT, end: INT }],
  ["Softmax", 1, 1, { axis: INT }],
  ["Transpose", 1, 1, { perm: INTS }],
  ["Add And BitwiseAnd Div Equal Expand Gather GatherND Greater LessOrEqual", 2, 2],
  ["MatMul Max Min Mul Pow Reshape Sub Unsqueeze", 2, 2],
  ["BitShift", 2, 2, { direction: { ...STRING, among: ["RIGHT"] } }],
  ["Concat", 2, 16, { axis: INT }],
  ["Gemm", 2, 3, { transB: INT }],
  ["LayerNormalization RMSNormalization", 2, 3, { axis: INT, epsilon: FLOAT }],
  ["Clip MatMulInteger Range ScatterND Where", 3, 3],
  ["GatherElements", 2, 2, { axis: INT }],
  ["RotaryEmbedding", 3, 3, { interleaved: INT, rotary_embedding_dim: INT }],
  ["ReduceMax ReduceSum", 2, 2, { keepdims: INT }],
  ["Slice", 3, 4],
  ["TensorScatter", 3, 3, { axis: INT }],
  ["TopK", 2, 2],
  [LOOP, 3, 3],
];

/** @type {Map<string, {least: number, most: number, attributes: Record<string, object>}>} */
export const OPERATORS = new Map(
  TABLE.flatMap(([names, least, most, attributes = {}]) =>
    names.split(" ").map((name) => [name, { least, most, attributes }]),
  ),
);
