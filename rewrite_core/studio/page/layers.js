// The strip of layers: their maps, and, once all were tried, what the edit does at each.
import { keyed } from "./keyed.js";

const percent = (share) => `${Math.round(100 * share)} %`;

export class Layers {
  // `chosen(name, rank or null)` when a layer is.
  constructor(box, chosen) {
    this.box = box;
    this.chosen = chosen;
    this.found = new Map(); // name -> what a scan says of it
  }

  show(layers, current) {
    const order = [...this.found.keys()], place = (layer) => (order.indexOf(layer.name) + order.length + 1) % (order.length + 1);
    const shown = order.length ? [...layers].sort((a, b) => place(a) - place(b)) : layers; // the best first, the others last
    const lines = keyed(this.box, shown, (layer) => layer.name, (layer) => this.line(layer.name));
    shown.forEach((layer, i) => this.fill(lines[i], layer, layer.name === current));
  }

  line(name) {
    const button = document.createElement("button");
    button.type = "button";
    button.addEventListener("click", () => this.chosen(name, this.found.get(name)?.rank ?? null));
    return button;
  }

  fill(button, layer, current) {
    const found = this.found.get(layer.name);
    button.setAttribute("aria-pressed", current);
    button.replaceChildren();
    const name = document.createElement("span"), told = document.createElement("span");
    name.className = "name";
    name.textContent = layer.name;
    told.textContent = found
      ? `rank ${found.rank} · ${found.reach == null ? "nothing" : percent(found.reach)} follow · ${percent(found.elsewhere)} elsewhere`
      : `${layer.map.join(" × ")}${layer.ready ? "" : " · to be collected"}`;
    if (found?.picture) {
      const picture = document.createElement("img");
      Object.assign(picture, { src: found.picture, alt: "", width: 36 });
      button.append(picture);
    }
    if (found) told.className = `verdict ${found.verdict}`;
    button.append(name, told);
  }
}
