// The page: puts editor, slots, gallery and rules together. What a person does is sent to the server as they go.
import * as api from "./api.js";
import { Editor, Mask } from "./editor.js";
import { Gallery } from "./gallery.js";
import { Rules } from "./rules.js";

const $ = (id) => document.getElementById(id);
const FIELDS = { copy: "object", paste: "paste", context: "key" };
const MOST_SEARCHED = 24;

let shop; // what the server says
let row = 0; // the picture in the editor
let picture; // its bitmap
let free; // {row, mask}: a selection that is in no slot yet
let active = null; // the slot entry that is drawn on, or null
let matches = null; // of the last search
const slots = { copy: [], paste: [], context: [] }; // entries {row, mask, url, card}

// --- telling

function toast(error) {
  if (error instanceof api.Replaced) return;
  const line = document.createElement("p");
  line.textContent = error.message ?? String(error);
  $("toasts").append(line);
  setTimeout(() => line.remove(), 9000);
}

const doing = (call) => async (...given) => {
  try { return await call(...given); } catch (error) { toast(error); }
};

const editor = new Editor($("canvas"), doing(strokeEnded));
const gallery = new Gallery($("tiles"), $("more"), doing(open), toast);
const rules = new Rules($("rules"), $("rules-empty"), { changed: doing(arrange) });

// --- pictures

let opening = 0; // of several pictures asked for, the last is shown

async function open(number, entry = null) {
  const turn = ++opening;
  const side = Math.min(1024, Math.max(shop.width, shop.height));
  const [found] = await api.pictures([number], side, { original: true });
  if (turn !== opening) return;
  [row, active, picture] = [number, entry, found];
  if (!entry && free?.row !== row) free = { row, mask: new Mask(...Editor.maskSize(shop.width, shop.height)) };
  present();
}

function present() {
  const mask = active ? active.mask : free.mask;
  editor.map = shop.map;
  editor.show(picture, mask, active ? active.slot : "free");
  $("goto").value = row;
  $("picture-name").textContent = active ? `the ${active.slot}` : "";
  document.body.dataset.row = row;
  gallery.mark(row);
  for (const entry of all()) entry.card.setAttribute("aria-current", entry === active);
  enable();
}

const all = () => Object.values(slots).flat();
const current = () => (active ? active.mask : free?.mask);

function enable() {
  const none = !current() || current().empty;
  for (const id of ["use-copy", "use-paste", "use-context", "find", "clear"]) $(id).disabled = none;
  $("undo").disabled = !current()?.strokes.length;
  $("redo").disabled = !current()?.undone.length;
  $("rewrite").disabled = !(slots.copy.length && slots.paste.length);
  $("erase").disabled = !slots.paste.length;
  $("zero").disabled = !(slots.paste.length || slots.context.length);
  $("spread").hidden = !(slots.copy.length && slots.context.length);
  lead();
}

async function strokeEnded() {
  performance.mark("released");
  enable();
  if (active) {
    if (active.mask.empty) return remove(active);
    await redraw(active);
    await editChanged();
  }
}

// --- slots

async function put(slot, entry) {
  if (slot === "copy") for (const old of [...slots.copy]) remove(old, false);
  entry.slot = slot;
  slots[slot].push(entry);
  entry.card = document.createElement("button");
  entry.card.type = "button";
  entry.card.className = "card";
  entry.card.setAttribute("aria-label", `${slot}: picture ${entry.row}`);
  entry.card.append(document.createElement("canvas"));
  entry.card.addEventListener("click", doing(() => open(entry.row, entry)));
  const off = document.createElement("button");
  off.type = "button";
  off.className = "off";
  off.textContent = "×";
  off.setAttribute("aria-label", `Take picture ${entry.row} out of ${slot}`);
  off.addEventListener("click", doing(() => remove(entry)));
  entry.holder = document.createElement("span");
  entry.holder.className = "holder";
  entry.holder.append(entry.card, off);
  document.querySelector(`[data-slot=${slot}] .cards`).append(entry.holder);
  await redraw(entry);
}

