/** `architecture.json`: the fields of spec/v1/decoder.md and the rules between them. */

import { parseJson } from "./json.js";
import { Collector, escaped } from "./problems.js";
import {
  aboveZero,
  array,
  boolean,
  choice,
  integer,
  mapping,
  number,
  object,
  orNull,
  string,
  variant,
} from "./fields.js";

const FILE = "architecture.json";
const MOST = 2 ** 31 - 1; // SB-A-002
const MOST_EXPERTS = 65_536; // SB-A-032
const MOST_LAYERS = 10_000; // SB-A-006
const size = integer(1, MOST);
const offset = integer(0, MOST);
const experts = integer(1, MOST_EXPERTS);
const zeroOrOne = number("0 or 1", (value) => value === 0 || value === 1);
const zeroOrAbove = number("0, or a number from 1e-37 to 1e37", (v) => v === 0 || (v >= 1e-37 && v <= 1e37));
const DENSE_ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "relu_squared"];

const norm = object({
  kind: choice("layer_norm", "rms_norm"),
  eps: aboveZero,
  affine: boolean,
  weight_offset: zeroOrOne,
  bias: boolean,
});

const embedding = object({
  token_size: size,
  multiplier: aboveZero,
  position: variant({ none: {}, learned: { count: size, offset }, sinusoidal: { offset } }),
  norm: orNull(norm),
});

const factors = array(aboveZero, { least: 1 });
const scaling = variant({
  none: {},
  linear: { factor: aboveZero },
  llama3: {
    factor: aboveZero,
    low_frequency_factor: aboveZero,
    high_frequency_factor: aboveZero,
    original_positions: size,
  },
  dynamic: { factor: aboveZero, original_positions: size },
  yarn: {
    factor: aboveZero,
    original_positions: size,
    beta_fast: aboveZero,
    beta_slow: aboveZero,
    truncate: boolean,
    attention_factor: aboveZero,
  },
  longrope: {
    original_positions: size,
    short_factors: factors,
    long_factors: factors,
    attention_factor: aboveZero,
  },
  proportional: { factor: aboveZero, pairs: size },
});

const attention = object(
  {
    heads: size,
    kv_heads: size,
    head_dim: size,
    scale: aboveZero,
    qkv_bias: boolean,
    output_bias: boolean,
    clip: orNull(aboveZero),
    query_key_norm: orNull(object({ norm, width: choice("head", "heads", "full"), after_rotation: boolean })),
    query_temperature: orNull(
      object(
        { beta: aboveZero, original_positions: size, offset },
        { optional: { growth: choice("power") } },
      ),
    ),
    logit_cap: orNull(aboveZero),
    window: orNull(size),
    chunk: orNull(size),
    sinks: boolean,
    position: variant(
      {
        none: {},
        rotary: { base: aboveZero, dim: integer(2, MOST), layout: choice("half", "interleaved"), scaling },
        alibi: { max_bias: aboveZero, multiplier: aboveZero },
      },
      { rotary: { direction: choice("backward") } },
    ),
  },
  {
    optional: {
      output_gate: object({
        width: choice("head", "channel"),
        function: choice("sigmoid", "softplus"),
        bias: boolean,
      }),
      value_dim: size,
      value_multiplier: aboveZero,
    },
  },
);

const dense = object({
  gated: boolean,
  activation: choice(...DENSE_ACTIVATIONS, "xielu"),
  intermediate_size: size,
  bias: boolean,
});

const mixture = variant({
  experts: {
    count: experts,
    per_token: experts,
    gated: boolean,
    activation: choice(...DENSE_ACTIVATIONS),
    intermediate_size: size,
    bias: boolean,
    clamp: orNull(aboveZero),
    gate_slope: aboveZero,
    up_offset: zeroOrOne,
    router: object({
      function: choice("softmax", "sigmoid", "sparsemixer"),
      bias: boolean,
      logit_cap: orNull(aboveZero),
      correction: orNull(choice("score", "logit")),
      groups: orNull(object({ count: experts, kept: experts, score: choice("max", "top_two") })),
      normalised: boolean,
      epsilon: zeroOrAbove,
      scale: aboveZero,
      weighs: choice("output", "input"),
    }),
    shared: orNull(object({ intermediate_size: size, gate: boolean, average: boolean })),
  },
});

