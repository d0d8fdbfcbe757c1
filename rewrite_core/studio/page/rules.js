// The stack of rules: names, switches, strengths, order. What changes is handed on, and nothing else.
import { fill, keyed } from "./keyed.js";

export class Rules {
  // `changed(number, values)` when a rule is, `ordered(numbers)` when they are, `removed(number)` when one goes.
  constructor(list, empty, { changed, ordered, removed }) {
    Object.assign(this, { list, empty, changed, ordered, removed });
    this.order = []; // numbers, as they stand on the page
    this.dragged = null; // the number of a rule
  }

  show(rules, conflicts) {
    this.told = [rules, conflicts];
    if (this.dragged !== null) return; // when it is put down
    this.order = rules.map((rule) => rule.number);
    this.empty.hidden = rules.length > 0;
    const names = new Map(rules.map((rule) => [rule.number, rule.name]));
    const lines = keyed(this.list, rules, (rule) => rule.number, (rule) => this.line(rule.number));
    rules.forEach((rule, place) => {
      const others = conflicts.filter((pair) => pair.includes(rule.number)).map((pair) => names.get(pair[0] === rule.number ? pair[1] : pair[0]));
      this.fill(lines[place], rule, place, others);
    });
  }

  line(number) {
    const line = document.createElement("li");
    const on = input("checkbox", "on"), name = input("text", "name");
    on.addEventListener("change", () => this.changed(number, { on: on.checked }));
    name.addEventListener("change", () => { name.dataset.filled = name.value; this.changed(number, { name: name.value }); });
    const tools = document.createElement("span");
    tools.className = "tools";
    const file = document.createElement("a");
    file.dataset.part = "file";
    file.href = `/api/rules/${number}/file`;
    file.textContent = "↓";
    tools.append(
      button("▲", "up", () => this.move(number, -1)),
      button("▼", "down", () => this.move(number, 1)),
      file,
      button("×", "off", () => this.removed(number)),
    );
    const how = document.createElement("label");
    how.className = "how";
    const strength = input("range", "strength"), shown = document.createElement("output");
    Object.assign(strength, { min: -1, max: 2, step: 0.05 });
    strength.addEventListener("input", () => { shown.textContent = Number(strength.value).toFixed(2); });
    strength.addEventListener("change", () => this.changed(number, { strength: Number(strength.value) }));
    how.append("Strength", strength, shown);
    const words = document.createElement("small");
    line.append(this.grip(line, number), on, name, tools, how, words);
    return line;
  }

  // What is said of a rule goes into its line.
  fill(line, rule, place, others) {
    const part = (name) => line.querySelector(`[data-part=${name}]`);
    const say = (name, label) => part(name).setAttribute("aria-label", label);
    fill(part("on"), rule.on);
    fill(part("name"), rule.name);
    fill(part("strength"), rule.strength);
    line.querySelector("output").textContent = Number(part("strength").value).toFixed(2);
    part("up").setAttribute("aria-disabled", place === 0); // not disabled: it would lose the focus
    part("down").setAttribute("aria-disabled", place === this.order.length - 1);
    say("on", `Use ${rule.name}`);
    say("name", `Name of ${rule.name}`);
    say("strength", `Strength of ${rule.name}`);
    say("up", `Move ${rule.name} up`);
    say("down", `Move ${rule.name} down`);
    say("file", `Save ${rule.name}`);
    say("off", `Take ${rule.name} off`);
    line.classList.toggle("conflict", others.length > 0);
    const words = line.querySelector("small");
    words.hidden = !others.length;
    words.textContent = others.length ? `Acts on the same features as ${others.map((name) => `“${name}”`).join(", ")}: each changes what the other set.` : "";
  }

  // A handle to drag the rule to another place, by mouse, pen or finger; the arrows do the same.
  grip(line, number) {
    const grip = document.createElement("span");
    grip.className = "grip";
    grip.textContent = "⠿";
    grip.title = "Drag to another place";
    grip.setAttribute("aria-hidden", "true");
    const lines = () => [...this.list.children];
    const over = (event) => lines().findIndex((each) => event.clientY < each.getBoundingClientRect().bottom);
    grip.addEventListener("pointerdown", (event) => {
      grip.setPointerCapture(event.pointerId);
      line.classList.add("dragged");
      this.dragged = number;
    });
    grip.addEventListener("pointermove", (event) => {
      if (this.dragged !== number) return;
      const to = over(event);
      lines().forEach((each, i) => each.classList.toggle("before", i === to && each !== line));
    });
    const end = (event) => {
      if (this.dragged !== number) return;
      for (const each of lines()) each.classList.remove("before", "dragged");
      this.dragged = null;
      const found = over(event), to = found < 0 ? this.order.length - 1 : found;
      this.show(...this.told);
      if (event.type !== "pointercancel") this.put(number, to);
    };
    grip.addEventListener("pointerup", end);
    grip.addEventListener("pointercancel", end);
    return grip;
  }

  move(number, by) {
    this.put(number, this.order.indexOf(number) + by);
  }

  // A rule goes to another place, on the page at once.
  put(number, place) {
    const order = this.order.filter((each) => each !== number);
    order.splice(Math.max(0, place), 0, number);
    if (!this.order.includes(number) || order.every((each, i) => each === this.order[i])) return;
    const [rules, conflicts] = this.told;
    this.show(order.map((each) => rules.find((rule) => rule.number === each)), conflicts);
    this.ordered(order);
  }
}

function input(type, name) {
  const made = document.createElement("input");
  made.type = type;
  made.dataset.part = name;
  return made;
}

function button(text, name, call) {
  const made = document.createElement("button");
  made.type = "button";
  made.dataset.part = name;
  made.textContent = text;
  made.addEventListener("click", call);
  return made;
}
