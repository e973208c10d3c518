// The page: opens a bundle, and has two views of it.

import { openBundle } from "../reader/bundle.js";
import { FileListSource } from "../sources/files.js";
import { HttpSource } from "../sources/http.js";
import { showBundle } from "./bundle_view.js";
import { byId, make, told } from "./elements.js";
import { BUNDLE, describeGateway, fetchWithKey, hasKey, keepKey } from "./gateway.js";
import { TextView } from "./text_view.js";

const text = new TextView();
let gateway = null;

/** Do something, and show what is wrong. */
async function attempt(action) {
  byId("notice").hidden = true;
  try {
    return await action();
  } catch (failure) {
    if (failure.problems?.[0].code === "peer.identity") askForKey();
    else {
      byId("notice").replaceChildren(told(failure));
      byId("notice").hidden = false;
    }
    return null;
  }
}

/**
 * Open a bundle and show it. `whole`: whether the source lists all of its files, so that others are noticed.
 */
async function open(source, whole) {
  await attempt(async () => {
    byId("opened").textContent = "opening";
    byId("bundle").setAttribute("aria-busy", "true");
    try {
      const bundle = await openBundle(source);
      byId("opened").textContent = bundle.manifest.model.name;
      showBundle(bundle, { whole });
      text.suit(bundle, gateway);
      byId("open-panel").open = false;
    } catch (failure) {
      byId("opened").textContent = "No bundle is open.";
      throw failure;
    } finally {
      byId("bundle").removeAttribute("aria-busy");
    }
  });
}

const openGateway = () => open(new HttpSource(BUNDLE, { fetch: fetchWithKey }), false);

async function askGateway() {
  gateway = await attempt(describeGateway);
  byId("open-gateway").hidden = gateway === null;
  if (gateway !== null) await openGateway();
}

function askForKey() {
  byId("key-message").textContent = hasKey()
    ? "The gateway doesn’t accept the key of this tab. Enter another one."
    : "Ask the person who runs the gateway for one. This tab keeps the key until you close it.";
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    byId("key-message").textContent = "A key has letters, digits and signs of ASCII, and no spaces.";
    return;
  }
  keepKey(key);
  byId("key-form").hidden = true;
  askGateway();
});

byId("open-gateway").addEventListener("click", openGateway);
byId("url-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const url = byId("url").value;
  const { origin } = new URL(url);
  // A browser doesn't tell a page which of the two refused.
  const hint = `That server must allow this page by CORS, and a gateway by --bundles-from ${origin}`;
  const options = origin === location.origin ? {} : { hint };
  open(new HttpSource(url.endsWith("/") ? url : `${url}/`, options), false);
});
byId("folder").addEventListener("change", () => {
  if (byId("folder").files.length) open(new FileListSource(byId("folder").files), true);
});

function showView() {
  const texts = location.hash === "#text";
  byId("text-view").hidden = !texts;
  byId("bundle-view").hidden = texts;
  for (const [id, here] of [["to-text", texts], ["to-bundle", !texts]]) {
    if (here) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  document.title = `${texts ? "Text" : "Bundle"} · splitbundle`;
}

addEventListener("hashchange", showView);
if (text.bundle === null) {
  byId("load-about").replaceChildren(
    "Open a bundle first, in the view ", make("a", { href: "#bundle" }, "Bundle"), ".",
  );
}
showView();
askGateway();