async function redraw(entry) {
  entry.url = await entry.mask.url();
  entry.bitmap ??= (await api.pictures([entry.row], 112, { original: true }))[0];
  const canvas = entry.card.firstChild, context = canvas.getContext("2d");
  canvas.width = entry.bitmap.width;
  canvas.height = entry.bitmap.height;
  context.drawImage(entry.bitmap, 0, 0);
  const tint = new OffscreenCanvas(canvas.width, canvas.height), inner = tint.getContext("2d");
  inner.drawImage(entry.mask.canvas, 0, 0, canvas.width, canvas.height);
  inner.globalCompositeOperation = "source-in";
  inner.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${entry.slot}`);
  inner.fillRect(0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.55;
  context.drawImage(tint, 0, 0);
  context.globalAlpha = 1;
}

async function remove(entry, send = true) {
  slots[entry.slot] = slots[entry.slot].filter((each) => each !== entry);
  entry.holder.remove();
  if (active === entry) await open(entry.row);
  if (send) await editChanged();
}

// The selection that is drawn goes into a slot; a copy of it where it is in one already.
async function use(slot) {
  const mask = current();
  if (!mask || mask.empty) return;
  let entry;
  if (active) entry = { row: active.row, mask: await Mask.of(active.url, mask.canvas.width, mask.canvas.height) };
  else { entry = free; free = { row, mask: new Mask(mask.canvas.width, mask.canvas.height) }; }
  const placed = put(slot, entry);
  active = entry;
  present();
  await placed;
  await editChanged();
}

function edit() {
  const record = {};
  const pair = (entry) => [entry.row, entry.url];
  if (slots.copy.length) record.object = pair(slots.copy[0]);
  if (slots.paste.length === 1) record.paste = pair(slots.paste[0]);
  else if (slots.paste.length) record.paste = slots.paste.map(pair);
  if (slots.context.length) record.key = slots.context.map(pair);
  return record;
}

async function editChanged() {
  enable();
  if ($("live").checked && slots.copy.length && slots.paste.length) await fit("rewrite");
  else await api.saveEdit(edit());
}

async function loadEdit(record) {
  for (const entry of all()) entry.holder.remove();
  for (const slot of Object.keys(slots)) slots[slot] = [];
  active = null;
  const size = Editor.maskSize(shop.width, shop.height);
  for (const [slot, field] of Object.entries(FIELDS)) {
    const value = record[field];
    if (!value) continue;
    for (const [index, url] of Array.isArray(value[0]) ? value : [value]) {
      await put(slot, { row: index, mask: await Mask.of(url, ...size) });
    }
  }
  enable();
}

// --- fitting

const settings = () => ({
  rank: Number($("rank").value) || 1, preserve: Number($("preserve").value) || 0, loss: $("loss").value,
  region: $("region").value, strength: Number($("strength").value),
});

async function fit(kind) {
  $("report").textContent = "Rewriting …";
  let report;
  try {
    report = await api.fit({ kind, edit: edit(), settings: settings() });
  } catch (error) {
    if (!(error instanceof api.Replaced)) { $("report").textContent = error.message; $("report").className = "warn"; }
    return;
  }
  tell(report);
  await gallery.refresh();
}

function tell(report) {
  $("keep").hidden = $("drop").hidden = !report;
  $("report").className = "";
  if (!report) { $("report").textContent = "Draw a copy, a paste and a context; the gallery follows."; return; }
  const seconds = Object.values(report.seconds).reduce((a, b) => a + b, 0);
  const lines = [`Rank ${report.rank} at ${report.layer} in ${(1000 * seconds).toFixed(0)} ms.`];
  if (report.pictures) {
    const { inside, outside } = report.pictures;
    if (inside < 0.004) lines.push("The pasted places hardly changed: try another layer, a higher rank or more strength.");
    else if (outside > 0.5 * inside) lines.push("Much changes around the pasted places too: draw a larger context, or raise preserve.");
    else lines.push("The pasted places changed, and little around them.");
  }
  if (report.size > 1) {
    lines.push(`The change is ${report.size.toFixed(1)} times the layer's own weight: pictures may break. Lower the rank, or set preserve to 0.3.`);
    $("report").className = "warn";
  } else if (report.size != null) lines.push(`Size of the change: ${report.size.toFixed(2)} of the layer's weight.`);
  lines.push(...report.warnings);
  $("report").textContent = lines.join(" ");
}