const residualScale = object({ kept: aboveZero, added: aboveZero });
const layerKind = object(
  {
    placement: choice("pre", "output", "sandwich", "post", "parallel", "parallel_two"),
    norm,
    residual_multiplier: aboveZero,
    attention,
    // SB-A-031: a block without `kind` is dense
    mlp: (value, ...place) => (value instanceof Map && value.has("kind") ? mixture : dense)(value, ...place),
  },
  { optional: { residual_scales: object({ attention: residualScale, mlp: residualScale }) } },
);

const document = object({
  kind: choice("decoder"),
  version: integer(1, 1),
  vocab_size: size,
  hidden_size: size,
  embedding,
  layer_kinds: mapping(() => layerKind, {
    holds: (key) => /^[a-z][a-z0-9_]{0,63}$/.test(key),
    expected: "1 to 64 of a-z 0-9 _, the first a letter",
  }),
  layers: array(string(), { least: 1, most: MOST_LAYERS }),
  head: object({
    norm: orNull(norm),
    tied: boolean,
    bias: boolean,
    multiplier: aboveZero,
    logit_cap: orNull(aboveZero),
  }),
});

/**
 * Parse and judge `architecture.json` by itself.
 *
 * @param {Uint8Array} bytes
 * @returns {object} the document as plain frozen data
 * @throws {BundleError} json.*, architecture.version, field.*, architecture.rule
 */
export function parseArchitecture(bytes) {
  const value = parseJson(bytes, FILE);
  const version = value instanceof Map ? value.get("version") : undefined;
  const found = new Collector(FILE);
  if (typeof version === "number" && version > 1) {
    found.add("architecture.version", "/version", "version 1; a newer reader is needed", version); // SB-V-009
  }
  found.close();
  const architecture = document(value, "", found);
  found.close();
  checkRules(architecture, found);
  found.close();
  return architecture;
}

function checkRules(architecture, found) {
  const rule = (holds, pointer, expected, got) => {
    if (!holds) {
      found.add("architecture.rule", pointer, expected, got);
    }
  };
  const { embedding: first, layer_kinds: kinds, layers, head } = architecture;
  const narrow = first.position.kind === "sinusoidal" && architecture.hidden_size < 4; // SB-A-022
  rule(!narrow, "/hidden_size", "at least 4 for sinusoidal positions", architecture.hidden_size);
  checkNorm(first.norm, "/embedding/norm", rule);
  const used = new Set(layers);
  for (const [name, kind] of Object.entries(kinds)) {
    const pointer = `/layer_kinds/${escaped(name)}`;
    rule(used.has(name), pointer, "the kind of at least one layer", name); // SB-A-007
    checkKind(kind, pointer, rule);
  }
  for (const [i, name] of layers.entries()) {
    rule(name in kinds, `/layers/${i}`, "a key of layer_kinds", name); // SB-A-006
    if (found.full) {
      break;
    }
  }
  checkNorm(head.norm, "/head/norm", rule);
}

function checkKind(kind, pointer, rule) {
  checkNorm(kind.norm, `${pointer}/norm`, rule);
  const parallel = kind.placement.startsWith("parallel");
  // SB-A-040
  rule(!kind.residual_scales || !parallel, `${pointer}/residual_scales`, "none in a parallel layer", "some");
  checkAttention(kind.attention, `${pointer}/attention`, rule);
  if (kind.mlp.kind === "experts") {
    checkExperts(kind.mlp, `${pointer}/mlp`, rule);
  }
}

function checkNorm(value, pointer, rule) {
  if (value === null) {
    return;
  }
  rule(!(value.kind === "rms_norm" && value.bias), `${pointer}/bias`, "false for rms_norm", true); // SB-A-018
  const weight = value.affine || !(value.bias || value.weight_offset !== 0);
  rule(weight, `${pointer}/affine`, "true if there is a bias or an offset", false); // SB-A-021
}

