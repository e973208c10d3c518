/**
 * Typed fields of a parsed document. A *type* is a function of (value, pointer, collector): it reports what
 * is wrong and returns plain frozen data. Objects have no prototype, so a key such as `__proto__` is a key
 * like any other.
 *
 * @typedef {(value: unknown, pointer: string, found: import("./problems.js").Collector) => any} Type
 */

import { Fraction, plain } from "./json.js";
import { escaped } from "./problems.js";

/** SB-M-001 */
export const LARGEST_INTEGER = Number.MAX_SAFE_INTEGER;
/** SB-M-004 */
const MOST_CODE_POINTS = 1024;
const MOST_ITEMS = 262_144;
/** SB-A-003 */
const SMALLEST_NUMBER = 1e-37;
const LARGEST_NUMBER = 1e37;

/** An integer that is written as one (SB-J-008). */
export function integer(least = 0, most = LARGEST_INTEGER) {
  return (value, pointer, found) => {
    const expected = `an integer from ${least} to ${most}`;
    if (typeof value !== "number") {
      found.add("field.type", pointer, expected, value);
    } else if (value < least || value > most) {
      found.add("field.value", pointer, expected, value);
    }
    return value;
  };
}

/** A number in either form, for which `holds` is true. */
export function number(expected, holds) {
  return (value, pointer, found) => {
    const own = value instanceof Fraction ? value.fraction : value;
    if (typeof own !== "number") {
      found.add("field.type", pointer, expected, value);
    } else if (!holds(own)) {
      found.add("field.value", pointer, expected, own);
    }
    return own;
  };
}

/** SB-A-003: so that the number and its inverse are numbers in float32. */
export const aboveZero = number(
  "a number from 1e-37 to 1e37",
  (value) => value >= SMALLEST_NUMBER && value <= LARGEST_NUMBER,
);

/** @type {Type} */
export function boolean(value, pointer, found) {
  if (typeof value !== "boolean") {
    found.add("field.type", pointer, "true or false", value);
  }
  return value;
}

/** A string of at most `most` characters (code points), for which `holds` is true. */
export function string(options = {}) {
  const { most = MOST_CODE_POINTS, holds = () => true } = options;
  const { expected = "a string", code = "field.value" } = options;
  return (value, pointer, found) => {
    if (typeof value !== "string") {
      found.add("field.type", pointer, expected, value);
    } else if (longerThan(value, most)) {
      found.add("field.value", pointer, `at most ${most} characters`, value);
    } else if (!holds(value)) {
      found.add(code, pointer, expected, value);
    }
    return value;
  };
}

/** One of some strings. */
export function choice(...values) {
  const expected = values.map((each) => `"${each}"`).join(" or ");
  return string({ holds: (value) => values.includes(value), expected });
}

/** @param {Type} type */
export function orNull(type) {
  return (value, pointer, found) => (value === null ? null : type(value, pointer, found));
}

/** An array whose length is checked before its items are. */
export function array(type, { least = 0, most = MOST_ITEMS } = {}) {
  return (value, pointer, found) => {
    const expected = `an array of ${least} to ${most} items`;
    if (!Array.isArray(value)) {
      found.add("field.type", pointer, expected, value);
    } else if (value.length < least || value.length > most) {
      found.add("field.value", pointer, expected, value);
    } else {
      const items = [];
      for (let i = 0; i < value.length && !found.full; i++) {
        items.push(type(value[i], `${pointer}/${i}`, found));
      }
      return Object.freeze(items);
    }
    return undefined;
  };
}

/** An array of exactly these types, in order. */
export function tuple(...types) {
  const any = array((value) => value, { least: types.length, most: types.length });
  return (value, pointer, found) => {
    const items = any(value, pointer, found);
    return items && Object.freeze(types.map((type, i) => type(items[i], `${pointer}/${i}`, found)));
  };
}

/**
 * An object with exactly these fields (SB-V-007, SB-V-008), of which those of `optional` may be absent.
 *
 * @param {Record<string, Type>} fields
 * @param {{optional?: Record<string, Type>, open?: boolean}} [options] `open`: other members are ignored and
 *   kept
 * @returns {Type}
 */
export function object(fields, { optional = {}, open = false } = {}) {
  const known = new Map([...Object.entries(fields), ...Object.entries(optional)]);
  return (value, pointer, found) => {
    if (!(value instanceof Map)) {
      found.add("field.type", pointer, "an object", value);
      return undefined;
    }
    const result = Object.create(null);
    for (const name of Object.keys(fields)) {
      if (!value.has(name)) {
        found.add("field.missing", pointer, `the field ${name}`, "an object without it");
      }
    }
    for (const [name, member] of value) {
      if (known.has(name)) {
        continue;
      }
      if (found.full) {
        break;
      }
      if (open) {
        result[name] = plain(member);
      } else {
        found.add("field.unknown", `${pointer}/${escaped(name)}`, "no such field", name);
      }
    }
    for (const [name, type] of known) {
      if (value.has(name)) {
        result[name] = type(value.get(name), `${pointer}/${name}`, found);
      }
    }
    return Object.freeze(result);
  };
}

/**
 * An object with keys of one grammar and values of one type, which may depend on the key.
 *
 * @param {(key: string) => Type} typeOf
 * @param {{holds?: (key: string) => boolean, expected?: string}} [keys]
 * @returns {Type}
 */
export function mapping(typeOf, { holds = () => true, expected = "another key" } = {}) {
  return (value, pointer, found) => {
    if (!(value instanceof Map)) {
      found.add("field.type", pointer, "an object", value);
      return undefined;
    }
    const result = Object.create(null);
    for (const [key, member] of value) {
      if (found.full) {
        break;
      }
      const place = `${pointer}/${escaped(key)}`;
      if (!holds(key)) {
        found.add("field.value", place, expected, key);
      } else {
        result[key] = typeOf(key)(member, place, found);
      }
    }
    return Object.freeze(result);
  };
}

/**
 * An object whose other fields depend on its field `kind`.
 *
 * @param {Record<string, Record<string, Type>>} kinds
 * @param {Record<string, Record<string, Type>>} [optional] the fields of a kind that may be absent
 * @returns {Type}
 */
export function variant(kinds, optional = {}) {
  const kind = choice(...Object.keys(kinds));
  const types = new Map(
    Object.entries(kinds).map(([name, fields]) => {
      return [name, object({ kind, ...fields }, { optional: optional[name] })];
    }),
  );
  return (value, pointer, found) => {
    if (!(value instanceof Map)) {
      found.add("field.type", pointer, "an object", value);
      return undefined;
    }
    const type = types.get(value.get("kind"));
    if (type) {
      return type(value, pointer, found);
    }
    return object({ kind }, { open: true })(value, pointer, found);
  };
}

/** An object that only describes: any members (SB-M-002, SB-V-005). */
export function anything(value, pointer, found) {
  if (!(value instanceof Map)) {
    found.add("field.type", pointer, "an object", value);
    return undefined;
  }
  return plain(value);
}

/** Whether text has more than `most` code points. Looks at no more of it than it must. */
export function longerThan(text, most) {
  if (text.length <= most) {
    return false;
  }
  if (text.length > 2 * most) {
    return true;
  }
  let count = 0;
  for (const _ of text) {
    count++;
  }
  return count > most;
}
