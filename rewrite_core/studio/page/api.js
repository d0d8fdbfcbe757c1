// Requests to the studio's server. Every failure is one sentence, told to whoever asked.

export class Refused extends Error {}
export class Replaced extends Error {}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused("The studio's server does not answer; start it again with `rewrite studio`. Your work is kept.");
  }
  if (response.status === 409) throw new Replaced("A newer edit came first.");
  if (response.status === 403) throw new Refused((await response.text()).trim());
  if (!response.ok) throw new Refused((await response.json()).error);
  return response;
}

// The server counts its changes. Those that this page's own requests made are known, so that others' can be told apart.
const own = new Set();
let flying = 0, told = [], foreign = () => {};

async function send(method, path, body, type = "application/json") {
  flying++;
  try {
    const response = await ask(path, { method, body, headers: { "Content-Type": type } });
    const [before, after] = (response.headers.get("X-Versions") ?? "0 0").split(" ").map(Number);
    for (let version = before + 1; version <= after; version++) own.add(version);
    return await response.json();
  } finally {
    flying--;
    settle();
  }
}

function settle() {
  if (flying) return;
  const others = told.filter((version) => !own.has(version));
  told = [];
  if (others.length) foreign();
}

export const state = async () => (await ask("/api/state")).json();
export const layers = async () => (await ask("/api/layers")).json();
export const differences = async (rows) => (await ask(`/api/differences?rows=${rows.join(",")}`)).json();
export const fit = (wanted) => send("POST", "/api/fit", JSON.stringify(wanted));
export const measure = () => send("POST", "/api/measure");
export const drop = () => send("DELETE", "/api/fit");
export const saveEdit = (edit) => send("PUT", "/api/edit", JSON.stringify(edit));
export const saveSettings = (settings) => send("PUT", "/api/settings", JSON.stringify(settings));
export const search = (selection, top) => send("POST", "/api/search", JSON.stringify({ selection, top }));
export const keep = (name) => send("POST", "/api/rules", JSON.stringify({ name }));
export const arrange = (rules) => send("PUT", "/api/rules", JSON.stringify(rules));
export const loadRule = (name, data) =>
  send("POST", `/api/rules/file?name=${encodeURIComponent(name)}`, data, "application/octet-stream");
export const chooseLayer = (name) => send("PUT", "/api/layer", JSON.stringify({ name }));
export const scan = () => send("POST", "/api/scan");
export const cancel = () => send("POST", "/api/cancel");

// Pictures side by side in one PNG; `decoded` makes a bitmap of each, so that the next can be asked for meanwhile.
export async function sheet(rows, side, { original = false, strength = null } = {}) {
  const more = (original ? "&original=1" : "") + (strength === null ? "" : `&strength=${strength}`);
  return (await ask(`/api/pictures.png?rows=${rows.join(",")}&side=${side}${more}`)).blob();
}

export async function decoded(blob, count) {
  const whole = await createImageBitmap(blob), width = whole.width / count;
  return Promise.all(Array.from({ length: count }, (_, i) => createImageBitmap(whole, i * width, 0, width, whole.height)));
}

export const pictures = async (rows, side, how) => decoded(await sheet(rows, side, how), rows.length);

// `heard` gets every event; `changed` is called where another page, or a program, has changed something.
export function events(heard, changed) {
  foreign = changed;
  const source = new EventSource("/api/events");
  source.onmessage = (message) => {
    const event = JSON.parse(message.data);
    if (event.kind === "state") { told.push(event.version); settle(); }
    heard(event);
  };
  return source;
}
