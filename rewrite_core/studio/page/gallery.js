// The gallery: tiles of pictures by number, in several views and orders, brought up to date as the edit changes.
import * as api from "./api.js";
import { keyed } from "./keyed.js";

const MORE = 24; // tiles that scrolling adds
const NEAR = "600px 0px"; // how far out of sight pictures are kept; those beyond are fetched again on return
const CHUNK = 24; // pictures that are asked for at once: those that can be seen, or so many
const FIRST = 2, PART = 12; // pictures that come together: few at first, so that some are there at once
const SOME = 8; // pictures that follow a slider at once, or a part more

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
    this.next = 0; // of the parts that follow a slider
    this.shown = 0;
    this.strength = null;
    this.largest = 512; // the longer side of the generator's own pictures
    this.large = () => null; // the number of a large picture that comes along with the tiles, where there is one
    this.follows = () => {}; // is given that picture as it is now
    this.near = new Set(); // numbers whose tiles are in sight or close to it: of these alone pictures are kept
    this.asking = new Set(); // numbers that were asked for as they came near
    this.watch = new IntersectionObserver((entries) => this.moved(entries), { root: tiles, rootMargin: NEAR });
    this.end = new IntersectionObserver((entries) => entries.some((e) => e.isIntersecting) && this.extend(), { root: tiles, rootMargin: "300px" });
    tiles.append(more);
    this.more = more;
    setInterval(() => { if (this.view === "blink") { this.blink = !this.blink; this.paintAll(); } }, 500);
  }

  // Show these numbers, in this order, and no fewer than `least`. Tiles that are there already stay, with their pictures.
  order(rows, heat = new Map(), least = MORE) {
    this.rows = rows;
    this.heat = heat;
    this.shown = Math.min(Math.max(MORE, least), rows.length);
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
    if (known === this.shown) return;
    if (more) this.place();
    this.end.unobserve(this.more); // again, as it may be in sight still
    this.end.observe(this.more);
    const next = this.rows.slice(known, known + MORE).filter((row) => !this.edited.has(row));
    for (const row of next) this.near.add(row); // until the watch says otherwise
    this.fetch(next);
  }

  // Tiles have come near, or gone.
  moved(entries) {
    const came = [];
    for (const { target, isIntersecting } of entries) {
      const row = Number(target.dataset.row), stays = this.tiles.get(row) === target;
      if (isIntersecting && stays) {
        this.near.add(row);
        if (!this.edited.has(row) && !this.asking.has(row)) came.push(row);
      } else if (stays || !this.tiles.has(row)) this.forget(row);
    }
    if (came.length) this.fetch(came);
  }

  forget(row) {
    this.near.delete(row);
    this.edited.delete(row);
    this.original.delete(row);
    const canvas = this.tiles.get(row)?.firstChild;
    if (canvas) canvas.width = canvas.height = 0;
  }

  // Pictures of tiles that have come near.
  async fetch(rows) {
    const run = this.run, taken = (numbers, pictures) => run === this.run && this.put(numbers, pictures);
    if (!rows.length) return;
    for (const row of rows) this.asking.add(row);
    try {
      for (const part of chunks(rows, CHUNK)) await this.ask(grouped(part), taken);
    } catch (error) {
      this.told(error);
    } finally {
      for (const row of rows) this.asking.delete(row);
    }
    const missed = rows.filter((row) => this.near.has(row) && !this.edited.has(row));
    if (missed.length && run !== this.run) this.fetch(missed); // they came near after a newer run had begun
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
    this.watch.observe(tile);
    return tile;
  }

  mark(row) {
    this.marked = row;
    for (const [number, tile] of this.tiles) tile.setAttribute("aria-current", number === row);
  }

  // Rows whose pictures are kept, from the top.
  kept() {
    return this.rows.slice(0, this.shown).filter((row) => this.near.has(row));
  }

  // Rows whose tiles can be seen, from the top; those beyond come later.
  visible() {
    const box = this.box.getBoundingClientRect();
    return this.kept().filter((row) => {
      const place = this.tiles.get(row)?.getBoundingClientRect();
      return place && place.bottom > box.top && place.top < box.bottom;
    });
  }

  // Ask for everything that is kept again: what is seen first. `through(pictures, taken, stop, told)` asks for the
  // first of them along with something else, and calls told() once that is done. A newer call stops the one before.
  async refresh({ through = null } = {}) {
    const run = ++this.run, seen = this.visible();
    if (this.flight?.loose) this.flight.abort();
    const flight = this.flight = new AbortController();
    flight.loose = !through;
    if (through) this.solved = run;
    const told = () => { flight.loose = true; if (run !== this.run) flight.abort(); };
    const others = this.kept().filter((row) => !seen.includes(row));
    const more = Math.max(0, CHUNK - seen.length);
    const asked = this.along(grouped([...seen, ...others.slice(0, more)]));
    if (through && (this.view !== "edited" || this.held)) this.originals(asked.flat()).catch(this.told);
    const count = Math.min(CHUNK, asked.flat().length);
    for (const name of ["first", "twenty-four"]) performance.clearMarks(name);
    let painted = 0;
    const taken = (numbers, pictures) => {
      if (run !== this.run) return;
      this.put(numbers, pictures);
      if (!painted) performance.mark("first");
      if (painted < count && painted + numbers.length >= count) performance.mark("twenty-four");
      painted += numbers.length;
    };
    try {
      if (through) await through(this.wanted(asked), taken, flight.signal, told);
      else await this.ask(asked, taken, flight.signal);
      for (const part of chunks(others.slice(more), CHUNK)) await this.ask(grouped(part), taken, flight.signal);
    } catch (error) {
      if (error.name !== "AbortError") throw error; // there is a newer one
    }
    if (through && run !== this.run && run === this.solved) return this.refresh(); // a newer one knew less
    if (run === this.run) document.body.dataset.painted = String(run);
  }

  // While a slider is dragged: some of what is seen, as it is now, the next ones with each call; all of it at once
  // would be slower than the hand. Returns how many calls bring all of it up to date.
  async follow() {
    const run = ++this.run, calls = [];
    for (const part of grouped(this.visible())) {
      if (calls.length && calls.at(-1).flat().length < SOME) calls.at(-1).push(part);
      else calls.push([part]);
    }
    if (this.flight?.loose) this.flight.abort();
    const flight = this.flight = new AbortController();
    flight.loose = true;
    this.next = (this.next + 1) % calls.length || 0;
    const taken = (numbers, pictures) => { if (run === this.run) this.put(numbers, pictures); };
    try {
      await this.ask(this.along(calls[this.next] ?? []), taken, flight.signal);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
    return calls.length;
  }

  // Parts, and the large picture with them.
  along(parts) {
    const number = this.large();
    return number === null || parts.some((part) => part.includes(number)) ? parts : [...parts, [number]];
  }

  wanted(parts) {
    return { rows: parts.map((part) => part.join(",")).join(";"), side: this.pixels() };
  }

  // Pictures as they are now, after the originals that a view needs.
  async ask(parts, taken, stop) {
    if (!parts.length) return;
    if (this.view !== "edited" || this.held) await this.originals(parts.flat());
    await api.pictures(this.wanted(parts), { strength: this.strength }, taken, stop);
  }

  put(rows, pictures) {
    rows.forEach((row, i) => {
      if (this.near.has(row)) { this.edited.set(row, pictures[i]); this.paint(row); }
      if (row === this.large()) this.follows(row, pictures[i]);
    });
  }

  pixels() {
    const wanted = Math.min(512, Math.round(this.side * (window.devicePixelRatio || 1)));
    return Math.min(wanted, this.largest); // the canvas makes small pictures larger, to the same picture
  }

  async setView(view) {
    this.view = view;
    this.box.classList.toggle("pairs", view === "side");
    this.paintAll();
    await this.originals();
  }

  async hold(on) {
    if (this.held === on) return;
    this.held = on;
    this.paintAll();
    if (on) await this.originals().catch(this.told);
  }

  // The originals that are not there yet, or of another size; each is painted where it is shown.
  async originals(rows = this.kept()) {
    for (const part of chunks(rows.filter((row) => !this.fits(this.original.get(row))), CHUNK)) {
      await api.pictures(this.wanted(grouped(part)), { original: true }, (numbers, pictures) => {
        numbers.forEach((row, i) => { if (this.near.has(row)) { this.original.set(row, pictures[i]); this.paint(row); } });
      });
    }
  }

  fits(picture) {
    return picture && Math.max(picture.width, picture.height) === this.pixels();
  }

  async resize(side) {
    const before = this.pixels();
    this.side = side;
    this.box.style.setProperty("--tile", `${side}px`);
    if (this.pixels() !== before) await this.refresh();
  }

  paintAll() {
    for (const row of this.tiles.keys()) this.paint(row);
  }

  paint(row) {
    const tile = this.tiles.get(row), edited = this.edited.get(row), original = this.original.get(row);
    if (!tile || !edited) return;
    const canvas = tile.firstChild, pair = this.view === "side";
    const size = [edited.width * (pair ? 2 : 1), edited.height];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    const context = canvas.getContext("2d"), old = original?.width === edited.width ? original : edited; // until it comes
    context.globalCompositeOperation = "source-over";
    if (pair) {
      context.putImageData(old, 0, 0);
      context.putImageData(this.held ? old : edited, edited.width, 0);
    } else if (this.view === "difference" && !this.held) {
      context.putImageData(old, 0, 0);
      context.globalCompositeOperation = "difference";
      context.drawImage(drawn(edited), 0, 0);
      context.globalCompositeOperation = "lighter"; // three times as bright, to be seen
      const once = drawn(context.getImageData(0, 0, canvas.width, canvas.height));
      for (let i = 0; i < 2; i++) context.drawImage(once, 0, 0);
    } else {
      context.putImageData(this.held || (this.view === "blink" && this.blink) ? old : edited, 0, 0);
    }
    const heat = this.heat.get(row);
    if (heat && !this.held) warm(context, heat, edited.width, edited.height);
  }
}

// A picture on a canvas of its own, so that it can be drawn over another.
export function drawn(picture) {
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

// Numbers in parts that are painted together: the first few, then the rest, in equal shares.
function grouped(rows) {
  const rest = rows.slice(FIRST), parts = Math.ceil(rest.length / PART);
  return [rows.slice(0, FIRST), ...chunks(rest, Math.ceil(rest.length / Math.max(parts, 1)) || 1)].filter((part) => part.length);
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
