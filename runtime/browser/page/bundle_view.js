// The bundle view: what a bundle says of itself, its shards with their tensors, its files, and whether they
// are right.

import { bar, breathe, button, byId, bytes, count, make, many, plural, told } from "./elements.js";

const CARD = "README.md";
const MOST_CARD = 200_000;

/** Show a bundle. */
export function showBundle(bundle, { whole }) {
  byId("bundle").replaceChildren(
    make("h2", {}, bundle.manifest.model.name),
    facts(bundle),
    verification(bundle, whole),
    shards(bundle),
    boundaries(bundle),
    files(bundle),
    ...card(bundle),
  );
}

function facts({ id, fingerprint, manifest, architecture }) {
  const { layers, hidden_size: hiddenSize } = architecture;
  const { model, storage, text } = manifest;
  const encodings = new Set(Object.values(storage.encodings ?? {}));
  const stored = [storage.dtype, ...encodings].join(", ");
  const rows = [
    ["Model", `${model.family}, ${many(model.parameters)} parameters in ${stored}`],
    ["Source", model.revision === null ? model.source : `${model.source}, ${model.revision}`],
    ["License", model.license ?? "the source names none"],
    ["Shape", `${plural(layers.length, "layer")}, hidden size ${count(hiddenSize)}`],
    ["Vocabulary", plural(architecture.vocab_size, "token")],
    ["Context", model.context_length === null ? "no stated limit" : plural(model.context_length, "token")],
    ["Tokenizer", text.tokenizer ?? "none"],
    ["Format", `version ${manifest.format_version}`],
  ].map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  for (const [name, value] of [["Bundle id", id], ["Fingerprint", fingerprint]]) {
    rows.push([make("dt", {}, name), make("dd", {}, make("code", { class: "hash" }, value))]);
  }
  return make("dl", { class: "card facts" }, ...rows.flat());
}

function verification(bundle, whole) {
  const progress = make("progress", { max: "1", value: "0", "aria-label": "Verified", hidden: true });
  const state = make("div", { role: "status" });
  const start = button("Verify every file", async () => {
    start.disabled = true;
    progress.hidden = false;
    state.replaceChildren(make("p", { class: "quiet" }, "verifying"));
    const began = performance.now();
    let shown = 0;
    try {
      const found = await bundle.verify({
        exact: whole,
        onProgress(path, done, total) {
          progress.value = total === 0 ? 1 : done / total;
          if (performance.now() - shown < 100) return;
          shown = performance.now();
          state.replaceChildren(make("p", { class: "quiet" }, `${bytes(done)} of ${bytes(total)}: ${path}`));
        },
      });
      state.replaceChildren(...verdict(found, performance.now() - began));
    } catch (failure) {
      state.replaceChildren(make("p", { class: "bad" }, "This bundle isn’t right."), told(failure));
    } finally {
      progress.hidden = true;
      start.disabled = false;
      start.focus();
    }
  }, { id: "verify" });
  return make("div", { class: "card verify" }, start, progress, state);
}

function verdict({ unlisted, absent, shards: wholeShards }, milliseconds) {
  const all = absent.length === 0;
  const seconds = (milliseconds / 1000).toFixed(1);
  const said = all
    ? `Every file has the size and the digest that the manifest lists (${seconds} s).`
    : `The files that are there are right. Whole shards: ${wholeShards.join(", ") || "none"}.`;
  const lines = [make("p", { class: "good" }, said)];
  if (!all) {
    lines.push(make("p", { class: "quiet" }, `${plural(absent.length, "file")} of the bundle aren’t here.`));
  }
  if (unlisted?.length) lines.push(make("p", { class: "warning" }, `Not listed: ${unlisted.join(", ")}`));
  return lines;
}

/** Return "0–11" for [0, 12]: the format's ranges leave out their end. */
function layersOf({ layers: [start, stop], embeds, head }) {
  const range = start === stop ? [] : [stop - start === 1 ? `layer ${start}` : `layers ${start}–${stop - 1}`];
  return [...(embeds ? ["embedding"] : []), ...range, ...(head ? ["head"] : [])].join(", ") || "nothing";
}

