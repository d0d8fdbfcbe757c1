// Nodes that stay: a line that is pressed, typed in or focused is changed where it is, and never made anew.

// The children of `box` become those of `items`, in order; `made(item)` makes the node of a key that is new. Children
// that were put there without a key are left alone.
export function keyed(box, items, key, made) {
  const old = new Map([...box.children].filter((node) => node.dataset.key).map((node) => [node.dataset.key, node]));
  const focused = box.contains(document.activeElement) ? document.activeElement : null;
  const nodes = items.map((item) => {
    const name = String(key(item)), node = old.get(name) ?? made(item);
    node.dataset.key = name;
    old.delete(name);
    return node;
  });
  for (const gone of old.values()) gone.remove();
  const next = (node) => { while (node && !node.dataset.key) node = node.nextElementSibling; return node; };
  let at = next(box.firstElementChild);
  for (const node of nodes) {
    if (node === at) at = next(at.nextElementSibling);
    else box.insertBefore(node, at);
  }
  if (focused?.isConnected && document.activeElement !== focused) focused.focus(); // a node that moves loses it
  return nodes;
}

// A value is put into a control, but not over what somebody is typing or dragging there.
export function fill(control, value) {
  const text = String(value), typed = control === document.activeElement && control.value !== control.dataset.filled;
  if (control.type === "checkbox") { control.checked = value; return; }
  if (control.type === "range" ? control.matches(":active") : typed && /^(text|number)$/.test(control.type)) return;
  control.value = control.dataset.filled = text;
}
