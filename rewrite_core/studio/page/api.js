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

const send = async (method, path, body, type = "application/json") =>
  (await ask(path, { method, body, headers: { "Content-Type": type } })).json();

export const state = async () => (await ask("/api/state")).json();
export const layers = async () => (await ask("/api/layers")).json();
export const differences = async (rows) => (await ask(`/api/differences?rows=${rows.join(",")}`)).json();
export const fit = (wanted) => send("POST", "/api/fit", JSON.stringify(wanted));
export const drop = () => send("DELETE", "/api/fit");
export const saveEdit = (edit) => send("PUT", "/api/edit", JSON.stringify(edit));
export const saveSettings = (settings) => send("PUT", "/api/settings", JSON.stringify(settings));
export const search = (selection, top) => send("POST", "/api/search", JSON.stringify({ selection, top }));
export const keep = (name) => send("POST", "/api/rules", JSON.stringify({ name }));
export const arrange = (rules) => send("PUT", "/api/rules", JSON.stringify(rules));
export const loadRule = (name, data) =>
  send("POST", `/api/rules/file?name=${encodeURIComponent(name)}`, data, "application/octet-stream");
export const chooseLayer = (name) => send("PUT", "/api/layer", JSON.stringify({ name }));
export const cancel = () => send("POST", "/api/cancel");

// Pictures side by side in one PNG, as a bitmap each.
export async function pictures(rows, side, { original = false, strength = null } = {}) {
  const more = (original ? "&original=1" : "") + (strength === null ? "" : `&strength=${strength}`);
  const blob = await (await ask(`/api/pictures.png?rows=${rows.join(",")}&side=${side}${more}`)).blob();
  const sheet = await createImageBitmap(blob);
  const width = sheet.width / rows.length;
  return Promise.all(rows.map((_, i) => createImageBitmap(sheet, i * width, 0, width, sheet.height)));
}

export function events(heard) {
  const source = new EventSource("/api/events");
  source.onmessage = (message) => heard(JSON.parse(message.data));
  return source;
}