const COLUMNS = ["Shard", "Holds", "Size", "Graph"];

// The roles are said once more, as a narrow page shows rows as blocks, and browsers then take them for plain
// text.
function shards(bundle) {
  const own = bundle.manifest.shards;
  const largest = Math.max(...own.map((shard) => shard.bytes), 1);
  const cell = (name, ...inside) => make(
    "td", { role: "cell", "data-name": name }, make("div", {}, ...inside),
  );
  const bodies = own.map((shard) => make(
    "tbody", { role: "rowgroup" },
    make(
      "tr", { role: "row" },
      make("th", { scope: "row", role: "rowheader" }, shard.name),
      cell("Holds", layersOf(shard)),
      cell("Size", make("span", { class: "number" }, bytes(shard.bytes)), bar(shard.bytes / largest)),
      cell("Graph", shard.graph === null ? "none" : shard.graph.variant),
    ),
    make("tr", { class: "more", role: "row" }, make(
      "td", { role: "cell", colspan: String(COLUMNS.length) }, tensors(bundle, shard),
    )),
  ));
  const heads = COLUMNS.map((name) => make("th", { scope: "col", role: "columnheader" }, name));
  const caption = `${plural(own.length, "shard")}, in the order in which a token passes through them`;
  return make(
    "table", { class: "shards", role: "table" },
    make("caption", {}, caption),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...heads)),
    ...bodies,
  );
}

function tensors(bundle, shard) {
  const place = make("div", { class: "scrolled" });
  const folded = make(
    "details", {
      async toggle() {
        if (!folded.open || place.childNodes.length) return;
        place.replaceChildren(make("p", { class: "quiet" }, "reading the headers"));
        try {
          const found = await bundle.tensors(shard.name);
          place.replaceChildren(make("ul", { class: "files" }, ...found.map(tensorLine)));
        } catch (failure) {
          place.replaceChildren(told(failure));
        }
      },
    },
    make("summary", {}, "Tensors", make("span", { class: "unseen" }, ` of ${shard.name}`)),
    place,
  );
  return folded;
}

const tensorLine = ({ name, dtype, shape, file, length }) => make(
  "li", {},
  make("span", { class: "file" }, name), " ",
  make("span", { class: "quiet" }, `${dtype} [${shape.join(", ")}], ${bytes(length)}, in ${file}`),
);

function boundaries({ manifest }) {
  const items = manifest.boundaries.map(({ at, tensors: crossing }) => make(
    "li", {},
    `at layer ${at}: `,
    Object.entries(crossing)
      .map(([name, { dtype, shape }]) => `${name} ${dtype} [${shape.join(", ")}]`)
      .join("; "),
  ));
  const inside = items.length
    ? make("ul", { class: "files" }, ...items)
    : make("p", {}, "The model is in one piece.");
  return make("details", { class: "folded" }, make("summary", {}, "What crosses the cuts"), inside);
}

function files({ manifest }) {
  const listed = Object.entries(manifest.files);
  const items = listed.map(([path, { size, sha256 }]) => make(
    "li", {},
    make("span", { class: "file" }, path), " ", make("span", { class: "quiet" }, bytes(size)),
    make("code", { class: "hash" }, sha256),
  ));
  return make(
    "details", { class: "folded" },
    make("summary", {}, `${plural(listed.length, "file")} with their SHA-256 digests`),
    make("ul", { class: "files" }, ...items),
  );
}

function card(bundle) {
  const listed = bundle.manifest.files[CARD];
  if (listed === undefined) return [];
  const text = make("pre", { class: "plain" });
  const folded = make(
    "details", {
      class: "folded",
      async toggle() {
        if (!folded.open || text.textContent) return;
        await breathe();
        try {
          const data = await bundle.bytes(CARD);
          text.textContent = new TextDecoder().decode(data.subarray(0, MOST_CARD));
        } catch (failure) {
          text.replaceWith(told(failure));
        }
      },
    },
    make("summary", {}, "Model card, as text"),
    text,
  );
  return [folded];
}