let painting = false, wanted = null;
async function strengthMoved() {
  const value = Number($("strength").value);
  $("strength-shown").textContent = value.toFixed(2);
  wanted = value;
  if (painting) return;
  painting = true;
  while (wanted !== null) {
    gallery.strength = wanted;
    wanted = null;
    await gallery.refresh();
    document.body.dataset.drags = String(Number(document.body.dataset.drags ?? 0) + 1);
  }
  painting = false;
}

// --- search

async function find() {
  const mask = current();
  if (!mask || mask.empty) return;
  matches = await api.search([row, await mask.url()], MOST_SEARCHED);
  matches.url = await mask.url();
  $("order").value = "matches";
  await reorder();
}

async function addTen() {
  const size = Editor.maskSize(shop.width, shop.height);
  for (let i = 0, added = 0; i < matches.rows.length && added < 10; i++) {
    const mask = new Mask(...size);
    const heat = matches.heat[i], high = Math.max(...heat.flat());
    const [down, across] = [size[1] / heat.length, size[0] / heat[0].length];
    heat.forEach((line, y) => line.forEach((value, x) => {
      if (value >= Math.max(0.6 * high, Math.min(matches.level, high))) {
        mask.add({ kind: "box", points: [[x * across, y * down], [(x + 1) * across, (y + 1) * down]] });
      }
    }));
    if (mask.empty || slots.context.some((entry) => entry.row === matches.rows[i])) continue;
    await put("context", { row: matches.rows[i], mask });
    added++;
  }
  await editChanged();
}

async function spread() {
  const [copy] = slots.copy;
  for (const entry of [...slots.context]) {
    if (entry.row === copy.row || slots.paste.some((paste) => paste.row === entry.row)) continue;
    await put("paste", { row: entry.row, mask: await Mask.of(entry.url, entry.mask.canvas.width, entry.mask.canvas.height) });
  }
  await editChanged();
}

async function reorder() {
  const order = $("order").value;
  $("add-ten").hidden = !(order === "matches" && matches);
  if (order === "matches" && matches) {
    gallery.order(matches.rows, new Map(matches.rows.map((number, i) => [number, matches.heat[i]])));
    return;
  }
  let numbers = Array.from({ length: shop.pictures }, (_, i) => i);
  if (order === "changed" || order === "spilled") {
    const looked = numbers.slice(0, 200);
    const amounts = new Map((await api.differences(looked)).map((amount, i) => [looked[i], amount]));
    const mine = new Set(all().map((entry) => entry.row));
    numbers = looked.filter((number) => order === "changed" || !mine.has(number));
    numbers.sort((a, b) => amounts.get(b) - amounts.get(a));
  }
  gallery.order(numbers);
}

// --- rules, layers, files

async function arrange(wantedRules) {
  await api.arrange(wantedRules);
  await synchronise();
  await gallery.refresh();
}

async function keep() {
  await api.keep(`picture ${slots.copy[0]?.row ?? slots.paste[0]?.row ?? ""} at ${shop.layer}`);
  await synchronise();
  await gallery.refresh();
}

async function synchronise() {
  shop = await api.state();
  rules.show(shop.rules, shop.conflicts);
  tell(shop.live && Object.keys(shop.live).length ? shop.live : null);
  $("where").textContent = `${shop.name} · ${shop.pictures} pictures of ${shop.width} × ${shop.height}`;
  $("layer-name").textContent = `${shop.layer} (${shop.map.join(" × ")})`;
  editor.map = shop.map;
  editor.reached = null;
}

