// A selection of one picture: strokes, drawn into a mask. Undo takes back strokes; only the oldest, beyond the cap, are
// kept as a bitmap.

const CAP = 200;

export class Mask {
  constructor(width, height) {
    this.canvas = new OffscreenCanvas(width, height);
    this.base = null; // strokes that can no longer be undone, or a mask that was loaded
    this.strokes = [];
    this.undone = [];
    this.read = null; // the values, once somebody has asked for them
  }

  static async of(url, width, height) {
    const mask = new Mask(width, height);
    const bytes = Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
    const picture = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
    const context = mask.canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      pixels.data[i + 3] = pixels.data[i]; // the first channel says how much is marked
      pixels.data[i] = pixels.data[i + 1] = pixels.data[i + 2] = 255;
    }
    context.putImageData(pixels, 0, 0);
    mask.base = new OffscreenCanvas(width, height);
    mask.base.getContext("2d").drawImage(mask.canvas, 0, 0);
    mask.read = null;
    return mask;
  }

  add(stroke) {
    this.strokes.push(stroke);
    this.undone = [];
    if (this.strokes.length > CAP) {
      this.base ??= new OffscreenCanvas(this.canvas.width, this.canvas.height);
      draw(this.base.getContext("2d"), this.strokes.shift());
    }
    draw(this.canvas.getContext("2d", { willReadFrequently: true }), stroke);
    this.read = null;
  }

  undo() {
    if (!this.strokes.length) return false;
    this.undone.push(this.strokes.pop());
    this.redraw();
    return true;
  }

  redo() {
    if (!this.undone.length) return false;
    this.strokes.push(this.undone.pop());
    this.redraw();
    return true;
  }

  redraw() {
    const context = this.canvas.getContext("2d", { willReadFrequently: true });
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.base) context.drawImage(this.base, 0, 0);
    for (const stroke of this.strokes) draw(context, stroke);
    this.read = null;
  }

  // How much is marked at each pixel, 0 to 255.
  values() {
    if (this.read) return this.read;
    const { width, height } = this.canvas;
    const pixels = this.canvas.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height).data;
    const values = new Uint8Array(width * height);
    for (let i = 0; i < values.length; i++) values[i] = pixels[4 * i + 3];
    return this.read = values;
  }

  same(other) {
    const mine = this.values(), theirs = other.values();
    return mine.length === theirs.length && mine.every((value, i) => value === theirs[i]);
  }

  get empty() {
    return !this.values().some(Boolean);
  }

  // White on black, as the edit's JSON holds it. At once: a canvas that makes a blob waits until the page is idle.
  url() {
    const flat = document.createElement("canvas");
    flat.width = this.canvas.width;
    flat.height = this.canvas.height;
    const context = flat.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#000";
    context.fillRect(0, 0, flat.width, flat.height);
    context.drawImage(this.canvas, 0, 0);
    return flat.toDataURL("image/png");
  }

  // Which cells of the layer's map the mask reaches, row by row; Pillow's bilinear filter spans two cells.
  cells(rows, columns) {
    const { width, height } = this.canvas;
    const values = this.values();
    const reached = new Uint8Array(rows * columns);
    const near = (place, size, count) => {
      const middle = ((place + 0.5) * count) / size - 0.5;
      return [Math.floor(middle), Math.ceil(middle)].filter((cell) => cell >= 0 && cell < count);
    };
    const across = Array.from({ length: width }, (_, x) => near(x, width, columns));
    for (let y = 0; y < height; y++) {
      const down = near(y, height, rows);
      for (let x = 0; x < width; x++) {
        if (!values[y * width + x]) continue;
        for (const row of down) for (const column of across[x]) reached[row * columns + column] = 1;
      }
    }
    return reached;
  }
}

// A stroke: {kind: "area", points} or {kind: "box", points: [corner, corner]} or {kind: "brush", points, size};
// `less` takes away. Points are in the mask's pixels.
export function draw(context, stroke) {
  context.save();
  context.globalCompositeOperation = stroke.less ? "destination-out" : "source-over";
  context.fillStyle = context.strokeStyle = "#fff";
  const [first, ...rest] = stroke.points;
  if (stroke.kind === "box") {
    const last = rest.at(-1) ?? first;
    const left = Math.floor(Math.min(first[0], last[0])), right = Math.ceil(Math.max(first[0], last[0]));
    const top = Math.floor(Math.min(first[1], last[1])), bottom = Math.ceil(Math.max(first[1], last[1]));
    context.fillRect(left, top, right - left, bottom - top);
  } else if (stroke.kind === "brush") {
    context.lineWidth = stroke.size;
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...first);
    for (const point of rest.length ? rest : [[first[0] + 0.01, first[1]]]) context.lineTo(...point);
    context.stroke();
  } else {
    context.beginPath();
    context.moveTo(...first);
    for (const point of rest) context.lineTo(...point);
    context.closePath();
    context.fill();
  }
  context.restore();
}
