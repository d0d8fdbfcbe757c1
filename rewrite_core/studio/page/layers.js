// The strip of layers: their maps, and, once all were tried, what the edit does at each.

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
    this.box.replaceChildren(...shown.map((layer) => this.line(layer, layer.name === current)));
  }

  line(layer, current) {
    const button = document.createElement("button"), found = this.found.get(layer.name);
    button.type = "button";
    button.setAttribute("aria-pressed", current);
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
    button.addEventListener("click", () => this.chosen(layer.name, found?.rank ?? null));
    return button;
  }
}
