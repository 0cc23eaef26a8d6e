// The keyboard: one table, which is also the page's help and the guide's table.
export const KEYS = [
  ["Arrows, Shift+Arrows", "move the crosshair by 1 or 10 pixels"],
  ["Enter, Shift+Enter", "add, or take away, at the crosshair"],
  ["B", "begin a box at the crosshair; Enter ends it"],
  ["N", "finish the object and begin the next"],
  ["[, ]", "previous, next object"],
  ["Delete", "delete the object"],
  ["1, 2, 3", "choose among the masks of an ambiguous click"],
  ["Ctrl+Z, Ctrl+Y", "undo, do again"],
  ["+, -, 0, F", "zoom in, out, 100 %, fit"],
  ["Space+Arrows", "move the view"],
  ["H", "hide the masks"],
  ["O, Shift+O", "more, less opacity"],
  ["P", "preview while hovering"],
  ["E", "everything"],
  ["Ctrl+S, Ctrl+C", "save; copy the mask as PNG"],
  ["Ctrl+O, Ctrl+V", "open, paste an image"],
  ["?", "this list"],
  ["Esc", "cancel"],
];

const STEP = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// actions: an object of functions by name; returns the handler of keydown and keyup.
export function listen(target, actions) {
  let hasSpace = false;
  target.addEventListener("keyup", (event) => {
    if (event.key === " ") { hasSpace = false; actions.space(false); }
    if (STEP[event.key]) actions.settle();
  });
  target.addEventListener("keydown", (event) => {
    const words = event.target.closest?.("input, textarea, select, dialog");
    if (words && !(event.key === "Escape")) return;
    const isButton = event.target.closest?.("button, summary, a, [role=radio]");
    if (isButton && (event.key === "Enter" || event.key === " ")) return;
    const name = nameOf(event, hasSpace);
    if (!name) return;
    if (name === "space") hasSpace = true;
    const value = STEP[event.key] && STEP[event.key].map((v) => v * (event.shiftKey ? 10 : 1));
    if (actions[name](...(value ?? [])) !== false) event.preventDefault();
  });
}

function nameOf(event, hasSpace) {
  const { key } = event, lower = key.toLowerCase();
  if (event.ctrlKey || event.metaKey) {
    if (lower === "z") return event.shiftKey ? "redo" : "undo";
    return { y: "redo", s: "save", c: "copy", o: "open" }[lower];
  }
  if (event.altKey) return undefined;
  if (STEP[key]) return hasSpace ? "pan" : "step";
  if (key === "Enter") return event.shiftKey ? "minus" : "plus";
  if (key === "O") return "fainter";
  const table = {
    " ": "space", b: "box", n: "next", "[": "before", "]": "after", delete: "remove", backspace: "remove",
    1: "first", 2: "second", 3: "third", "+": "zoomIn", "=": "zoomIn", "-": "zoomOut", 0: "actual", f: "fit",
    h: "hide", o: "stronger", p: "preview", e: "everything", "?": "help", escape: "cancel",
  };
  return table[lower];
}
