// The page: puts editor, slots, gallery and rules together. What a person does is sent to the server as they go.
import * as api from "./api.js";
import { Editor, Mask } from "./editor.js";
import { fill } from "./keyed.js";
import { Gallery, drawn } from "./gallery.js";
import { Layers } from "./layers.js";
import { lead } from "./lead.js";
import { Report } from "./report.js";
import { Rules } from "./rules.js";
import { Slots } from "./slots.js";

const $ = (id) => document.getElementById(id);
const MOST_SEARCHED = 24, MOST_SORTED = 200;
const AT_ONCE = 16; // pictures that are compared at once: an edit meanwhile waits for no more than these
const SETTINGS = ["rank", "preserve", "loss", "region", "objective", "units", "strength"];
const REST = 700; // milliseconds without a change before unseen pictures are looked at

let shop; // what the server says
let row = 0; // the picture in the editor
let picture; // its bitmap
let free; // {row, mask}: a selection that is in no slot yet
let active = null; // the slot entry that is drawn on, or null
let matches = null; // of the last search

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
const rules = new Rules($("rules"), $("rules-empty"), {
  changed: ruled(api.changeRule), ordered: ruled(api.orderRules), removed: ruled(api.takeOff),
});
const layers = new Layers($("layers"), doing(chooseLayer));
const report = new Report($("report"));
const slots = new Slots({
  opened: doing((entry) => open(entry.row, entry)), removed: doing(remove), size: () => Editor.maskSize(shop.width, shop.height),
});

// --- pictures

let opening = 0; // of several pictures asked for, the last is shown
let chosen = { number: 0, entry: null }; // what a person asked for last, on the page or on its way

async function open(number, entry = null) {
  chosen = { number, entry };
  const turn = ++opening;
  const found = await api.picture(number, largeSide(), { original: !$("edited").checked, strength: gallery.strength });
  if (turn !== opening) return;
  [row, active, picture] = [number, entry, found];
  if (!entry && free?.row !== row) free = { row, mask: new Mask(...Editor.maskSize(shop.width, shop.height)) };
  present();
}

const largeSide = () => Math.min(1024, Math.max(shop.width, shop.height));

// The large picture again, where it shows what the change does and does not come with the gallery's.
async function repaint() {
  if ($("edited").checked && gallery.large() === null) await open(chosen.number, chosen.entry);
}

const refresh = () => Promise.all([gallery.refresh(), repaint()]);

// Where the gallery's pictures are as large, the large one comes with them: it is not made twice.
gallery.large = () => (shop && $("edited").checked && gallery.pixels() === largeSide() ? chosen.number : null);
gallery.follows = (number, found) => {
  if (number !== row || chosen.entry !== active) return doing(open)(chosen.number, chosen.entry); // another is on its way
  opening++;
  picture = drawn(found);
  editor.show(picture, editor.mask, editor.kind);
};

function present() {
  const mask = active ? active.mask : free.mask;
  editor.map = shop.map;
  editor.show(picture, mask, active ? active.slot : "free");
  if (document.body.dataset.row !== String(row)) $("goto").value = $("goto").dataset.filled = row;
  $("picture-name").textContent = active ? `the ${active.slot}` : "";
  document.body.dataset.row = row;
  gallery.mark(row);
  slots.mark(active);
  enable();
}

const current = () => (active ? active.mask : free?.mask);

function enable() {
  const none = !current() || current().empty;
  for (const id of ["use-copy", "use-paste", "use-context", "find", "clear"]) $(id).disabled = none;
  $("carry").hidden = none;
  $("undo").disabled = !current()?.strokes.length;
  $("redo").disabled = !current()?.undone.length;
  $("rewrite").disabled = !slots.complete;
  $("scan").disabled = !slots.complete;
  $("erase").disabled = !slots.paste.length;
  $("zero").disabled = !(slots.paste.length || slots.context.length);
  $("fresh").hidden = !slots.all().length;
  $("spread").hidden = !(slots.copy.length && slots.context.length);
  lead($("lead"), slots, shop.name);
}

async function strokeEnded(mask, startTime = performance.now()) {
  performance.mark("released", { startTime });
  enable();
  const entry = active;
  if (entry?.mask.empty) return remove(entry);
  if (entry) await editing(() => slots.redraw(entry));
}

// --- slots

// A change of the slots, and what follows from it.
const editing = (change) => api.holding(async () => { await change(); await editChanged(); });

function remove(entry) {
  return editing(async () => {
    slots.take(entry);
    if (chosen.entry === entry) await open(entry.row);
  });
}

