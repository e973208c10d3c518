// Hold a tokenizer against the golden texts of its bundle (SB-T-014).

import { refuse } from "../../wire/refusal.js";

/**
 * Encode and decode every golden text.
 *
 * @param {import("./tokenizer.js").Tokenizer} tokenizer
 * @param {object} document text.json, as plain data
 * @returns {number} how many were checked
 * @throws {BundleError} `text.ids` for the first text that gets other ids, or whose ids get another text
 */
export function checkTexts(tokenizer, document) {
  for (const [i, { text, ids, control_ids: controlIds, decoded }] of document.cases.entries()) {
    const same = (name, expected, got) => {
      if (String(expected) === String(got)) return;
      const hint = "This page reads the tokenizer in another way than the library of its makers";
      const short = JSON.stringify(text.slice(0, 40));
      refuse("text.ids", `text.json /cases/${i}/${name}`, `the golden ids of ${short}`, "others", hint);
    };
    same("ids", ids, tokenizer.encode(text));
    same("control_ids", controlIds, tokenizer.encode(text, { control: true }));
    same("decoded", decoded, tokenizer.decode([...controlIds]));
  }
  return document.cases.length;
}
