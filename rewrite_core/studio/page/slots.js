// The edit: what lies in copy, paste and context, each a picture with its selection.
import * as api from "./api.js";
import { Mask } from "./mask.js";

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
    return this.copy.length > 0 && this.paste.length > 0;
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
    entry.holder = document.createElement("span");
    entry.holder.className = "holder";
    entry.holder.append(entry.card, off);
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

  async redraw(entry) {
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

  mark(active) {
    for (const entry of this.all()) entry.card.setAttribute("aria-current", entry === active);
  }

  // The edit as the reference implementation's JSON.
  edit() {
    const record = {}, pair = (entry) => [entry.row, entry.url];
    if (this.copy.length) record.object = pair(this.copy[0]);
    if (this.paste.length === 1) record.paste = pair(this.paste[0]);
    else if (this.paste.length) record.paste = this.paste.map(pair);
    if (this.context.length) record.key = this.context.map(pair);
    return record;
  }

  async load(record) {
    for (const entry of this.all()) this.take(entry);
    for (const [slot, field] of Object.entries(FIELDS)) {
      const value = record[field];
      if (!value) continue;
      for (const [row, url] of Array.isArray(value[0]) ? value : [value]) {
        await this.put(slot, { row, mask: await Mask.of(url, ...this.size()) });
      }
    }
  }

  // Another entry with the same selection.
  async again(slot, entry) {
    const { width, height } = entry.mask.canvas;
    await this.put(slot, { row: entry.row, mask: await Mask.of(entry.url, width, height) });
  }
}