// The selection that is drawn goes into a slot; a copy of it where it is in one already.
const use = (slot) => editing(async () => {
  const mask = current(), { width, height } = mask.canvas;
  if (mask.empty) return;
  let entry;
  if (active) entry = { row: active.row, mask: await Mask.of(mask.url(), width, height) };
  else { entry = free; free = { row, mask: new Mask(width, height) }; }
  const placed = slots.put(slot, entry);
  active = entry;
  chosen = { number: entry.row, entry };
  present();
  await placed;
});

async function editChanged() {
  enable();
  if ($("live").checked && slots.complete) await fit("rewrite");
  else await api.saveEdit(slots.edit());
}

async function loadEdit(record) {
  const found = await slots.read(record);
  await slots.load(found);
  enable();
}

// --- fitting

const setting = (id) => ({
  rank: () => Number($("rank").value) || 1, preserve: () => Number($("preserve").value) || 0,
  strength: () => Number($("strength").value), units: () => Math.round(Number($("units").value)) || 1,
}[id]?.() ?? $(id).value);

// A setting that was changed, and no other: another page may have changed those.
const saveSetting = (id) => api.saveSettings({ [id]: setting(id) });

let busy = 0; // fits whose pictures are not there yet
async function fit(kind, edit = slots.edit()) {
  clearTimeout(resting);
  if (sorted()) { sorting++; $("sorted").hidden = true; } // later, when it rests
  document.body.toggleAttribute("data-busy", ++busy > 0);
  let repainted;
  try {
    await gallery.refresh({ through: (pictures, taken, stop, told) => api.fit({ kind, edit, pictures }, (found) => {
      told();
      tell(found);
      repainted = doing(repaint)();
    }, taken, stop) });
    await repainted;
  } catch (error) {
    if (!(error instanceof api.Replaced)) report.say(error.message, true);
  } finally {
    document.body.toggleAttribute("data-busy", --busy > 0);
  }
  rest();
}

function tell(found) {
  shop.live = found;
  $("keep").hidden = $("drop").hidden = !found;
  report.show(found);
}

// When nothing has changed for a while: what the change does to pictures that the edit does not name, and which have
// changed most.
let resting = 0;
function rest() {
  clearTimeout(resting);
  resting = setTimeout(doing(async () => {
    if (shop.live && shop.live.measured?.strength !== Number($("strength").value)) await look(shop.live);
    if (sorted()) await reorder(gallery.shown);
  }), REST);
}

async function look(found) {
  let measured;
  try { measured = await api.measure(); } catch (error) {
    if (!(error instanceof api.Replaced) && found === shop.live) report.say(error.message, true);
    return;
  }
  if (found === shop.live) { found.measured = measured; report.show(found); }
}

let painting = false, wanted = null, behind = 0; // calls until all that is seen is as strong as the slider says
const dragging = () => painting || $("strength").matches(":active");
async function strengthMoved() {
  const value = Number($("strength").value);
  $("strength-shown").textContent = value.toFixed(2);
  wanted = value;
  if (painting) return;
  painting = true;
  const count = (name) => { document.body.dataset[name] = String(Number(document.body.dataset[name] ?? 0) + 1); };
  try {
    while (wanted !== null || behind > 0) {
      if (wanted !== null) [gallery.strength, wanted, behind] = [wanted, null, Infinity];
      const [calls] = await Promise.all([gallery.follow(), repaint()]);
      behind = Math.min(behind, calls) - 1;
      count("drags");
      if (gallery.next === 0) count("rounds");
    }
  } finally {
    painting = false;
  }
}

// --- search

async function find() {
  const mask = current();
  if (!mask || mask.empty) return;
  matches = await api.search([row, mask.url()], MOST_SEARCHED);
  const order = $("order");
  order.querySelector("[value=matches]").disabled = false;
  order.value = "matches";
  await reorder();
}

const addTen = () => editing(async () => {
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
    await slots.put("context", { row: matches.rows[i], mask });
    added++;
  }
});

const spread = () => editing(async () => {
  const [copy] = slots.copy;
  for (const entry of [...slots.context]) {
    if (entry.row === copy.row || slots.paste.some((paste) => paste.row === entry.row)) continue;
    await slots.again("paste", entry);
  }
});

const sorted = () => /^(changed|spilled)$/.test($("order").value);
let sorting = 0; // of several orders asked for, the last is shown