function checkAttention(value, pointer, rule) {
  const alibi = value.position.kind === "alibi";
  // SB-A-011
  rule(value.heads % value.kv_heads === 0, `${pointer}/kv_heads`, "a divisor of heads", value.kv_heads);
  // SB-A-029
  const one = value.chunk === null || value.window === null;
  rule(one, `${pointer}/chunk`, "null beside a window", value.chunk);
  rule(!(alibi && value.sinks), `${pointer}/sinks`, "false with alibi", true); // SB-A-030
  // SB-A-026
  rule(!alibi || value.logit_cap === null, `${pointer}/logit_cap`, "null with alibi", value.logit_cap);
  const own = value.query_key_norm;
  if (own) {
    checkNorm(own.norm, `${pointer}/query_key_norm/norm`, rule);
    const place = `${pointer}/query_key_norm/after_rotation`;
    rule(!(own.width === "full" && own.after_rotation), place, "false if width is full", true); // SB-A-025
  }
  if (value.position.kind === "rotary") {
    checkRotary(value.position, value.head_dim, `${pointer}/position`, rule);
  }
}

function checkRotary({ dim, base, scaling: own }, headDim, pointer, rule) {
  const even = dim % 2 === 0 && dim <= headDim;
  rule(even, `${pointer}/dim`, `an even number of at most ${headDim}`, dim); // SB-A-013
  const place = `${pointer}/scaling`;
  const pairs = dim / 2;
  if (own.kind === "llama3") {
    const low = own.low_frequency_factor;
    const high = own.high_frequency_factor;
    rule(low < high, `${place}/high_frequency_factor`, "more than low_frequency_factor", high); // SB-A-015
  } else if (own.kind === "dynamic") {
    rule(dim >= 4, `${pointer}/dim`, "at least 4 for dynamic scaling", dim); // SB-A-023
  } else if (own.kind === "longrope") {
    for (const name of ["short_factors", "long_factors"]) {
      rule(own[name].length === pairs, `${place}/${name}`, `${pairs} numbers`, own[name].length); // SB-A-024
    }
  } else if (own.kind === "proportional") {
    rule(own.pairs <= pairs, `${place}/pairs`, `at most ${pairs}`, own.pairs); // SB-A-027
  } else if (own.kind === "yarn") {
    rule(base > 1, `${pointer}/base`, "above 1 for yarn", base); // SB-A-028
    rule(own.beta_slow < own.beta_fast, `${place}/beta_fast`, "more than beta_slow", own.beta_fast);
  }
}

function checkExperts(value, pointer, rule) {
  const { router } = value;
  const at = `${pointer}/router`;
  // SB-A-033
  rule(value.per_token <= value.count, `${pointer}/per_token`, `at most ${value.count}`, value.per_token);
  const plainSilu = value.gated && value.activation === "silu";
  const slope = value.gate_slope;
  rule(plainSilu || slope === 1, `${pointer}/gate_slope`, "1 unless it is a gate of silu", slope); // SB-A-034
  rule(value.gated || value.up_offset === 0, `${pointer}/up_offset`, "0 without gates", value.up_offset);
  const mixer = router.function === "sparsemixer";
  const summed = router.normalised || mixer;
  // SB-A-035
  rule(summed || router.epsilon === 0, `${at}/epsilon`, "0 where nothing is divided", router.epsilon);
  if (router.groups) {
    checkGroups(router.groups, value, `${at}/groups`, rule);
  }
  if (mixer) {
    const { epsilon, correction, groups, normalised } = router;
    const fits = value.per_token === 2 && epsilon > 0 && !correction && !groups && !normalised;
    const expected = "2 experts a token, an epsilon, and no correction, groups or normalised weights";
    rule(fits, `${at}/function`, expected, "sparsemixer"); // SB-A-037
  }
}

function checkGroups({ count, kept, score }, mixtureOf, pointer, rule) {
  const each = mixtureOf.count / count; // SB-A-036
  rule(Number.isInteger(each), `${pointer}/count`, `a divisor of ${mixtureOf.count}`, count);
  const enough = kept <= count && kept * each >= mixtureOf.per_token;
  rule(enough, `${pointer}/kept`, `at most ${count}, with at least ${mixtureOf.per_token} experts`, kept);
  rule(score !== "top_two" || each >= 2, `${pointer}/score`, "max for groups of one", score);
}
