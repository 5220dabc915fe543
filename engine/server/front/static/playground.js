import { byId, element, setText, showAbout, watch } from "./feed.js";
import { hasChatTemplate, Refusal, servedModels, stream } from "./chat.js";
import { PoolMap, plain } from "./map.js";

// What this page's requests are known by: nobody else can guess it, and so pick out or read our requests.
const OWN = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const TRIES = ["Why is the KV cache of a language model cut into blocks?", "Tell a short story about a librarian who lends out memory.",
  "List ten words that rhyme with cache."];
const FIELDS = ["temperature", "top_p", "max_tokens", "seed"], STORE = "kvarena-settings";
const map = new PoolMap(byId("map"), matchMedia("(max-width: 62rem)").matches ? 150 : 330, true);
let history = [], control = null, numSent = 0, isReady = false, mostBlocks = 0, lastSeen = 0;

function settings() {
  const made = { model: byId("model").value || undefined };
  for (const name of FIELDS) if (byId(name).value !== "") made[name] = byId(name).valueAsNumber;
  return made;
}

function keepSettings() {
  const kept = Object.fromEntries(["kind", "system", ...FIELDS].map((name) => [name, byId(name).value]));
  sessionStorage.setItem(STORE, JSON.stringify(kept));
  byId("system-label").hidden = byId("kind").value !== "chat";
}

function recallSettings() {
  const kept = JSON.parse(sessionStorage.getItem(STORE) || "{}");
  for (const [name, value] of Object.entries(kept)) byId(name).value = value;
  return "kind" in kept;
}

function show(kind, who, text) {
  byId("hello").hidden = true;
  const message = element("div", "message " + kind);
  if (who) message.append(element("div", "who", who));
  message.append(element("div", "text", text), element("div", "meta"));
  byId("messages").append(message);
  follow(true);
  return message;
}

// Keep the end in sight, unless the reader has scrolled away from it.
function follow(always = false) {
  const box = byId("messages"), page = document.scrollingElement;
  const scroller = getComputedStyle(box).overflowY === "auto" ? box : page;
  if (always || scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 120) scroller.scrollTop = scroller.scrollHeight;
}

function body(text) {
  if (byId("kind").value === "text") return ["v1/completions", { ...settings(), prompt: text }];
  const system = byId("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...history, { role: "user", content: text }];
  return ["v1/chat/completions", { ...settings(), messages }];
}

function summary(end, begun, first) {
  const done = performance.now(), { usage } = end, parts = [];
  if (first) parts.push(`first token after ${Math.round(first - begun)} ms`);
  if (usage) {
    parts.push(`${plain(usage.completion_tokens)} tokens`);
    if (usage.completion_tokens > 1 && done > first) parts.push(`${plain(Math.round((1000 * (usage.completion_tokens - 1)) / (done - first)))} tokens/s`);
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    setText(byId("reused"), `${Math.round((100 * cached) / usage.prompt_tokens)} %`);
    setText(byId("reused-of"), `${plain(cached)} of ${plain(usage.prompt_tokens)} tokens came from the cache`);
  }
  if (end.reason === "length") parts.push("cut at the most tokens");
  return parts.join(" · ");
}

async function send(text) {
  if (control || !text.trim()) return;
  if (!byId("settings").checkValidity()) { byId("details").open = true; byId("settings").reportValidity(); return; }
  const isChat = byId("kind").value === "chat", [path, request] = body(text);
  show(isChat ? "user" : "user text-prompt", isChat ? "You" : "Your text", text);
  const message = show("assistant writing", isChat ? "Model" : "goes on", ""), place = message.querySelector(".text"), meta = message.querySelector(".meta");
  control = new AbortController();
  byId("stop").hidden = false; byId("send").hidden = true;
  const begun = performance.now();
  let first = 0, written = "", isWhole = false;
  try {
    const end = await stream(path, request, `${OWN}-${++numSent}`, control.signal, (piece) => {
      first = first || performance.now();
      written += piece;
      place.append(piece);
      follow();
    });
    setText(meta, summary(end, begun, first));
    isWhole = !end.error;
    if (end.error) fail(meta, end.error);
  } catch (error) {
    if (error.name === "AbortError") { setText(meta, "stopped"); isWhole = Boolean(written); }
    else fail(meta, error instanceof Refusal ? error.message : "The connection to the server was lost.");
  }
  message.classList.remove("writing");
  if (isChat && isWhole) history.push({ role: "user", content: text }, { role: "assistant", content: written });
  else if (!isWhole && !byId("prompt").value) byId("prompt").value = text; // to be sent again
  control = null;
  byId("stop").hidden = true; byId("send").hidden = false;
  follow();
}

function fail(meta, text) { meta.classList.add("error"); setText(meta, text); }

function anew() {
  control?.abort();
  history = [];
  for (const message of document.querySelectorAll(".message")) message.remove();
  byId("hello").hidden = false;
  byId("prompt").focus();
}

// The server answers: what it serves, and how it wants to be asked.
async function prepare() {
  isReady = true;
  const models = await servedModels().catch(() => []);
  if (!models.length) { isReady = false; return; }
  byId("model").replaceChildren(...models.map((name) => new Option(name)));
  if (recallSettings()) { keepSettings(); return; }
  if (await hasChatTemplate(models[0]) === false) byId("kind").value = "text";
  keepSettings();
}

function showMine(frame) {
  const mine = frame.requests.filter((row) => row.mine), size = frame.block_size;
  const slots = mine.reduce((sum, row) => sum + row.slots, 0), computed = mine.reduce((sum, row) => sum + row.computed, 0);
  const blocks = Math.ceil(slots / size);
  if (blocks) mostBlocks = numSent === lastSeen ? Math.max(mostBlocks, blocks) : blocks;
  if (blocks) lastSeen = numSent;
  setText(byId("blocks"), plain(blocks));
  const waits = mine.some((row) => row.state === "waiting");
  setText(byId("slots"), slots ? `${plain(Math.min(computed, slots))} of ${plain(slots)} slots filled` : waits ? "waiting for room" : mostBlocks ? `the last request had ${plain(mostBlocks)}` : "no request runs");
  const { classes } = frame, all = Object.values(classes).reduce((sum, value) => sum + value, 0);
  setText(byId("used"), `${((100 * (classes.token_states + classes.reservation + classes.internal)) / all).toFixed(1)} %`);
  setText(byId("running"), `${plain(frame.running)} running, ${plain(frame.waiting)} waiting`);
}

watch((frame) => {
  if (!isReady) prepare();
  showAbout(frame);
  setText(byId("shape"), `${plain(frame.num_blocks)} blocks of ${frame.block_size} slots`);
  map.draw(frame);
  showMine(frame);
}, OWN);
byId("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("prompt").value;
  if (control) return;
  byId("prompt").value = "";
  send(text);
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("compose").requestSubmit();
});
byId("stop").addEventListener("click", () => control?.abort());
byId("anew").addEventListener("click", anew);
byId("settings").addEventListener("change", keepSettings);
byId("settings").addEventListener("submit", (event) => event.preventDefault());
for (const text of TRIES) {
  const one = element("button", "", text);
  one.type = "button";
  one.addEventListener("click", () => send(text));
  byId("tries").append(one);
}
byId("system-label").hidden = byId("kind").value !== "chat";