// The gallery in the order that is chosen. `least`: no fewer pictures than these.
async function reorder(least) {
  const turn = ++sorting, order = $("order").value;
  $("sorted").hidden = true;
  $("add-ten").hidden = !(order === "matches" && matches);
  if (order === "matches" && matches) {
    gallery.order(matches.rows, new Map(matches.rows.map((number, i) => [number, matches.heat[i]])));
    return;
  }
  let numbers = Array.from({ length: shop.pictures }, (_, i) => i);
  if (sorted()) {
    const looked = numbers.slice(0, MOST_SORTED), amounts = new Map(), bar = $("sorted");
    try {
      for (let i = 0; i < looked.length; i += AT_ONCE) {
        [bar.hidden, bar.max, bar.value] = [false, looked.length, i];
        const part = looked.slice(i, i + AT_ONCE), found = await api.differences(part);
        if (turn !== sorting) return;
        part.forEach((number, j) => amounts.set(number, found[j]));
      }
    } finally {
      if (turn === sorting) bar.hidden = true;
    }
    const mine = new Set(slots.all().map((entry) => entry.row));
    numbers = looked.filter((number) => order === "changed" || !mine.has(number));
    numbers.sort((a, b) => amounts.get(b) - amounts.get(a));
  }
  if (least && numbers.every((number, i) => number === gallery.rows[i])) return;
  gallery.order(numbers, new Map(), least);
}

// --- rules, layers, files

// A change of the rules, and what follows from it. The page is brought up to date after the last of several.
let ruling = 0, rulesThrough = 0; // changes that were begun, and those that are through
function ruled(call) {
  return doing(async (...given) => {
    const turn = ++ruling;
    try { await call(...given); } finally { rulesThrough++; if (turn === ruling) await synchronise(); }
    if (turn === ruling) { await refresh(); rest(); }
  });
}

async function keep() {
  const from = slots.copy[0] ?? slots.paste[0];
  await api.keep(from ? `as in picture ${from.row}` : "");
  await synchronise();
  await refresh();
}

let asked = 0, answered = 0; // an answer that is older than one that is there is no news
async function synchronise() {
  const turn = ++asked, known = rulesThrough, found = await api.state();
  if (turn < answered) return;
  answered = turn;
  shop = found;
  if (known === ruling) rules.show(shop.rules, shop.conflicts); // else a change is on its way, and the answer without it
  tell(shop.live);
  $("where").textContent = `${shop.name} · ${shop.pictures} pictures of ${shop.width} × ${shop.height}`;
  $("layer-name").textContent = `${shop.layer} (${shop.map.join(" × ")})`;
  editor.map = shop.map;
  editor.reached = null;
}

async function showLayers() {
  layers.show(await api.layers(), shop.layer);
}

async function chooseLayer(name, rank) {
  await api.chooseLayer(name);
  if (rank) $("rank").value = rank;
  await synchronise();
  await showLayers();
  present();
  if (slots.complete) await fit("rewrite");
  else await refresh();
}

async function scan() {
  await api.saveEdit(slots.edit());
  $("scan").disabled = true;
  try {
    layers.found = new Map((await api.scan()).map((each) => [each.layer, each]));
    await showLayers();
  } finally {
    enable();
  }
}

function heard(event) {
  if (event.kind === "progress") {
    $("progress").hidden = event.done >= event.total;
    $("progress").querySelector("progress").value = event.done / event.total;
    $("progress").querySelector("span").textContent = `${event.what}: ${event.done} of ${event.total}`;
  }
}

// Another page works here too.
async function changedElsewhere() {
  await synchronise();
  const found = await slots.read(shop.edit);
  if (api.occupied()) return; // what this page is at goes first
  await slots.load(found);
  for (const id of SETTINGS) fill($(id), shop.settings[id]);
  if (!dragging()) { gallery.strength = null; $("strength-shown").textContent = Number(shop.settings.strength).toFixed(2); }
  if (chosen.entry && !slots.all().includes(chosen.entry)) await open(chosen.number);
  present();
  await refresh();
}

async function takeFile(file) {
  if (file.name.endsWith(".json")) {
    const text = await file.text();
    let record;
    try { record = JSON.parse(text); } catch { throw new api.Refused(`${file.name} is no JSON.`); }
    await api.saveEdit(record);
    await editing(async () => { await loadEdit(record); await open(row); });
  } else {
    await api.loadRule(file.name.replace(/\.safetensors$/, ""), await file.arrayBuffer());
    await synchronise();
    await refresh();
  }
}

// --- controls

const on = (id, event, call) => $(id).addEventListener(event, doing(call));

