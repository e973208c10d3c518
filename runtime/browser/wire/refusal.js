// One way to refuse: an error with a single problem that names an argument, as no file is at fault.

import { BundleError } from "../reader/problems.js";

/**
 * Return an error with one problem.
 *
 * @param {string} code a code of spec/v1/bundle.md, section "Errors"
 * @param {string} argument what is at fault
 * @param {string} expected
 * @param {string} got
 * @param {string | null} [hint]
 */
export const refusal = (code, argument, expected, got, hint = null) =>
  new BundleError([{ code, file: null, pointer: null, offset: null, argument, expected, got, hint }]);

/** Throw the error that `refusal` returns. */
export function refuse(...args) {
  throw refusal(...args);
}
