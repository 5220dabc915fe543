// The server's events, and what a page says of its connection: live, lost, or in want of a key.
const SILENCE = 1500; // ms without a sign of life: the numbers are old
const GIVE_UP = 6000; // ms without one: connect anew
const KEY = "kvarena-key";

export const byId = (id) => document.getElementById(id);
export function setText(element, value) { if (element.textContent !== value) element.textContent = value; }
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className; made.textContent = text;
  return made;
}

// Headers with the key that was typed. One that no header can hold is no key of any server.
export function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key && /^[\x20-\x7e]+$/.test(key) ? { Authorization: "Bearer " + key } : {};
}

export function askForKey() {
  const known = sessionStorage.getItem(KEY);
  setText(byId("login-text"), known ? "The server does not accept this API key." : "This server asks for an API key.");
  byId("login").hidden = false;
  say("lost", known ? "wrong key" : "a key is needed");
}

function say(kind, text) {
  const state = byId("state");
  state.className = "state " + kind;
  setText(state, text);
  document.body.classList.toggle("stale", kind !== "live");
}

// Of a server with several engines, the one that the page's address names; else the first.
function engine() { return new URLSearchParams(location.search).get("engine") ?? "0"; }

// Links to each engine's page, where there are several.
function offerEngines({ num_engines: count, engine: shown }) {
  const place = byId("engines");
  if (count < 2 || place.children.length === count) return;
  place.replaceChildren(...Array.from({ length: count }, (_, number) => {
    const link = element("a", "", `engine ${number}`);
    link.href = `${location.pathname.split("/").pop() || "./"}?engine=${number}`;
    if (number === shown) link.setAttribute("aria-current", "page");
    return link;
  }));
}

// Calls `onFrame` with each frame, for ever. `mine`: what the ids of this page's own requests start with.
export function watch(onFrame, mine = "") {
  let running = false, beatAt = 0, frameAt = 0, control = null;

  async function connect() {
    control = new AbortController();
    const key = sessionStorage.getItem(KEY);
    const url = "dashboard/events?" + new URLSearchParams({ engine: engine(), ...(mine && { mine }) });
    const response = await fetch(url, { headers: authorization(), signal: control.signal, cache: "no-store" });
    if (response.status === 401) {
      if (sessionStorage.getItem(KEY) !== key) return true; // another key was typed meanwhile: it has its turn
      askForKey();
      return false;
    }
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      throw new Error(body?.error?.message || "the server answers " + response.status);
    }
    byId("login").hidden = true;
    beatAt = frameAt = performance.now();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("connection lost");
      beatAt = performance.now();
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        frameAt = beatAt;
        say("live", "live");
        const frame = JSON.parse(event.slice(6));
        offerEngines(frame);
        onFrame(frame);
      }
    }
  }

  async function loop() {
    if (running) return;
    running = true;
    for (;;) {
      try { if (!await connect()) break; } catch (error) {
        beatAt = 0;
        say("lost", error instanceof TypeError || error.name === "AbortError" ? "connection lost" : error.message);
      }
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
    running = false;
    beatAt = 0;
  }

  setInterval(() => {
    if (!beatAt) return;
    const now = performance.now();
    if (now - beatAt > SILENCE) say("lost", "connection lost");
    else if (now - frameAt > SILENCE) say("lost", `nothing new for ${Math.round((now - frameAt) / 1000)} s`);
    if (now - beatAt > GIVE_UP) control.abort();
  }, 200);
  byId("login").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, byId("key").value.trim());
    byId("key").value = "";
    say("lost", "connecting");
    loop();
  });
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) { sessionStorage.setItem(KEY, given); history.replaceState(null, "", location.pathname); }
  loop();
}

// Model and strategy, in the page's head.
export function showAbout(frame) {
  const { model, allocator, scheduler, dtype } = frame.about, place = byId("about");
  const parts = [allocator && scheduler ? `${allocator} × ${scheduler}` : "", dtype || ""];
  const key = [model, ...parts].join(" · ");
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  place.replaceChildren(element("b", "", model), ...parts.filter(Boolean).map((part) => ` · ${part}`));
}
