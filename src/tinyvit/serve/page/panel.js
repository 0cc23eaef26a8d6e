// The list of objects, the candidates, the dialogs: what stands beside the image.
import { colourOf } from "./overlay.js";
import { KEYS } from "./keys.js";
import { FORMATS } from "./exports.js";
import { TEXT } from "./text.js";

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const own = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) own.addEventListener(name.slice(2), value);
    else if (value === true) own.setAttribute(name, "");
    else if (value !== false && value !== null) own.setAttribute(name, value);
  }
  own.append(...children);
  return own;
}

export function factsOf(object, entry) {
  const what = [object.points.length ? TEXT.points(object.points.length) : null, object.box ? TEXT.box : null];
  return what.filter(Boolean).join(", ") || (object.given ? "mask" : "…");
}

export function drawObjects(state, entryOf, on) {
  const kept = document.activeElement?.closest?.("#objects li")?.dataset.id;
  const focused = kept && document.activeElement.dataset.act;
  $("objects").replaceChildren(...state.objects.map((object) => {
    const entry = entryOf(object), isCurrent = object.id === state.current;
    const name = make("input", {
      value: object.name, "aria-label": `Name of ${object.name}`, maxlength: 200, "data-act": "name",
      onchange: (e) => on.rename(object.id, e.target.value),
    });
    const score = entry ? make("b", {}, ` ${entry.score.toFixed(2)}`) : "";
    const acts = make("div", { class: "acts" },
      make("button", { "aria-label": `Edit ${object.name}`, "aria-pressed": String(isCurrent), "data-act": "edit", onclick: () => on.select(object.id) }, "Edit"),
      make("button", { "aria-label": `Finish ${object.name}`, "data-act": "finish", onclick: () => on.finish(object.id) }, object.finished ? "Done ✓" : "Finish"),
      make("button", { "aria-label": `Delete ${object.name}`, "data-act": "remove", onclick: () => on.remove(object.id) }, "Delete"));
    const item = make("li", { class: isCurrent ? "current" : "", "data-id": object.id }, name,
      make("div", { class: "facts" }, factsOf(object, entry), score), acts);
    item.style.setProperty("--own", `rgb(${colourOf(object.id).join()})`);
    return item;
  }));
  if (kept) $("objects").querySelector(`[data-id="${kept}"] [data-act="${focused}"]`)?.focus();
}

export function drawCandidates(object, answer, onChoose) {
  const has = Boolean(object && answer && answer.masks.length > 1);
  $("candidates").hidden = !has;
  if (!has) return;
  const chosen = object.chosen ?? answer.best;
  const kept = document.activeElement?.dataset?.candidate;
  $("choices").replaceChildren(...answer.masks.map((mask, index) => make("button", {
    role: "radio", "aria-checked": String(index === chosen), "data-candidate": index,
    "aria-label": TEXT.candidate(index + 1, mask.score), onclick: () => onChoose(index),
  }, `${index + 1}`)));
  if (kept !== undefined) $("choices").querySelector(`[data-candidate="${kept}"]`)?.focus();
}

export function drawTool(tool) {
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-checked", String(button.dataset.tool === tool));
  }
  $("stage").classList.toggle("moves", tool === "move");
}

export function fillDialogs() {
  $("keys").querySelector("table").append(...KEYS.map(([keys, words]) =>
    make("tr", {}, make("th", { scope: "row" }, keys), make("td", {}, words))));
  $("formats").append(...FORMATS.map(([name, words], index) => make("label", {},
    make("input", { type: "radio", name: "format", value: name, checked: index === 0 }), ` ${words}`)));
  for (const group of document.querySelectorAll("[role=radiogroup]")) group.addEventListener("keydown", moveInGroup);
}

// Arrows choose in a group of radio buttons, as everywhere; they do not reach the crosshair.
function moveInGroup(event) {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  event.stopPropagation();
  const group = event.currentTarget, all = [...group.querySelectorAll("[role=radio]")];
  const next = (all.indexOf(document.activeElement) + step + all.length) % all.length;
  all[next].focus();
  all[next].click();
  group.querySelectorAll("[role=radio]")[next]?.focus();
}

// Opens a dialog; resolves with its return value when it closes. One at a time: a dialog's "close" comes late, and
// would be taken for that of the next.
let asked = Promise.resolve();
export function ask(dialog) {
  asked = asked.then(() => new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue), { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  }));
  return asked;
}
