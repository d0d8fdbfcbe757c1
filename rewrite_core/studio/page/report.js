// What is said of a change, in words that a person understands.

const TITLES = {
  holds: "The rule holds",
  weak: "Too few places follow",
  spills: "Too much changes elsewhere",
  destroys: "Pictures break",
};
const HINT = "Draw a copy, a paste and a context: the gallery follows.";
const percent = (share) => `${Math.round(100 * share)} %`;

export class Report {
  constructor(box) {
    this.box = box;
  }

  // One sentence: what is going on, or what went wrong.
  say(sentence, bad = false) {
    this.box.className = bad ? "warn" : "";
    this.box.replaceChildren(sentence);
  }

  // A change as the server tells of it, or null.
  show(report) {
    if (!report) return this.say(HINT);
    this.box.className = report.size > 1 || report.warnings.length ? "warn" : "";
    const milliseconds = 1000 * Object.values(report.seconds).reduce((a, b) => a + b, 0);
    this.box.replaceChildren(
      this.verdict(report.measured),
      line(`Rank ${report.rank} at ${report.layer} in ${milliseconds.toFixed(0)} ms. ${this.size(report.size)}`, "faint"),
      ...report.warnings.map((warning) => line(warning)),
    );
  }

  size(size) {
    if (size == null) return "";
    if (size <= 1) return `Size of the change: ${size.toFixed(2)} of the layer's weight.`;
    return `The change is ${size.toFixed(1)} times the layer's own weight, and pictures may break: lower the rank, or set Preserve to 0.3.`;
  }

  verdict(measured) {
    const box = document.createElement("div");
    if (!measured) {
      box.append(line("Looking at pictures that the edit does not name …", "faint"));
      return box;
    }
    const title = document.createElement("strong");
    title.className = `verdict ${measured.verdict}`;
    title.textContent = TITLES[measured.verdict] ?? measured.verdict;
    box.append(title, line(measured.advice));
    const facts = [];
    if (measured.reach != null) facts.push(["Follow", `${percent(measured.reach)} of ${measured.seen} unseen pictures with this context`]);
    if (measured.inside != null) facts.push(["Changed there", percent(measured.inside)]);
    if (measured.outside != null) facts.push(["Around it", percent(measured.outside)]);
    if (measured.unrelated != null) facts.push(["Other pictures", percent(measured.unrelated)]);
    const list = document.createElement("dl");
    list.className = "facts";
    for (const [name, value] of facts) {
      const term = document.createElement("dt"), told = document.createElement("dd");
      term.textContent = name;
      told.textContent = value;
      list.append(term, told);
    }
    box.append(list);
    return box;
  }
}

function line(text, kind = "") {
  const made = document.createElement("p");
  made.className = kind;
  made.textContent = text;
  return made;
}