function chooseTool(tool) {
  editor.setTool(tool);
  for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-checked", button.dataset.tool === tool);
  $("size").hidden = tool !== "brush";
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
on("edited", "change", () => open(row, active));
on("fresh", "click", async () => {
  if (shop.live) await api.drop();
  await api.saveEdit({});
  await open(row);
  for (const entry of slots.all()) slots.take(entry); // when this shows, the server is through
  enable();
  await synchronise();
  await refresh();
});
on("grid", "change", () => { editor.showGrid = $("grid").checked; editor.paint(); });
on("brush-size", "input", () => { editor.size = Number($("brush-size").value); });
on("use-copy", "click", () => use("copy"));
on("use-paste", "click", () => use("paste"));
on("use-context", "click", () => use("context"));
on("find", "click", find);

// The selection is dragged into a slot, by mouse, pen or finger; the buttons and keys do the same.
function carry(event) {
  const grip = $("carry");
  const slot = document.elementFromPoint(event.clientX, event.clientY)?.closest(".slot");
  for (const each of document.querySelectorAll(".slot")) each.classList.toggle("over", each === slot && event.type === "pointermove");
  return event.type === "pointerup" && grip.hasPointerCapture(event.pointerId) ? slot?.dataset.slot : null;
}
on("carry", "pointerdown", (event) => $("carry").setPointerCapture(event.pointerId));
on("carry", "pointermove", (event) => { if ($("carry").hasPointerCapture(event.pointerId)) carry(event); });
on("carry", "pointercancel", carry);
on("carry", "pointerup", async (event) => { const slot = carry(event); if (slot) await use(slot); });
for (const [event, held] of [["pointerdown", true], ["pointerup", false], ["pointerleave", false], ["pointercancel", false], ["blur", false], ["keydown", true], ["keyup", false]]) {
  $("originals").addEventListener(event, (e) => { if (!e.key || e.key === "Enter" || e.key === " ") gallery.hold(held); });
}
on("add-ten", "click", addTen);
on("spread", "click", spread);
on("rewrite", "click", () => fit("rewrite"));
on("erase", "click", () => fit("erase"));
on("zero", "click", () => fit("zero"));
on("drop", "click", async () => { await api.drop(); await synchronise(); await refresh(); rest(); });
on("keep", "click", keep);
on("strength", "input", strengthMoved);
on("strength", "change", async () => {
  behind = 0; // all are painted now
  await saveSetting("strength");
  if (!dragging()) gallery.strength = null; // the server knows it
  await refresh();
  rest();
});
for (const id of ["rank", "preserve", "loss", "region", "objective", "units"]) on(id, "change", () => api.holding(async () => {
  await saveSetting(id);
  const kind = shop.live?.kind ?? "rewrite"; // what was erased is erased anew
  if (!$("live").checked || (id === "units" && kind !== "erase")) return;
  if (kind !== "rewrite" || slots.complete) await fit(kind, null);
}));
on("view", "change", () => gallery.setView($("view").value));
on("order", "change", () => reorder());
on("zoom", "input", () => gallery.resize(Number($("zoom").value)));
on("layer-strip", "toggle", async () => { if ($("layer-strip").open) await showLayers(); });
on("scan", "click", scan);
on("cancel", "click", () => api.cancel());
on("goto", "change", () => { delete document.body.dataset.row; return open(Math.min(shop.pictures - 1, Math.max(0, Math.round(Number($("goto").value) || 0)))); });
on("files", "toggle", () => { // of the pictures that are seen now
  const seen = gallery.visible();
  $("save-sheet").href = `/api/sheet.png?rows=${seen.slice(0, 16).join(",") || "0"}`;
  for (const kind of shop.films) $(kind === "gif" ? "save-walk" : "save-mp4").href = `/api/walk.${kind}?rows=${[row, ...seen.filter((each) => each !== row)].slice(0, 4).join(",")}`;
});
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
  ",": () => open(Math.max(0, chosen.number - 1)), ".": () => open(Math.min(shop.pictures - 1, chosen.number + 1)),
  Delete: clear, Backspace: clear,
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
window.addEventListener("blur", () => gallery.hold(false)); // the key may be let go elsewhere

// --- begin

doing(async () => {
  history.replaceState(null, "", "/"); // the token is in a cookie now, and out of sight
  await synchronise();
  document.body.style.setProperty("--shape", String(shop.width / shop.height));
  $("goto").max = shop.pictures - 1;
  $("save-mp4").hidden = !shop.films.includes("mp4");
  gallery.largest = Math.max(shop.width, shop.height);
  document.body.classList.toggle("crisp", shop.width < 256);
  for (const id of SETTINGS) fill($(id), shop.settings[id]);
  $("strength-shown").textContent = Number(shop.settings.strength).toFixed(2);
  await loadEdit(shop.edit);
  await open(slots.copy[0]?.row ?? 0, slots.copy[0] ?? null);
  await reorder();
  api.events(heard, doing(changedElsewhere));
  rest();
  document.body.dataset.ready = "1";
})();
