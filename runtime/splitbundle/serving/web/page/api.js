// Requests to the server that this page came from, and what each failure means for the reader.

import { events } from "./stream.js";

const PLACE = "splitbundle-api-key";
let held = null;
try {
  held = sessionStorage.getItem(PLACE);
} catch {
  // a browser may forbid storage; then the key lasts until the page is loaded again
}

/** Whether a key is kept. */
export const hasKey = () => held !== null;

/** Keep the API key for this tab, or forget it with null. */
export function keepKey(key) {
  held = key;
  try {
    if (key === null) sessionStorage.removeItem(PLACE);
    else sessionStorage.setItem(PLACE, key);
  } catch {
    // see above
  }
}

/** A request that failed: `message` says what happened, `advice` what to do next. */
export class Failure extends Error {
  constructor({ message, advice, status = null, code = null, param = null }) {
    super(message);
    Object.assign(this, { advice, status, code, param });
  }
}

/** Return when to try again, from the header Retry-After: seconds or a date. */
function when(header) {
  const seconds = /^\d+$/.test(header ?? "") ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  if (!(seconds > 0)) return "Try again in a moment.";
  return `Try again in ${seconds === 1 ? "a second" : `${seconds} seconds`}.`;
}

function adviceFor(status, code, param, retryAfter) {
  if (status === 401) return "Enter an API key above.";
  if (status === 403) return "This key may not do that. Ask the person who runs the server.";
  if (status === 404) return "The model may have gone. Load the page again to see which are there.";
  if (status === 413) return "Shorten the question, or begin a new chat.";
  if (status === 429 || status === 503) return when(retryAfter);
  if (/context|length/.test(code ?? "")) return "Shorten the question, or begin a new chat.";
  if (status >= 500) return "The fault is on the server; its log says more. You can try again.";
  if (param && param !== "messages" && param !== "prompt") return `Change the setting “${param}”, then try again.`;
  return "Change the question or the settings, then try again.";
}

async function refusal(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // a proxy answers with a page of its own
  }
  const { status } = response;
  const code = typeof error.code === "string" ? error.code : null;
  const param = typeof error.param === "string" ? error.param : null;
  const busy = status === 429 ? "The server is busy." : `The server answered with status ${status}.`;
  return new Failure({
    message: typeof error.message === "string" && error.message ? error.message : busy,
    advice: adviceFor(status, code, param, response.headers.get("Retry-After")),
    ...{ status, code, param },
  });
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (held !== null) headers.Authorization = `Bearer ${held}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const advice = "See whether it still runs, then try again.";
    throw new Failure({ message: "The server can’t be reached.", advice });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/**
 * Return the JSON of a path.
 *
 * @throws {Failure}
 */
export async function get(path) {
  const response = await request(path);
  try {
    return await response.json();
  } catch {
    throw new Failure({ message: "The server’s answer isn’t JSON.", advice: "See whether a proxy stands between." });
  }
}

const BROKEN = {
  message: "The connection ended before the answer did.",
  advice: "What came so far stays. You can try again.",
};

/**
 * Post a request, and yield the chunks of its answer.
 *
 * @throws {Failure} also in the middle, and where the stream ends without [DONE]
 * @throws {DOMException} AbortError, if the signal says so
 */
export async function* post(path, body, signal) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        const { message, code } = chunk.error;
        throw new Failure({ message: String(message), advice: BROKEN.advice, code: code ?? null });
      }
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure(BROKEN); // the network failed, or a chunk was cut
  }
  throw new Failure(BROKEN);
}
