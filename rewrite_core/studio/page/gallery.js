// The gallery: tiles of pictures by number, in several views and orders, brought up to date as the edit changes.
import * as api from "./api.js";

const FIRST = 8, CHUNK = 24; // pictures asked for at once; the first of them on their own, so that some are there at once

export class Gallery {
  constructor(tiles, more, chosen, told) {
    this.box = tiles;
    this.chosen = chosen;
    this.told = told;
    this.rows = []; // the numbers to show, in order
    this.tiles = new Map(); // number -> element
    this.edited = new Map();
    this.original = new Map();
    this.heat = new Map();
    this.view = "edited";
    this.held = false; // whether originals are shown
    this.side = 96;
    this.run = 0;
    this.shown = 0;
    this.strength = null;
    new IntersectionObserver((entries) => entries.some((e) => e.isIntersecting) && this.extend(), { root: tiles, rootMargin: "300px" }).observe(more);
    tiles.append(more);
    this.more = more;
    setInterval(() => { if (this.view === "blink") { this.blink = !this.blink; this.paintAll(); } }, 500);
  }

  // Show these numbers, in this order.
  order(rows, heat = new Map()) {
    this.rows = rows;
    this.heat = heat;
    this.shown = 0;
    this.tiles.clear();
    this.box.replaceChildren(this.more);
    this.extend();
  }

  extend() {
    const next = this.rows.slice(this.shown, this.shown + CHUNK);
    if (!next.length) return;
    this.shown += next.length;
    for (const row of next) this.box.insertBefore(this.tile(row), this.more);
    this.load(next, this.run);
  }

  tile(row) {
    const tile = document.createElement("button");
    tile.type = "button";
    tile.className = "tile";
    tile.dataset.row = row;
    tile.setAttribute("aria-label", `picture ${row}`);
    const number = document.createElement("span");
    number.textContent = row;
    tile.append(document.createElement("canvas"), number);
    tile.addEventListener("click", () => this.chosen(row));
    this.tiles.set(row, tile);
    return tile;
  }

  mark(row) {
    for (const [number, tile] of this.tiles) tile.setAttribute("aria-current", number === row);
  }

  // Rows whose tiles can be seen, from the top; those beyond come later.
  visible() {
    const box = this.box.getBoundingClientRect();
    return this.rows.slice(0, this.shown).filter((row) => {
      const place = this.tiles.get(row)?.getBoundingClientRect();
      return place && place.bottom > box.top && place.top < box.bottom;
    });
  }

  // Ask for everything that is shown again: what is seen first, in two steps.
  async refresh() {
    const run = ++this.run;
    const seen = this.visible(), shown = this.rows.slice(0, this.shown);
    const rest = shown.filter((row) => !seen.includes(row));
    await this.load(seen.slice(0, FIRST), run);
    if (run === this.run) performance.mark("first");
    for (const part of [...chunks(seen.slice(FIRST), CHUNK), ...chunks(rest, CHUNK)]) {
      if (run !== this.run) return;
      await this.load(part, run);
    }
    if (run === this.run) { performance.mark("all"); document.body.dataset.painted = String(run); }
  }

  async load(rows, run) {
    if (!rows.length) return;
    try {
      const needed = rows.filter((row) => !this.original.has(row));
      const wantsOriginal = this.view !== "edited" || this.held;
      const [edited, original] = await Promise.all([
        api.pictures(rows, this.pixels(), { strength: this.strength }),
        wantsOriginal && needed.length ? api.pictures(needed, this.pixels(), { original: true }) : [],
      ]);
      needed.forEach((row, i) => original[i] && this.original.set(row, original[i]));
      if (run !== this.run) return;
      rows.forEach((row, i) => { this.edited.set(row, edited[i]); this.paint(row); });
    } catch (error) {
      this.told(error);
    }
  }

  pixels() {
    return Math.min(512, Math.round(this.side * (window.devicePixelRatio || 1)));
  }

  async setView(view) {
    this.view = view;
    await this.originals();
    this.paintAll();
  }

  async hold(on) {
    this.held = on;
    if (on) await this.originals();
    this.paintAll();
  }

  async originals() {
    const needed = this.rows.slice(0, this.shown).filter((row) => !this.original.has(row));
    for (const part of chunks(needed, CHUNK)) {
      try {
        const found = await api.pictures(part, this.pixels(), { original: true });
        part.forEach((row, i) => this.original.set(row, found[i]));
      } catch (error) {
        this.told(error);
        return;
      }
    }
  }

  resize(side) {
    this.side = side;
    this.box.style.setProperty("--tile", `${side}px`);
    this.original.clear();
    this.refresh();
  }

  paintAll() {
    for (const row of this.tiles.keys()) this.paint(row);
  }

  paint(row) {
    const tile = this.tiles.get(row), edited = this.edited.get(row), original = this.original.get(row);
    if (!tile || !edited) return;
    const canvas = tile.firstChild, pair = this.view === "side" && !this.held;
    tile.classList.toggle("pair", pair);
    canvas.width = edited.width * (pair ? 2 : 1);
    canvas.height = edited.height;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const old = original ?? edited;
    if (pair) {
      context.drawImage(old, 0, 0);
      context.drawImage(edited, edited.width, 0);
    } else if (this.view === "difference" && !this.held) {
      context.drawImage(old, 0, 0);
      context.globalCompositeOperation = "difference";
      context.drawImage(edited, 0, 0);
      context.globalCompositeOperation = "lighter"; // three times as bright, to be seen
      for (let i = 0; i < 2; i++) context.drawImage(canvas, 0, 0);
    } else {
      context.drawImage(this.held || (this.view === "blink" && this.blink) ? old : edited, 0, 0);
    }
    const heat = this.heat.get(row);
    if (heat && !this.held) warm(context, heat, edited.width, edited.height);
  }
}

function* chunks(rows, size) {
  for (let i = 0; i < rows.length; i += size) yield rows.slice(i, i + size);
}

// A heat map of 0..1 over a picture.
function warm(context, heat, width, height) {
  const small = new OffscreenCanvas(heat[0].length, heat.length), inner = small.getContext("2d");
  const pixels = inner.createImageData(small.width, small.height);
  heat.flat().forEach((value, i) => {
    const strong = Math.max(0, value) ** 1.5;
    pixels.data.set([255, Math.round(200 * strong), 40, Math.round(190 * strong)], 4 * i);
  });
  inner.putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = true;
  context.globalCompositeOperation = "source-over";
  context.drawImage(small, 0, 0, width, height);
}
