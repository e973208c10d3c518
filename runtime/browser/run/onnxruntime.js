// Load onnxruntime-web, which isn't a part of splitbundle: from beside the page, and from nowhere else.

import { refusal } from "../wire/refusal.js";

/** The file of onnxruntime-web that is imported; it loads the other two from the same folder. */
export const ENTRY = "ort.wasm.min.mjs";
/** Every file of onnxruntime-web that the page needs. */
export const FILES = [ENTRY, "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];
const MOST_THREADS = 4;

let loaded = null;

/**
 * Load onnxruntime-web once.
 *
 * @param {string} base the URL of the folder with its files, with `/` at the end
 * @param {{threads?: number}} [options] by default as many as the browser allows, up to four: a page may have
 *   several if its server isolates it (`crossOriginIsolated`)
 * @returns {Promise<object>} the module
 * @throws {BundleError} `backend.missing`
 */
export function loadOnnxRuntime(base, { threads } = {}) {
  loaded ??= load(base, threads).catch((failure) => {
    loaded = null;
    throw failure;
  });
  return loaded;
}

async function load(base, threads) {
  let ort;
  try {
    ort = await import(new URL(ENTRY, base).href);
  } catch (failure) {
    const hint = "npm install onnxruntime-web, and name the folder to the gateway";
    throw refusal("backend.missing", "onnxruntime-web", `${ENTRY} at ${base}`, failure.message, hint);
  }
  ort.env.wasm.wasmPaths = base;
  ort.env.wasm.numThreads = threads ?? (globalThis.crossOriginIsolated ? usable() : 1);
  ort.env.logLevel = "error";
  return ort;
}

const usable = () => Math.max(1, Math.min(MOST_THREADS, globalThis.navigator?.hardwareConcurrency ?? 1));
