// The page: its two views, the choice of a model, the API key, and errors outside of answers.

import { get, hasKey, keepKey } from "./api.js";
import { showBundle } from "./bundle.js";
import { Chat } from "./chat.js";
import { button, byId, make, short } from "./elements.js";

const PERIOD = 5000; // milliseconds between two looks at the server's load
const picker = byId("model");
const chat = new Chat({ model: () => picker.value || null, askForKey });
let templates = new Map(); // model -> whether it has a chat template
let afterKey = null;

function showError(failure, retry) {
  const advice = make("p", { class: "advice" }, failure.advice ?? "Load the page again.");
  byId("notice").replaceChildren(make("p", {}, failure.message), advice, button("Try again", retry));
  byId("notice").hidden = false;
}

/** Do something that asks the server. Show an error with a way to try again, or ask for a key and then do it again. */
async function attempt(action) {
  const again = () => attempt(action);
  byId("notice").hidden = true;
  try {
    await action();
  } catch (failure) {
    if (failure.status === 401) askForKey(again);
    else showError(failure, again);
  }
}

function askForKey(then) {
  const refused = hasKey();
  byId("key-message").textContent = refused
    ? "The server doesn’t accept the key of this tab. Enter another one."
    : "Ask the person who runs the server for one. This tab keeps the key until you close it.";
  afterKey = then;
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key").focus();
  byId("key-form").scrollIntoView({ block: "nearest" });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    byId("key-message").textContent = "A key has letters, digits and signs of ASCII, and no spaces.";
    return;
  }
  keepKey(key);
  byId("forget-key").hidden = false;
  byId("key-form").hidden = true;
  const then = afterKey;
  afterKey = null;
  byId("question").focus();
  then?.();
});

byId("forget-key").addEventListener("click", () => {
  keepKey(null);
  byId("forget-key").hidden = true;
  byId("question").focus();
});

async function loadModels() {
  const { data } = await get("v1/models");
  const chosen = picker.value;
  picker.replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
  picker.disabled = data.length === 0;
  if (data.some(({ id }) => id === chosen)) picker.value = chosen;
  try {
    const { bundles } = await get("api/bundles");
    templates = new Map(bundles.map((bundle) => [bundle.id, bundle.chat]));
  } catch {
    // the chat works without it; the bundle view says what is wrong
  }
  chosenModel();
  showStatus();
}

function chosenModel() {
  chat.suit(templates.get(picker.value) ?? true);
  if (location.hash === "#bundle") attempt(() => showBundle(picker.value));
}

picker.addEventListener("change", chosenModel);

function showView() {
  const bundle = location.hash === "#bundle";
  byId("bundle-view").hidden = !bundle;
  byId("chat-view").hidden = bundle;
  for (const [id, here] of [["to-bundle", bundle], ["to-chat", !bundle]]) {
    if (here) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  document.title = bundle ? "Bundle · splitbundle" : "Chat · splitbundle";
  if (bundle && !picker.disabled) attempt(() => showBundle(picker.value));
}

addEventListener("hashchange", showView);

function told({ rows, active, waiting, tokens_per_second: speed }) {
  const parts = [`${active} of ${rows} rows busy`];
  if (waiting) parts.push(`${waiting} waiting`);
  if (active && typeof speed === "number") parts.push(`${short(speed)} tokens/s in all`);
  return parts.join(" · ");
}

async function showStatus() {
  if (document.hidden || picker.disabled) return;
  let text = "";
  try {
    const own = (await get("api/status")).models[picker.value];
    if (own) text = told(own);
  } catch {
    // this line is no reason to disturb a chat
  }
  byId("status").textContent = text;
}

setInterval(showStatus, PERIOD);
document.addEventListener("visibilitychange", showStatus);
byId("forget-key").hidden = !hasKey();
chat.setMode("chat");
showView();
attempt(loadModels);
// Where fingers type, the focus would open a keyboard over half of the page.
if (location.hash !== "#bundle" && !matchMedia("(pointer: coarse)").matches) byId("question").focus();
