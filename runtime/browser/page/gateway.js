// The gateway that this page came from, if it came from one: its bundle, its remote stages, and the key for
// it.

import { refuse } from "../wire/refusal.js";

const ROOT = new URL("../", document.baseURI);
const KEY = "splitbundle-key";

/** The URL of the gateway's bundle. */
export const BUNDLE = new URL("bundle/", ROOT).href;
/** The URL of onnxruntime-web. */
export const ONNXRUNTIME = new URL("onnxruntime-web/", ROOT).href;

/** Return the URL that takes frames for a stage. */
export const stageUrl = (name) => new URL(`stages/${encodeURIComponent(name)}`, ROOT).href;

/** Whether this tab has a key. */
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Keep a key until the tab is closed. */
export const keepKey = (key) => sessionStorage.setItem(KEY, key);

/** Return the headers that show the key. They go to the gateway alone. */
export function headers() {
  const key = sessionStorage.getItem(KEY);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

/** Fetch from the gateway, with the key. */
export const fetchWithKey = (url, options = {}) =>
  fetch(url, { ...options, headers: { ...options.headers, ...headers() }, referrerPolicy: "no-referrer" });

/**
 * Ask the gateway what it has.
 *
 * @returns {Promise<{bundle: string, stages: object, onnxruntime_web: boolean} | null>} null where the page
 *   came from another server
 * @throws {BundleError} `peer.identity` where it wants a key, or another one
 */
export async function describeGateway() {
  const answer = await fetchWithKey(new URL("gateway.json", ROOT), { cache: "no-store" });
  if (answer.status === 401) {
    refuse("peer.identity", "gateway", "a key of the gateway", hasKey() ? "another one" : "none");
  }
  if (!answer.ok || !answer.headers.get("content-type")?.startsWith("application/json")) return null;
  return answer.json();
}
