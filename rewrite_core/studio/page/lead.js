// A first visit is led: what to do next, in one line at the top, until it is put away.

const SEEN = "rewrite-studio-led";
const CHAPELS = {
  1: "1 of 3. Picture 6 has a spire. Draw a generous lasso around it, and press “Copy this”.",
  2: "2 of 3. Choose a picture with a dome, such as 0, draw around the dome, and press “Paste here”. The gallery follows at once.",
};
const WORDS = {
  1: "1 of 3. Choose a picture in the gallery, draw around something you like, and press “Copy this”. Draw generously.",
  2: "2 of 3. Choose another picture, draw where it should go, and press “Paste here”. The gallery follows at once.",
  3: "3 of 3. Press “Find matches”: the places like the pasted one. Then “Add the first 10”: the rule is for all of them.",
  4: "Every picture that this generator makes now follows your rule. Move the strength, or keep it as a rule.",
};

export function step(slots) {
  return !slots.copy.length ? 1 : !slots.paste.length ? 2 : !slots.context.length ? 3 : 4;
}

export function lead(box, slots, name) {
  const seen = localStorage.getItem(SEEN), at = step(slots);
  box.hidden = Boolean(seen);
  if (seen) return;
  if (box.dataset.step === String(at)) return; // its button stays under the pointer
  box.dataset.step = String(at);
  const words = name === "chapels" ? { ...WORDS, ...CHAPELS } : WORDS;
  const text = document.createElement("span");
  text.textContent = words[at];
  const done = document.createElement("button");
  done.type = "button";
  done.textContent = at === 4 ? "Done" : "Hide";
  done.addEventListener("click", () => { localStorage.setItem(SEEN, "1"); box.hidden = true; });
  box.replaceChildren(text, done);
}