async function showLayers() {
  const box = $("layers");
  box.replaceChildren();
  for (const layer of await api.layers()) {
    const button = document.createElement("button");
    button.type = "button";
    button.role = "option";
    button.setAttribute("aria-selected", layer.name === shop.layer);
    if (layer.name === shop.layer) button.setAttribute("aria-pressed", "true");
    const name = document.createElement("span"), size = document.createElement("span");
    name.textContent = layer.name;
    size.textContent = `${layer.map.join("×")}${layer.ready ? "" : " · to be collected"}`;
    button.append(name, size);
    button.addEventListener("click", doing(async () => {
      await api.chooseLayer(layer.name);
      await synchronise();
      await showLayers();
      present();
      if (slots.copy.length && slots.paste.length) await fit("rewrite");
      else await gallery.refresh();
    }));
    box.append(button);
  }
}

function heard(event) {
  if (event.kind === "progress") {
    $("progress").hidden = event.done >= event.total;
    $("progress").querySelector("progress").value = event.done / event.total;
    $("progress").querySelector("span").textContent = `${event.what}: ${event.done} of ${event.total}`;
  } else if ((event.kind === "state" || event.kind === "hello") && shop && event.version > shop.version + 1) {
    synchronise().then(() => gallery.refresh()); // another page works here too
  }
}

async function takeFile(file) {
  if (file.name.endsWith(".json")) {
    const text = await file.text();
    let record;
    try { record = JSON.parse(text); } catch { throw new api.Refused(`${file.name} is no JSON.`); }
    await api.saveEdit(record);
    await loadEdit(record);
    await editChanged();
  } else {
    await api.loadRule(file.name.replace(/\.safetensors$/, ""), await file.arrayBuffer());
    await synchronise();
    await gallery.refresh();
  }
}

// --- the first visit

function lead() {
  const seen = localStorage.getItem("rewrite-studio-led");
  const step = !slots.copy.length ? 1 : !slots.paste.length ? 2 : !slots.context.length ? 3 : 4;
  const words = {
    1: "1 of 3. Choose a picture in the gallery, draw around something you like, and press “Copy this”. Draw generously.",
    2: "2 of 3. Choose another picture, draw where it should go, and press “Paste here”. The gallery follows at once.",
    3: "3 of 3. With the pasted place still marked, press “Find matches”, then “Add the first 10”: the places that share the rule.",
    4: "Every picture that this generator makes now follows your rule. Move the strength, or keep it as a rule.",
  };
  $("lead").hidden = Boolean(seen);
  if (seen) return;
  $("lead").replaceChildren(words[step]);
  const done = document.createElement("button");
  done.type = "button";
  done.textContent = step === 4 ? "Done" : "Hide";
  done.addEventListener("click", () => { localStorage.setItem("rewrite-studio-led", "1"); $("lead").hidden = true; });
  $("lead").append(done);
}

// --- controls

const on = (id, event, call) => $(id).addEventListener(event, doing(call));

function chooseTool(tool) {
  editor.setTool(tool);
  for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-checked", button.dataset.tool === tool);
}
for (const button of document.querySelectorAll("[data-tool]")) button.addEventListener("click", () => chooseTool(button.dataset.tool));

async function step(back) {
  if (back ? current()?.undo() : current()?.redo()) { editor.reached = null; editor.paint(); await strokeEnded(); }
}

async function clear() {
  const mask = current();
  if (!mask) return;
  const { width, height } = mask.canvas;
  mask.add({ kind: "box", points: [[0, 0], [width, height]], less: true });
  editor.reached = null;
  editor.paint();
  await strokeEnded();
}

