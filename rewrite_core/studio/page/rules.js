// The stack of rules: names, switches, strengths, order. Every change is handed on as the whole list.

export class Rules {
  constructor(list, empty, { changed }) {
    this.list = list;
    this.empty = empty;
    this.changed = changed;
    this.rules = [];
  }

  show(rules, conflicts) {
    this.rules = rules;
    this.empty.hidden = rules.length > 0;
    const names = new Map(rules.map((rule) => [rule.number, rule.name]));
    this.list.replaceChildren(...rules.map((rule, place) => {
      const others = conflicts.filter((pair) => pair.includes(rule.number)).map((pair) => names.get(pair[0] === rule.number ? pair[1] : pair[0]));
      return this.line(rule, place, others);
    }));
  }

  line(rule, place, others) {
    const line = document.createElement("li");
    const on = input("checkbox", `Use ${rule.name}`);
    on.checked = rule.on;
    on.addEventListener("change", () => this.set(place, { on: on.checked }));
    const name = input("text", "Name");
    name.value = rule.name;
    name.addEventListener("change", () => this.set(place, { name: name.value }));
    const tools = document.createElement("span");
    tools.className = "tools";
    const file = document.createElement("a");
    file.href = `/api/rules/${rule.number}/file`;
    file.textContent = "↓";
    file.setAttribute("aria-label", `Save ${rule.name}`);
    tools.append(
      button("▲", `Move ${rule.name} up`, () => this.move(place, -1), place === 0),
      button("▼", `Move ${rule.name} down`, () => this.move(place, 1), place === this.rules.length - 1),
      file,
      button("×", `Take ${rule.name} off`, () => this.changed(this.rules.filter((_, i) => i !== place).map(plain))),
    );
    const how = document.createElement("label");
    how.className = "how";
    const strength = input("range", `Strength of ${rule.name}`), shown = document.createElement("output");
    Object.assign(strength, { min: -1, max: 2, step: 0.05, value: rule.strength });
    shown.textContent = Number(rule.strength).toFixed(2);
    strength.addEventListener("input", () => { shown.textContent = Number(strength.value).toFixed(2); });
    strength.addEventListener("change", () => this.set(place, { strength: Number(strength.value) }));
    how.append("Strength", strength, shown);
    line.append(this.grip(line, place), on, name, tools, how);
    if (others.length) {
      line.className = "conflict";
      const words = document.createElement("small");
      words.textContent = `Acts on the same features as ${others.join(", ")}: each changes what the other set.`;
      line.append(words);
    }
    return line;
  }

  // A handle to drag the rule to another place, by mouse, pen or finger; the arrows do the same.
  grip(line, place) {
    const grip = document.createElement("span");
    grip.className = "grip";
    grip.textContent = "⠿";
    grip.title = "Drag to another place";
    grip.setAttribute("aria-hidden", "true");
    const lines = () => [...this.list.children];
    const over = (event) => lines().findIndex((each) => event.clientY < each.getBoundingClientRect().bottom);
    grip.addEventListener("pointerdown", (event) => { grip.setPointerCapture(event.pointerId); line.classList.add("dragged"); });
    grip.addEventListener("pointermove", (event) => {
      if (!line.classList.contains("dragged")) return;
      const to = over(event);
      lines().forEach((each, i) => each.classList.toggle("before", i === to && i !== place));
    });
    const end = (event) => {
      if (!line.classList.contains("dragged")) return;
      for (const each of lines()) each.classList.remove("before", "dragged");
      if (event.type === "pointercancel") return;
      const found = over(event), to = found < 0 ? this.rules.length - 1 : found;
      if (to === place) return;
      const order = [...this.rules], [moved] = order.splice(place, 1);
      order.splice(to, 0, moved);
      this.changed(order.map(plain));
    };
    grip.addEventListener("pointerup", end);
    grip.addEventListener("pointercancel", end);
    return grip;
  }

  set(place, values) {
    this.changed(this.rules.map((rule, i) => plain(i === place ? { ...rule, ...values } : rule)));
  }

  move(place, by) {
    const order = [...this.rules];
    [order[place], order[place + by]] = [order[place + by], order[place]];
    this.changed(order.map(plain));
  }
}

const plain = ({ number, name, on, strength }) => ({ number, name, on, strength });

function input(type, label) {
  const made = document.createElement("input");
  made.type = type;
  made.setAttribute("aria-label", label);
  return made;
}

function button(text, label, call, disabled = false) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.disabled = disabled;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", call);
  return made;
}
