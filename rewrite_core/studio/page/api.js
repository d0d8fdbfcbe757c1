// Requests to the studio's server. Every failure is one sentence, told to whoever asked.

export class Refused extends Error {}
export class Replaced extends Error {}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
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
const numbered = () => ({ "X-Turn": String(++turn) });

export const state = async () => (await ask("/api/state")).json();
export const layers = async () => (await ask("/api/layers")).json();
export const differences = async (rows) => (await ask(`/api/differences?rows=${rows.join(",")}`)).json();
export const measure = () => send("POST", "/api/measure");
export const drop = () => send("DELETE", "/api/fit");
export const saveEdit = (edit) => send("PUT", "/api/edit", JSON.stringify(edit), numbered());
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

// An edit is solved; what is told of the change, and then the pictures that were asked for, part by part. Whoever no
// longer wants the pictures may stop them once the change is told.
export async function fit(wanted, told, taken, stop) {
  flying++;
  let reader;
  try {
    const headers = { "Content-Type": "application/json", "X-Page": PAGE, ...numbered() };
    const options = { method: "POST", body: JSON.stringify(wanted), headers, signal: stop };
    reader = new Reader((await ask("/api/fit", options)).body);
    told(await reader.line());
  } finally {
    flying--;
    settle();
  }
  await takeAll(reader, taken);
}

// Pictures, part by part: `taken(numbers, pictures)` is called for each.
export async function pictures({ rows, side }, { original = false, strength = null }, taken, stop) {
  const { body } = await ask(`/api/pictures?${query(rows, side, original, strength)}`, { signal: stop });
  await takeAll(new Reader(body), taken);
}

const query = (rows, side, original, strength) =>
  `rows=${rows}&side=${side}${original ? "&original=1" : ""}${strength === null ? "" : `&strength=${strength}`}`;

async function takeAll(reader, taken) {
  for (let part; (part = await reader.line()) !== null;) {
    if (part.error) throw new Refused(part.error);
    const { rows, width, height } = part, size = 4 * width * height, pixels = await reader.bytes(size * rows.length);
    taken(rows, rows.map((_, i) => new ImageData(pixels.subarray(i * size, (i + 1) * size), width, height)));
  }
}

// Lines of JSON with bytes in between.
class Reader {
  constructor(body) {
    this.source = body.getReader();
    this.rest = new Uint8Array();
  }

  async more() {
    const { value, done } = await this.source.read();
    return done ? null : value;
  }

  async line() {
    for (let end; (end = this.rest.indexOf(10)) < 0;) {
      const found = await this.more();
      if (found === null) return null;
      const both = new Uint8Array(this.rest.length + found.length);
      both.set(this.rest);
      both.set(found, this.rest.length);
      this.rest = both;
    }
    const end = this.rest.indexOf(10), text = new TextDecoder().decode(this.rest.subarray(0, end));
    this.rest = this.rest.subarray(end + 1);
    return JSON.parse(text);
  }

  async bytes(count) {
    const whole = new Uint8ClampedArray(count);
    for (let at = 0; ;) {
      const taken = this.rest.subarray(0, count - at);
      whole.set(taken, at);
      this.rest = this.rest.subarray(taken.length);
      at += taken.length;
      if (at === count) return whole;
      this.rest = await this.more();
      if (this.rest === null) throw new Refused("The studio's server went away while it painted.");
    }
  }
}

// One picture, as a bitmap.
export async function picture(row, side, { original = false, strength = null } = {}) {
  return createImageBitmap(await (await ask(`/api/pictures.png?${query(row, side, original, strength)}`)).blob());
}

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
