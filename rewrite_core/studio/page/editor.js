// The large picture: tools that draw a mask on it, pan, zoom, the layer's grid.
import { Mask, draw } from "./mask.js";

const NEAR = 9; // pixels of the screen: a click this near to a polygon's start closes it
const COLOURS = { copy: "#2f9e44", paste: "#e8590c", context: "#7048e8", free: "#ffd43b" };

export class Editor {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed; // called when a stroke ends
    this.picture = null; // bitmap
    this.mask = null;
    this.kind = "free";
    this.tool = "lasso";
    this.size = 16;
    this.showGrid = true;
    this.map = [8, 8];
    this.stroke = null;
    this.cursor = null; // of the keyboard, in the mask's pixels
    this.view = { zoom: 1, x: 0, y: 0 };
    this.panning = null;
    this.fingers = new Map(); // those on the picture: number -> where on the screen
    this.pinch = null; // where two of them were, or what is left of two
    this.space = false;
    for (const [name, call] of Object.entries({
      pointerdown: this.down, pointermove: this.move, pointerup: this.up, pointercancel: this.stop, dblclick: this.close,
    })) canvas.addEventListener(name, call.bind(this));
    canvas.addEventListener("wheel", this.wheel.bind(this), { passive: false });
    canvas.addEventListener("keydown", this.key.bind(this));
    canvas.addEventListener("blur", () => { this.space = false; });
    canvas.addEventListener("keyup", (event) => { if (event.key === " ") this.space = false; });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    new ResizeObserver(() => this.paint()).observe(canvas);
  }

  // Width and height of masks: the picture's own where that is fine enough, else a whole multiple of it.
  static maskSize(width, height) {
    const factor = Math.max(1, Math.ceil(256 / Math.min(width, height)));
    return [width * factor, height * factor];
  }

  show(picture, mask, kind) {
    this.picture = picture;
    if (mask !== this.mask) { this.stroke = null; this.cursor = null; this.reached = null; }
    this.mask = mask;
    this.kind = kind;
    this.paint();
  }

  setTool(tool) {
    this.tool = tool;
    this.stroke = null;
    this.paint();
  }

  // --- from the screen to the mask's pixels

  frame() {
    const box = this.canvas.getBoundingClientRect();
    const { width, height } = this.mask.canvas;
    const scale = Math.min(box.width / width, box.height / height) * this.view.zoom;
    return {
      scale,
      left: (box.width - width * scale) / 2 + this.view.x,
      top: (box.height - height * scale) / 2 + this.view.y,
    };
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    const { scale, left, top } = this.frame();
    return [(event.clientX - box.left - left) / scale, (event.clientY - box.top - top) / scale];
  }

  // --- pointer

  down(event) {
    if (!this.mask) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.focus();
    if (event.pointerType === "touch" && this.touched(event)) return;
    if (event.button === 1 || this.space) {
      this.panning = [event.clientX - this.view.x, event.clientY - this.view.y];
      event.preventDefault();
      return;
    }
    if (event.button !== 0) return;
    const point = this.place(event);
    const less = event.ctrlKey || event.metaKey;
    if (this.tool === "polygon") return this.corner(point, event.shiftKey, less);
    const kind = { lasso: "area", box: "box", brush: "brush" }[this.tool];
    this.stroke = { kind, points: [point], less, size: this.size };
    this.paint();
  }

  move(event) {
    if (this.pinch) return this.pinched(event);
    if (this.panning) {
      this.view.x = event.clientX - this.panning[0];
      this.view.y = event.clientY - this.panning[1];
      this.paint();
      return;
    }
    if (!this.stroke) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) {
      const point = this.place(each);
      if (this.tool === "polygon") this.stroke.hover = this.snapped(point, event.shiftKey);
      else if (this.tool === "box") this.stroke.points[1] = point;
      else this.stroke.points.push(point);
    }
    this.paint();
  }

  up(event) {
    if (this.lifted(event)) return;
    if (this.panning) { this.panning = null; return; }
    if (!this.stroke || this.tool === "polygon") return;
    if (this.tool === "box") this.stroke.points[1] = this.place(event);
    this.finish(event.timeStamp);
  }

  // By the key Escape, or by the system, which may take a touch for itself.
  stop(event) {
    if (event && this.lifted(event)) return;
    this.panning = null;
    this.stroke = null;
    this.paint();
  }

  // --- two fingers: they zoom and pan, and what the first has begun to draw is let go

  // Whether this finger is one of several.
  touched(event) {
    this.fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.fingers.size < 2) return false;
    if (this.tool === "polygon") this.stroke?.points.pop(); // the first finger's corner
    else this.stroke = null;
    this.panning = null;
    this.pinch = this.between();
    this.paint();
    return true;
  }

  // The middle of the first two fingers, and how far they are apart.
  between() {
    const [[ax, ay], [bx, by]] = this.fingers.values();
    return { clientX: (ax + bx) / 2, clientY: (ay + by) / 2, apart: Math.max(1, Math.hypot(ax - bx, ay - by)) };
  }

  pinched(event) {
    if (!this.fingers.has(event.pointerId)) return;
    this.fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.fingers.size < 2) return; // one that is left
    const old = this.pinch, now = this.pinch = this.between();
    this.enlarge(now.apart / old.apart, this.place(old));
    if (this.view.zoom === 1) return;
    this.view.x += now.clientX - old.clientX;
    this.view.y += now.clientY - old.clientY;
  }

  // A finger has gone; whether it was one of several. The last of them draws nothing.
  lifted(event) {
    this.fingers.delete(event.pointerId);
    if (!this.pinch) return false;
    if (this.fingers.size > 1) this.pinch = this.between();
    else if (!this.fingers.size) this.pinch = null;
    return true;
  }

  wheel(event) {
    event.preventDefault();
    if (this.mask) this.enlarge(Math.exp(-event.deltaY / 400), this.place(event));
  }

  // Zoom; `point` of the mask stays where it is on the screen.
  enlarge(factor, [x, y]) {
    const before = this.frame();
    this.view.zoom = Math.min(16, Math.max(1, this.view.zoom * factor));
    if (this.view.zoom === 1) this.view.x = this.view.y = 0;
    else {
      const after = this.frame();
      this.view.x += before.left + x * before.scale - after.left - x * after.scale;
      this.view.y += before.top + y * before.scale - after.top - y * after.scale;
    }
    this.paint();
  }

  // The keyboard's cursor is brought back to where it is seen.
  follow() {
    const { scale, left, top } = this.frame(), edge = 12;
    const box = this.canvas.getBoundingClientRect(), x = left + this.cursor[0] * scale, y = top + this.cursor[1] * scale;
    this.view.x += Math.max(0, edge - x) - Math.max(0, x - box.width + edge);
    this.view.y += Math.max(0, edge - y) - Math.max(0, y - box.height + edge);
  }

  // --- polygons

  snapped(point, snap) {
    const from = this.stroke?.points.at(-1);
    if (!snap || !from) return point;
    const angle = Math.round(Math.atan2(point[1] - from[1], point[0] - from[0]) / (Math.PI / 4)) * (Math.PI / 4);
    const length = Math.hypot(point[0] - from[0], point[1] - from[1]);
    return [from[0] + length * Math.cos(angle), from[1] + length * Math.sin(angle)];
  }

  corner(point, snap, less) {
    if (!this.stroke) this.stroke = { kind: "area", points: [], less };
    const { points } = this.stroke;
    const { scale } = this.frame();
    if (points.length > 2 && Math.hypot(point[0] - points[0][0], point[1] - points[0][1]) * scale < NEAR) return this.finish();
    points.push(this.snapped(point, snap));
    this.paint();
  }

  close() {
    if (this.tool === "polygon" && this.stroke?.points.length > 2) this.finish();
  }

  // `at`: when the stroke ended, where that was before now.
  finish(at) {
    const stroke = this.stroke;
    this.stroke = null;
    const few = stroke.kind === "area" && stroke.points.length < 3;
    if (!few) {
      delete stroke.hover;
      this.mask.add(stroke);
      this.reached = null;
      this.changed(this.mask, at);
    }
    this.paint();
  }

  // --- keyboard: a cursor, and rectangles between two places of it, or a polygon through several

  key(event) {
    if (!this.mask || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { width, height } = this.mask.canvas;
    if (event.key in moves) {
      const step = Math.max(1, Math.round(width / 64)) * (event.shiftKey ? 8 : 1);
      const [x, y] = this.cursor ?? [width / 2, height / 2];
      this.cursor = [
        Math.min(width, Math.max(0, x + moves[event.key][0] * step)),
        Math.min(height, Math.max(0, y + moves[event.key][1] * step)),
      ];
      if (this.view.zoom > 1) this.follow();
      if (this.stroke?.kind === "box") this.stroke.points[1] = this.cursor;
      else if (this.tool === "polygon" && this.stroke) this.stroke.hover = this.cursor;
    } else if (event.key === "Enter" && this.tool === "polygon") {
      const [x, y] = this.stroke?.points.at(-1) ?? [];
      if (!this.cursor || (this.cursor[0] === x && this.cursor[1] === y)) this.close(); // twice, as by mouse
      else this.corner(this.cursor, false, event.shiftKey);
    } else if (event.key === "Enter" && this.cursor) {
      if (this.stroke?.kind === "box") { this.stroke.points[1] = this.cursor; this.finish(); }
      else this.stroke = { kind: "box", points: [this.cursor], less: event.shiftKey };
    } else if (/^[-+=]$/.test(event.key)) {
      this.enlarge(event.key === "-" ? 1 / 1.25 : 1.25, this.cursor ?? [width / 2, height / 2]);
    } else if (event.key === "Escape") {
      this.stop();
    } else if (event.key === " ") {
      this.space = true;
    } else return;
    event.preventDefault();
    event.stopPropagation();
    this.paint();
  }

  // --- painting

  paint() {
    if (this.due) return;
    this.due = requestAnimationFrame(() => { this.due = 0; this.paintNow(); });
  }

  paintNow() {
    const box = this.canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    const size = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    const context = this.canvas.getContext("2d");
    if (size[0] === this.canvas.width && size[1] === this.canvas.height) {
      context.resetTransform();
      context.clearRect(0, 0, ...size);
    } else [this.canvas.width, this.canvas.height] = size; // which clears it, too
    if (!this.mask || !this.picture) return;
    const { width, height } = this.mask.canvas;
    const { scale, left, top } = this.frame();
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * left, ratio * top);
    context.imageSmoothingEnabled = this.picture.width >= 256;
    context.drawImage(this.picture, 0, 0, width, height);
    const colour = COLOURS[this.kind];
    this.veil(context, colour, width, height);
    if (this.showGrid) this.lines(context, colour, width, height, scale);
    if (this.stroke) this.outline(context, scale, colour);
    if (this.cursor) this.cross(context, scale);
  }

  veil(context, colour, width, height) {
    const tint = new OffscreenCanvas(width, height), inner = tint.getContext("2d");
    inner.drawImage(this.mask.canvas, 0, 0);
    if (this.stroke && this.stroke.kind !== "area") draw(inner, this.stroke);
    inner.globalCompositeOperation = "source-in";
    inner.fillStyle = colour;
    inner.fillRect(0, 0, width, height);
    context.globalAlpha = 0.45;
    context.drawImage(tint, 0, 0);
    context.globalAlpha = 1;
  }

  lines(context, colour, width, height, scale) {
    const [rows, columns] = this.map;
    if (columns * 3 > width * scale) return; // closer than lines can be told apart
    this.reached ??= this.mask.cells(rows, columns);
    const cell = [width / columns, height / rows];
    context.fillStyle = colour;
    context.globalAlpha = 0.13;
    this.reached.forEach((on, i) => {
      if (on) context.fillRect((i % columns) * cell[0], Math.floor(i / columns) * cell[1], cell[0], cell[1]);
    });
    context.globalAlpha = 0.3;
    context.strokeStyle = "#fff";
    context.lineWidth = 1 / scale;
    context.beginPath();
    for (let x = 0; x <= columns; x++) { context.moveTo(x * cell[0], 0); context.lineTo(x * cell[0], height); }
    for (let y = 0; y <= rows; y++) { context.moveTo(0, y * cell[1]); context.lineTo(width, y * cell[1]); }
    context.stroke();
    context.globalAlpha = 1;
  }

  outline(context, scale, colour) {
    const points = [...this.stroke.points, ...(this.stroke.hover ? [this.stroke.hover] : [])];
    if (this.stroke.kind !== "area" || !points.length) return;
    for (const [shade, wide] of [["#000", 3.5], [colour, 2]]) {
      context.strokeStyle = shade;
      context.lineWidth = wide / scale;
      context.beginPath();
      context.moveTo(...points[0]);
      for (const point of points.slice(1)) context.lineTo(...point);
      context.stroke();
    }
  }

  cross(context, scale) {
    const [x, y] = this.cursor, arm = 10 / scale;
    for (const [shade, wide] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = shade;
      context.lineWidth = wide / scale;
      context.beginPath();
      context.moveTo(x - arm, y); context.lineTo(x + arm, y);
      context.moveTo(x, y - arm); context.lineTo(x, y + arm);
      context.stroke();
    }
  }
}

export { Mask };
