// The bundle view: what a model consists of, where each part runs, and what is verified.

import { get } from "./api.js";
import { button, byId, bytes, copyButton, count, make, many, plural } from "./elements.js";

const VERIFIED = {
  hashes: "every file’s size and SHA-256 digest",
  sizes: "the sizes of the files, not their digests",
  none: "nothing: the files were taken as they are",
};

/** Show the bundle of a model in the view. Errors go to the caller. */
export async function showBundle(model) {
  const place = byId("bundle");
  place.setAttribute("aria-busy", "true");
  try {
    const { bundles } = await get("api/bundles");
    const bundle = bundles.find((each) => each.id === model);
    const again = button("Refresh", () => refresh(model), { id: "bundle-again" });
    if (bundle) place.replaceChildren(title(bundle, again), facts(bundle), ...table(bundle));
    else place.replaceChildren(make("p", {}, "The server says nothing about the bundle of this model."), again);
  } finally {
    place.removeAttribute("aria-busy");
  }
}

async function refresh(model) {
  await showBundle(model);
  byId("bundle-again")?.focus();
}

const title = (bundle, again) => make("div", { class: "row" }, make("h2", {}, bundle.id), again);

function facts(bundle) {
  const context = bundle.context_length === null ? "no stated limit" : plural(bundle.context_length, "token");
  const checked = make("dd", { class: bundle.verified === "hashes" ? "good" : "warning" });
  checked.append(VERIFIED[bundle.verified] ?? String(bundle.verified));
  const rows = [
    ["Model", `${bundle.architecture}, ${many(bundle.parameters)} parameters in ${bundle.dtype}`],
    ["Shape", `${plural(bundle.layers, "layer")}, hidden size ${count(bundle.hidden_size)}`],
    ["Vocabulary", plural(bundle.vocab_size, "token")],
    ["Context", context],
    ["Use", bundle.chat ? "chat, and continuing a text" : "continuing a text (it has no chat template)"],
    ["Backend", bundle.backend ?? "not chosen yet"],
    ["Loaded", bundle.loaded ? "yes" : "not yet; the first question loads it"],
    ["Size", `${bytes(bundle.bytes)} (${count(bundle.bytes)} bytes)`],
    ["Format", `version ${bundle.format_version}`],
  ].map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  rows.push([make("dt", {}, "Verified"), checked]);
  const copies = copyButton("Copy", () => bundle.bundle_id);
  const id = make("code", { class: "hash" }, bundle.bundle_id);
  rows.push([make("dt", {}, "Bundle id"), make("dd", {}, id, " ", copies)]);
  return make("dl", { class: "card facts" }, ...rows.flat());
}

/** Return "0–11" for [0, 12]: the format's ranges leave out their end. */
function layersOf({ layers: [start, stop], embeds, head }) {
  const held = stop - start;
  const range = held === 0 ? [] : [held === 1 ? `layer ${start}` : `layers ${start}–${stop - 1}`];
  return [...(embeds ? ["embedding"] : []), ...range, ...(head ? ["head"] : [])].join(", ") || "nothing";
}

/** Return a bar. Screen readers pass over it: the number is beside it. */
function bar(share) {
  const filled = make("span", { class: "filled" });
  filled.style.width = `${Math.max(100 * share, 1)}%`;
  return make("span", { class: "bar", "aria-hidden": "true" }, filled);
}

const COLUMNS = ["Shard", "Holds", "Size", "Runs", "Time a token"];

// The roles are said once more, as a narrow page shows rows as blocks, and browsers then take them for plain text.
function table(bundle) {
  const { shards } = bundle;
  const largest = Math.max(...shards.map((shard) => shard.bytes), 1);
  const slowest = Math.max(...shards.map((shard) => shard.milliseconds ?? 0), 1e-9);
  const heads = COLUMNS.map((name) => make("th", { scope: "col", role: "columnheader" }, name));
  const bodies = shards.map((shard) => make("tbody", { role: "rowgroup" }, row(shard, largest, slowest), files(shard)));
  const number = plural(shards.length, "shard");
  const caption = make("caption", {}, `${number}, in the order in which a token passes through them`);
  const top = make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads));
  const total = shards.every((shard) => typeof shard.milliseconds === "number")
    ? `All shards together take ${shards.reduce((sum, shard) => sum + shard.milliseconds, 0).toFixed(1)} ms a token.`
    : "A shard’s time is measured when it computes. Ask something in the chat, then refresh.";
  const made = make("table", { class: "shards", role: "table" }, caption, top, ...bodies);
  return [made, make("p", { class: "quiet" }, total)];
}

function row(shard, largest, slowest) {
  const { milliseconds } = shard;
  const figure = (text) => make("span", { class: "number" }, text);
  const timed = typeof milliseconds === "number";
  const cell = (name, ...inside) => make("td", { role: "cell", "data-name": name }, make("div", {}, ...inside));
  return make(
    "tr", { role: "row" },
    make("th", { scope: "row", role: "rowheader" }, shard.name),
    cell("Holds", layersOf(shard)),
    cell("Size", figure(bytes(shard.bytes)), bar(shard.bytes / largest)),
    cell("Runs", shard.where === "here" ? "here" : make("span", {}, "at ", make("code", {}, shard.where))),
    timed
      ? cell("Time a token", figure(`${milliseconds.toFixed(1)} ms`), bar(milliseconds / slowest))
      : cell("Time a token", make("span", { class: "quiet" }, "not measured yet")),
  );
}

function files(shard) {
  const listed = shard.files.map((file) => make(
    "li", {},
    make("span", { class: "file" }, file.name), " ", make("span", { class: "quiet" }, bytes(file.bytes)),
    make("code", { class: "hash" }, file.sha256),
  ));
  const folded = make(
    "details", {},
    make("summary", {}, `${plural(listed.length, "file")}`, make("span", { class: "unseen" }, ` of ${shard.name}`)),
    make("ul", { class: "files", "aria-label": "Files with their SHA-256 digests" }, ...listed),
  );
  const cell = make("td", { role: "cell", colspan: String(COLUMNS.length) }, folded);
  return make("tr", { class: "more", role: "row" }, cell);
}