on("undo", "click", () => step(true));
on("redo", "click", () => step(false));
on("clear", "click", clear);
on("grid", "change", () => { editor.showGrid = $("grid").checked; editor.paint(); });
on("brush-size", "input", () => { editor.size = Number($("brush-size").value); });
on("use-copy", "click", () => use("copy"));
on("use-paste", "click", () => use("paste"));
on("use-context", "click", () => use("context"));
on("find", "click", find);
for (const [event, held] of [["pointerdown", true], ["pointerup", false], ["pointerleave", false], ["keydown", true], ["keyup", false]]) {
  $("originals").addEventListener(event, (e) => { if (!e.key || e.key === "Enter" || e.key === " ") gallery.hold(held); });
}
on("add-ten", "click", addTen);
on("spread", "click", spread);
on("rewrite", "click", () => fit("rewrite"));
on("erase", "click", () => fit("erase"));
on("zero", "click", () => fit("zero"));
on("drop", "click", async () => { await api.drop(); await synchronise(); await gallery.refresh(); });
on("keep", "click", keep);
on("strength", "input", strengthMoved);
on("strength", "change", async () => { await api.saveSettings(settings()); });
for (const id of ["rank", "preserve", "loss", "region"]) on(id, "change", () => editChanged());
on("view", "change", () => gallery.setView($("view").value));
on("order", "change", reorder);
on("zoom", "input", () => gallery.resize(Number($("zoom").value)));
on("layer-strip", "toggle", async () => { if ($("layer-strip").open) await showLayers(); });
on("cancel", "click", () => api.cancel());
on("goto", "change", () => open(Math.min(shop.pictures - 1, Math.max(0, Math.round(Number($("goto").value) || 0)))));
on("help", "click", () => $("keys").showModal());
on("load-edit", "change", async (event) => { await takeFile(event.target.files[0]); event.target.value = ""; });
on("load-rule", "change", async (event) => { await takeFile(event.target.files[0]); event.target.value = ""; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", doing(async (event) => {
  event.preventDefault();
  for (const file of event.dataTransfer.files) await takeFile(file);
}));

const KEYS = {
  l: () => chooseTool("lasso"), g: () => chooseTool("polygon"), r: () => chooseTool("box"), b: () => chooseTool("brush"),
  c: () => use("copy"), p: () => use("paste"), x: () => use("context"), f: find,
  "[": () => { $("brush-size").value = editor.size = Math.max(1, editor.size - 4); },
  "]": () => { $("brush-size").value = editor.size = Math.min(64, editor.size + 4); },
  ",": () => open(Math.max(0, row - 1)), ".": () => open(Math.min(shop.pictures - 1, row + 1)), Delete: clear, Backspace: clear,
};
document.addEventListener("keydown", doing(async (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "range" && event.target.type !== "checkbox";
  if (typing || $("keys").open) return;
  const command = event.ctrlKey || event.metaKey;
  if (command && event.key.toLowerCase() === "z") { event.preventDefault(); return step(!event.shiftKey); }
  if (command && event.key === "Enter") { event.preventDefault(); return $("rewrite").disabled || fit("rewrite"); }
  if (command || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "o" && !event.repeat) return gallery.hold(true);
  if (key in KEYS) { event.preventDefault(); return KEYS[key](); }
}));
document.addEventListener("keyup", (event) => { if (event.key.toLowerCase() === "o") gallery.hold(false); });

// --- begin

doing(async () => {
  history.replaceState(null, "", "/"); // the token is in a cookie now, and out of sight
  await synchronise();
  document.body.style.setProperty("--shape", String(shop.width / shop.height));
  $("goto").max = shop.pictures - 1;
  document.body.classList.toggle("crisp", shop.width < 256);
  for (const id of ["rank", "preserve", "loss", "region", "strength"]) $(id).value = shop.settings[id];
  $("strength-shown").textContent = Number(shop.settings.strength).toFixed(2);
  await loadEdit(shop.edit);
  await open(slots.copy[0]?.row ?? 0, slots.copy[0] ?? null);
  await reorder();
  api.events(heard);
  document.body.dataset.ready = "1";
})();
