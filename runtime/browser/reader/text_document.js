/** `text.json` (SB-T-010 to SB-T-015), by itself and beside the architecture's vocabulary. */

import { array, boolean, integer, mapping, number, object, orNull, string } from "./fields.js";
import { parseJson } from "./json.js";
import { Collector } from "./problems.js";

const text = (most) => string({ most });
/** SB-T-013: zero, where it may be, or from 1e-37 on. */
const from = (zero, most) => {
  const holds = (value) => (zero && value === 0) || (value >= 1e-37 && value <= most);
  return number(`a number from 1e-37 to ${most}${zero ? ", or 0" : ""}`, holds);
};
const share = from(false, 1);
const template = object({
  name: string({
    holds: (name) => /^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$/.test(name),
    expected: "a template's name",
  }),
  template: text(1_048_576),
});
const defaults = object({
  sample: orNull(boolean),
  temperature: orNull(from(true, 1e37)),
  top_k: orNull(integer(1)),
  top_p: orNull(share),
  min_p: orNull(from(true, 1)),
  typical_p: orNull(share),
  repetition_penalty: orNull(from(false, 1e37)),
});
const message = object({
  role: string({
    holds: (role) => /^[A-Za-z0-9_-]{1,64}$/.test(role),
    expected: "1 to 64 of A-Z a-z 0-9 _ -",
  }),
  content: text(4096),
});

function documentType(vocabulary) {
  const ids = array(integer(0, vocabulary - 1), { most: Infinity });
  return object({
    version: integer(1, 1),
    variables: mapping(() => text(4096), {
      holds: (name) => /^[a-z][a-z0-9_]{0,63}$/.test(name),
      expected: "1 to 64 of a-z 0-9 _, the first a letter",
    }),
    templates: array(template, { most: 16 }),
    defaults,
    cases: array(object({ text: text(4096), ids, control_ids: ids, decoded: text(8192) }), { most: 256 }),
    chats: array(
      object({ messages: array(message, { least: 1, most: 64 }), add_generation_prompt: boolean, ids }),
      { most: 64 },
    ),
  });
}

/**
 * @param {Uint8Array} bytes
 * @param {string} file
 * @param {number} vocabulary `vocab_size` of the architecture
 * @returns {object} the document as plain frozen data
 * @throws {BundleError} json.*, text.version, field.*
 */
export function parseTextDocument(bytes, file, vocabulary) {
  const value = parseJson(bytes, file);
  const found = new Collector(file);
  const version = value instanceof Map ? value.get("version") : undefined;
  if (typeof version === "number" && version > 1) {
    found.add("text.version", "/version", "version 1; a newer reader is needed", version);
  }
  found.close();
  const document = documentType(vocabulary)(value, "", found);
  found.close();
  const names = new Set();
  for (const [i, { name }] of document.templates.entries()) {
    if (names.has(name)) {
      found.add("field.value", `/templates/${i}/name`, "names that differ", name); // SB-T-012
    }
    names.add(name);
  }
  found.close();
  return document;
}
