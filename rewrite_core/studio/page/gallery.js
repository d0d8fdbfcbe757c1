// The gallery: tiles of pictures by number, in several views and orders, brought up to date as the edit changes.
import * as api from "./api.js";
import { keyed } from "./keyed.js";

const MORE = 24; // tiles that scrolling adds
const FIRST = 4, CHUNK = 20; // pictures asked for at once; the first of them on their own, so that some are there at once

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
    this.largest = 512; // the longer side of the generator's own pictures
    this.end = new IntersectionObserver((entries) => entries.some((e) => e.isIntersecting) && this.extend(), { root: tiles, rootMargin: "300px" });
    tiles.append(more);
    this.more = more;
    setInterval(() => { if (this.view === "blink") { this.blink = !this.blink; this.paintAll(); } }, 500);
  }

  // Show these numbers, in this order. Tiles that are there already stay, with their pictures.
  order(rows, heat = new Map()) {
    this.rows = rows;
    this.heat = heat;
    this.shown = Math.min(MORE, rows.length);
    this.tiles = new Map();
    this.place();
    this.paintAll();
    this.extend(0);
  }

  // The nodes of the tiles that are shown.
  place() {
    const rows = this.rows.slice(0, this.shown);
    const nodes = keyed(this.box, rows, (row) => row, (row) => this.tile(row));
    this.box.append(this.more);
    rows.forEach((row, i) => this.tiles.set(row, nodes[i]));
    this.mark(this.marked);
  }

  extend(more = MORE) {
    const known = more ? this.shown : 0;
    this.shown = Math.min(this.rows.length, this.shown + more);
    const next = this.rows.slice(known, this.shown);
    if (!next.length) return;
    if (more) this.place();
    this.end.unobserve(this.more); // again, as it may be in sight still
    this.end.observe(this.more);
    const run = this.run;
    this.ask(next).then((sheets) => this.put(next, sheets, run));
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
    return tile;
  }

  mark(row) {
    this.marked = row;
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

  // Ask for everything that is shown again: what is seen first. While a slider is dragged, for no more than that.
  async refresh({ rest = true } = {}) {
    const run = ++this.run, seen = this.visible();
    const others = rest ? this.rows.slice(0, this.shown).filter((row) => !seen.includes(row)) : [];
    const rows = [...seen, ...others];
    const parts = [rows.slice(0, FIRST), ...chunks(rows.slice(FIRST), CHUNK)].filter((part) => part.length);
    let painted = 0;
    performance.clearMarks("first");
    performance.clearMarks("twenty-four");
    let asked = parts.length ? this.ask(parts[0]) : null;
    for (let i = 0; i < parts.length; i++) {
      const sheets = await asked;
      if (run !== this.run) return;
      asked = i + 1 < parts.length ? this.ask(parts[i + 1]) : null; // the server works while this page decodes
      await this.put(parts[i], sheets, run);
      painted += parts[i].length;
      if (i === 0) performance.mark("first");
      if (painted >= Math.min(24, rows.length) && !performance.getEntriesByName("twenty-four").length) performance.mark("twenty-four");
    }
    if (run === this.run) document.body.dataset.painted = String(run);
  }

  async ask(rows) {
    const needed = this.view !== "edited" || this.held ? rows.filter((row) => !this.original.has(row)) : [];
    try {
      return await Promise.all([
        api.sheet(rows, this.pixels(), { strength: this.strength }),
        needed.length ? api.sheet(needed, this.pixels(), { original: true }) : null,
        needed,
      ]);
    } catch (error) {
      this.told(error);
      return null;
    }
  }

  async put(rows, sheets, run) {
    if (!sheets) return;
    const [edited, original, needed] = sheets;
    if (original) (await api.decoded(original, needed.length)).forEach((picture, i) => this.original.set(needed[i], picture));
    const found = await api.decoded(edited, rows.length);
    if (run !== this.run) return;
    rows.forEach((row, i) => { this.edited.set(row, found[i]); this.paint(row); });
  }

  pixels() {
    const wanted = Math.min(512, Math.round(this.side * (window.devicePixelRatio || 1)));
    return Math.min(wanted, this.largest); // the canvas makes small pictures larger, to the same picture
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
