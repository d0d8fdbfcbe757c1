// The edit: what lies in copy, paste and context, each a picture with its selection.
import * as api from "./api.js";
import { keyed } from "./keyed.js";
import { Mask } from "./mask.js";

let keys = 0; // of cards
const placed = (entries) => entries.filter((entry) => entry.url);
const FIELDS = { copy: "object", paste: "paste", context: "key" }; // in the edit's JSON

export class Slots {
  // `opened(entry)` when a card is chosen, `removed(entry)` when one is taken out, `full()` says how large masks are.
  constructor({ opened, removed, size }) {
    this.opened = opened;
    this.removed = removed;
    this.size = size;
    this.copy = [];
    this.paste = [];
    this.context = [];
  }

  all() {
    return [...this.copy, ...this.paste, ...this.context];
  }

  get complete() {
    return placed(this.copy).length > 0 && placed(this.paste).length > 0;
  }

  async put(slot, entry) {
    if (slot === "copy") for (const old of [...this.copy]) this.take(old);
    entry.slot = slot;
    this[slot].push(entry);
    entry.card = document.createElement("button");
    entry.card.type = "button";
    entry.card.className = "card";
    entry.card.setAttribute("aria-label", `${slot}: picture ${entry.row}`);
    entry.card.append(document.createElement("canvas"));
    entry.card.addEventListener("click", () => this.opened(entry));
    const off = document.createElement("button");
    off.type = "button";
    off.className = "off";
    off.textContent = "×";
    off.setAttribute("aria-label", `Take picture ${entry.row} out of ${slot}`);
    off.addEventListener("click", () => this.removed(entry));
    entry.key = String(++keys);
    entry.holder = document.createElement("span");
    entry.holder.className = "holder";
    entry.holder.append(entry.card, off);
    entry.holder.dataset.key = entry.key;
    this.box(slot).append(entry.holder);
    await this.redraw(entry);
  }

  box(slot) {
    return document.querySelector(`[data-slot=${slot}] .cards`);
  }

  take(entry) {
    this[entry.slot] = this[entry.slot].filter((each) => each !== entry);
    entry.holder.remove();
  }

  // The selection has changed. What it is now goes to the server before its card is drawn.
  async redraw(entry) {
    entry.url = entry.mask.url();
    entry.bitmap ??= await api.picture(entry.row, 112, { original: true });
    setTimeout(() => this.draw(entry));
  }

  draw(entry) {
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

  mark(active) {
    for (const entry of this.all()) entry.card.setAttribute("aria-current", entry === active);
  }

  // The edit as the reference implementation's JSON; what is still on its way into a slot comes with the next.
  edit() {
    const record = {}, pair = (entry) => [entry.row, entry.url];
    const [copy, paste, context] = [this.copy, this.paste, this.context].map(placed);
    if (copy.length) record.object = pair(copy[0]);
    if (paste.length === 1) record.paste = pair(paste[0]);
    else if (paste.length) record.paste = paste.map(pair);
    if (context.length) record.key = context.map(pair);
    return record;
  }

  // What a record holds: for each slot, rows and masks.
  async read(record) {
    const found = {};
    for (const [slot, field] of Object.entries(FIELDS)) {
      const value = record[field] ?? [], pairs = Array.isArray(value[0]) || !value.length ? value : [value];
      found[slot] = await Promise.all(pairs.map(async ([row, url]) => ({ row, mask: await Mask.of(url, ...this.size()) })));
    }
    return found;
  }

  // The slots hold what was read. Entries that are the same stay, with their strokes; the others go and come.
  async load(found) {
    const drawn = [];
    for (const slot of Object.keys(FIELDS)) {
      const old = [...this[slot]];
      const entries = found[slot].map((entry) => {
        const at = old.findIndex((each) => each.row === entry.row && each.mask.same(entry.mask));
        return at < 0 ? entry : old.splice(at, 1)[0];
      });
      for (const entry of old) this.take(entry);
      for (const entry of entries) if (!entry.card) drawn.push(this.put(slot, entry));
      this[slot] = entries;
      keyed(this.box(slot), entries, (entry) => entry.key, (entry) => entry.holder);
    }
    await Promise.all(drawn);
  }

  // Another entry with the same selection.
  async again(slot, entry) {
    const { width, height } = entry.mask.canvas;
    await this.put(slot, { row: entry.row, mask: await Mask.of(entry.url, width, height) });
  }
}
