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

// The server says of every change which page made it: others' can be told apart from this page's own.
const PAGE = crypto.randomUUID();
let flying = 0, others = false, foreign = () => {}, turn = 0;

async function send(method, path, body, more = {}) {
  flying++;
  try {
    const headers = { "Content-Type": "application/json", "X-Page": PAGE, ...more };
    return await (await ask(path, { method, body, headers })).json();
  } finally {
    flying--;
    settle();
  }
}

// Work on the edit that is not sent yet: what others do waits for it.
export async function holding(call) {
  flying++;
  try { return await call(); } finally { flying--; settle(); }
}

// Whether this page is at work itself; then `changed` is called again once it is not.
export function occupied() {
  others ||= flying > 0;
  return flying > 0;
}

function settle() {
  if (flying || !others) return;
  others = false;
  foreign();
}

// Small changes go one after the other, in the order in which they were made.
let line = Promise.resolve();
function queue(...given) {
  const sent = line.then(() => send(...given));
  line = sent.catch(() => {});
  return sent;
}

// An edit goes at once; of two, the server takes the one that was sent later.
const edited = (method, path, body) => send(method, path, body, { "X-Turn": String(++turn) });

export const state = async () => (await ask("/api/state")).json();
export const layers = async () => (await ask("/api/layers")).json();
export const differences = async (rows) => (await ask(`/api/differences?rows=${rows.join(",")}`)).json();
export const fit = (wanted) => edited("POST", "/api/fit", JSON.stringify(wanted));
export const measure = () => send("POST", "/api/measure");
export const drop = () => send("DELETE", "/api/fit");
export const saveEdit = (edit) => edited("PUT", "/api/edit", JSON.stringify(edit));
export const saveSettings = (changed) => queue("PUT", "/api/settings", JSON.stringify(changed));
export const search = (selection, top) => send("POST", "/api/search", JSON.stringify({ selection, top }));
export const keep = (name) => send("POST", "/api/rules", JSON.stringify({ name }));
export const changeRule = (number, changed) => queue("PATCH", `/api/rules/${number}`, JSON.stringify(changed));
export const takeOff = (number) => queue("DELETE", `/api/rules/${number}`);
export const orderRules = (numbers) => queue("PUT", "/api/rules/order", JSON.stringify(numbers));
export const loadRule = (name, data) =>
  send("POST", `/api/rules/file?name=${encodeURIComponent(name)}`, data, { "Content-Type": "application/octet-stream" });
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
    if (event.kind === "state" && event.by !== PAGE) { others = true; settle(); }
    heard(event);
  };
  return source;
}
