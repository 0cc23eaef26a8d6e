// The page: one state, one view, one canvas; everything else hangs on them.
import { Api, Offline, Problem } from "./api.js";
import { Asker } from "./asker.js";
import * as images from "./images.js";
import { listen } from "./keys.js";
import { isIn, readRle, unpackLogits } from "./masks.js";
import { Overlay } from "./overlay.js";
import { $, ask, drawCandidates, drawObjects, drawTool, factsOf, fillDialogs, make } from "./panel.js";
import { Pointer } from "./pointer.js";
import { History, changes, currentOf, fromProject, isEmpty } from "./state.js";
import { Saver } from "./saving.js";
import { TEXT } from "./text.js";
import { View, rounded } from "./view.js";

const KEPT = "tinyvit.objects", TOKEN = "tinyvit.token";
const history = new History();
const view = new View();
const overlay = new Overlay($("canvas"));
const base = new URL(".", location.href);
let picture = null, source = null, tool = "add", draft = null, cross = null, corner = null;
let isReduced = false, found = null, stop = null, hover = null, about = null, isDirty = false;

const fromHash = new URLSearchParams(location.hash.slice(1)).get("token");
if (fromHash) {
  sessionStorage.setItem(TOKEN, fromHash);
  window.history.replaceState(null, "", location.pathname + location.search);
}
const api = new Api(base, {
  token: fromHash ?? sessionStorage.getItem(TOKEN),
  async onToken() {
    await ask($("asking"));
    sessionStorage.setItem(TOKEN, $("token").value.trim());
    return $("token").value.trim();
  },
  onWait: (s) => say(s ? TEXT.waiting(s) : ""),
  onOffline: (s) => say(TEXT.offline(s)),
});
const asker = new Asker(api, {
  onAnswer: answered,
  onLost: () => { say(TEXT.lost); return api.upload(source, source.type || "application/octet-stream"); },
  onError: tell,
  onBusy: (is) => { document.body.dataset.state = is ? "answering" : "ready"; },
});
window.tinyvit = { history, view, asker, overlay, api }; // for the console, and for tests

const saver = new Saver({
  asker, base, say: (words) => say(words), tell: (error) => tell(error), state: () => history.state, source: () => source,
  picture: () => picture, about: () => about, onSaved() { isDirty = false; refresh(); },
});
const say = (words) => { $("status").textContent = words; };
function tell(error) {
  if (error.name !== "AbortError") say(error instanceof Problem || error instanceof Offline ? error.message : String(error));
}

// ---- state -> screen ----
function change(name, ...values) {
  history.apply(name, ...values);
  if (!["select", "choose", "open"].includes(name)) isDirty = true;
  refresh();
}
function refresh() {
  const state = history.state, object = currentOf(state);
  sessionStorage.setItem(KEPT, JSON.stringify(state));
  for (const one of state.objects) {
    if (state.image && !isEmpty(one) && !asker.isFresh(one) && (one === object || !asker.entryOf(one))) asker.ask(state.image, one);
  }
  drawObjects(state, (o) => asker.entryOf(o), {
    rename: (id, name) => change("rename", id, name), select: (id) => change("select", id), finish, remove,
  });
  drawCandidates(object, object && asker.answers.get(object.id), (index) => change("choose", index));
  for (const one of state.objects) if (one.given && !asker.entryOf(one)) asker.keep(one, one.given);
  $("as").hidden = !object || isEmpty(object);
  $("undo").disabled = !history.past.length;
  $("redo").disabled = !history.future.length;
  $("everything").disabled = $("add").disabled = !state.image;
  $("export").disabled = !state.objects.some((o) => !isEmpty(o) || o.given);
  $("empty").hidden = Boolean(state.image);
  redraw();
}
let isPlanned = false;
function redraw() {
  if (isPlanned) return;
  isPlanned = true;
  requestAnimationFrame(() => {
    isPlanned = false;
    const state = history.state, object = currentOf(state);
    const masks = state.objects.map((o) => ({ id: o.id, entry: asker.entryOf(o), isCurrent: o === object, dashed: false }));
    if (found) masks.push(...found.map((entry, i) => ({ id: i + 1, entry, isCurrent: false, dashed: false })));
    if (hover?.entry) masks.push({ id: object?.id ?? state.next, entry: hover.entry, isCurrent: false, dashed: true });
    overlay.draw({
      view, picture, image: state.image, masks: masks.filter((m) => m.entry),
      points: object?.points ?? [], box: object?.box ?? null, draft, cross,
    });
    $("zoom").textContent = picture ? `${Math.round(100 * view.scale)} %` : "";
    document.body.dataset.drawn = performance.now();
  });
}
function answered(id) {
  const object = history.state.objects.find((o) => o.id === id), answer = asker.answers.get(id);
  if (!object) return;
  const entry = asker.entryOf(object), { decode_ms: decode = 0, wait_ms: wait = 0 } = answer.times;
  $("times").textContent = `click ${Math.round(decode + wait)} ms${source?.encodeMs ? ` · encode ${Math.round(source.encodeMs)} ms` : ""}`;
  say(TEXT.mask(object.name, factsOf(object), entry.area, entry.score));
  if (object.finished) settleExact(object);
  refresh();
}
async function settleExact(object) {
  try {
    await asker.exact(history.state.image, [object]);
    const entry = asker.entryOf(object);
    if (entry?.area !== null) say(TEXT.mask(object.name, factsOf(object), entry.area, entry.score));
    refresh();
  } catch (error) { tell(error); }
}

// ---- images ----
async function open(file) {
  if (!file) return;
  if (file.name.endsWith(".json")) return openProject(file);
  if (!images.isImageFile(file)) return say(TEXT.notAnImage);
  const most = about?.limits.max_image_mb;
  if (file.size > most * 2 ** 20) return say(TEXT.tooLarge(most));
  if (isDirty && !confirm(TEXT.leave)) return;
  document.body.dataset.state = "uploading";
  say(TEXT.uploading((file.size / 1e6).toFixed(1)));
  try {
    let bitmap = await images.bitmapOf(file);
    let image = await api.upload(file, file.type || "application/octet-stream", bitmap ? null : 2048);
    if (bitmap && (bitmap.width !== image.width || bitmap.height !== image.height)) {
      image = await api.upload(file, file.type, 2048); // the server's upright image is what is shown
      bitmap = null;
    }
    source = file;
    source.encodeMs = image.timing.encode_ms;
    const shown = bitmap ?? (await images.bitmapOfView(image.view));
    isReduced = shown.width * shown.height > images.MOST;
    show(image, file.name, await images.forDisplay(shown));
    if (!bitmap) $("times").textContent = "";
  } catch (error) {
    document.body.dataset.state = history.state.image ? "ready" : "empty";
    tell(error);
  }
}
function show(image, name, shown) {
  picture = shown;
  found = hover = cross = corner = null;
  asker.forget();
  view.setImage(image.width, image.height);
  const kept = readKept(image.id);
  history.apply("open", { id: image.id, width: image.width, height: image.height, name });
  if (kept) history.state = { ...kept, image: history.state.image };
  isDirty = false;
  $("name").textContent = `${name}  ${image.width} × ${image.height}`;
  document.body.dataset.state = "ready";
  say(TEXT.ready);
  refresh();
  $("canvas").focus({ preventScroll: true });
}
let pending = null; // a project whose image is not open yet
function readKept(id) {
  const kept = pending ?? JSON.parse(sessionStorage.getItem(KEPT));
  pending = null;
  return kept?.image?.id === id ? kept : null;
}
async function openProject(file) {
  try {
    pending = fromProject(JSON.parse(await file.text()));
    if (history.state.image?.id === pending.image?.id) {
      history.state = { ...pending, image: history.state.image };
      pending = null;
      asker.forget();
      refresh();
    } else say(TEXT.nowOpen(pending.image?.name));
  } catch (error) { tell(error); }
}
async function examples() {
  for (const name of ["chelsea", "coffee", "rocket"]) {
    const path = new URL(`page/example-${name}.jpg`, base);
    $("examples").append(make("button", {
      "aria-label": `Open the example ${name}`,
      async onclick() {
        const blob = await (await fetch(path)).blob();
        open(new File([blob], `${name}.jpg`, { type: "image/jpeg" }));
      },
    }, make("img", { src: path, alt: "" })));
  }
}

// ---- objects ----
function click(at, label, grabbed) {
  const state = history.state, place = view.toImage(at.x, at.y);
  if (!state.image || !view.isInside(place)) return;
  if (found) return keepFound(place);
  hover = null;
  if (grabbed?.point !== undefined && label) return change("removePoint", grabbed.point);
  const { x, y } = rounded(view.clamp(place));
  change("point", x, y, label);
}
// What lies under the pointer: {point: index}, {edges: [indices of x0 y0 x1 y1]}, or null.
function grab(x, y) {
  const { points = [], box = null } = currentOf(history.state) ?? {};
  for (let i = points.length - 1; i >= 0; i--) {
    const at = view.toScreen(points[i].x, points[i].y);
    if (Math.hypot(at.x - x, at.y - y) <= 9) return { point: i };
  }
  if (!box) return null;
  const a = view.toScreen(box[0], box[1]), b = view.toScreen(box[2], box[3]);
  const isBeside = x > a.x - 5 && x < b.x + 5 && y > a.y - 5 && y < b.y + 5;
  const edges = [a.x - x, a.y - y, b.x - x, b.y - y].flatMap((d, i) => (Math.abs(d) <= 5 ? [i] : []));
  return isBeside && edges.length ? { edges: edges.filter((e) => !edges.includes(e - 2)) } : null;
}
function boxWith({ edges }, place) {
  const box = [...currentOf(history.state).box];
  for (const e of edges) box[e] = e % 2 ? place.y : place.x;
  return [Math.min(box[0], box[2]), Math.min(box[1], box[3]), Math.max(box[0], box[2]), Math.max(box[1], box[3])];
}
function setBox(box) {
  if (!history.state.image || found) return;
  const [a, b] = [rounded({ x: box[0], y: box[1] }), rounded({ x: box[2], y: box[3] })];
  if (b.x > a.x && b.y > a.y) change("box", [a.x, a.y, b.x, b.y]);
}
function finish(id = history.state.current) {
  const object = history.state.objects.find((o) => o.id === id);
  if (!object || isEmpty(object)) return;
  if (history.state.current !== id) history.apply("select", id);
  change("finish");
  say(TEXT.finished(object.name));
  settleExact(object);
}
function remove(id = history.state.current) {
  const object = history.state.objects.find((o) => o.id === id);
  if (object) { change("remove", id); say(TEXT.removed(object.name)); }
}
function step(direction) {
  const { objects, current } = history.state;
  if (!objects.length) return;
  const at = objects.findIndex((o) => o.id === current);
  change("select", objects[(at + direction + objects.length) % objects.length].id);
}
const undo = () => { if (history.undo()) { say(TEXT.undone); refresh(); } };
const redo = () => { if (history.redo()) { say(TEXT.redone); refresh(); } };

// ---- everything ----
async function everything() {
  if (!history.state.image || stop) return;
  stop = new AbortController();
  $("busy").hidden = false;
  $("progress").value = 0;
  try {
    const { id } = history.state.image;
    const answer = await asker.again(() => api.everything(id, {}, (done, total) => {
      Object.assign($("progress"), { value: done, max: total });
      say(TEXT.progress(done, total));
    }, stop.signal));
    found = answer.masks.map((mask, i) => ({ exact: readRle(mask.rle), score: mask.score, area: mask.area, given: mask, version: `e${i}` }));
    say(answer.hint ?? TEXT.everything(found.length));
  } catch (error) { tell(error); }
  stop = null;
  $("busy").hidden = true;
  redraw();
}
function keepFound(place) {
  const hits = found.filter((entry) => isIn(entry, history.state.image, place.x, place.y));
  if (!hits.length) return;
  const entry = hits.reduce((a, b) => (b.area < a.area ? b : a));
  found = found.filter((one) => one !== entry);
  const { rle, score, area, box } = entry.given;
  change("add", { given: { rle, score, area, box }, finished: true });
}

// ---- preview while the pointer rests ----
let rest = null, isPreviewing = false;
function hovering(at) {
  clearTimeout(rest);
  if (!at) { hover = null; return redraw(); }
  const place = view.toImage(at.x, at.y);
  $("where").textContent = view.isInside(place) ? TEXT.at(Math.floor(place.x), Math.floor(place.y)) : "";
  if (hover && Math.hypot(hover.at.x - at.x, hover.at.y - at.y) > 3) { hover = null; redraw(); }
  if (!$("preview").checked || found || !view.isInside(place) || !history.state.image) return;
  rest = setTimeout(() => preview(at, rounded(place)), 40);
}
async function preview(at, { x, y }) {
  if (isPreviewing) return;
  isPreviewing = true;
  const object = currentOf(history.state) ?? changes.begin(history.state).objects.at(-1);
  const points = [...object.points.map((p) => [p.x, p.y]), [x, y]], labels = [...object.points.map((p) => p.label), tool === "minus" ? 0 : 1];
  const prompt = { points, labels, ...(object.box ? { box: object.box } : {}) };
  const start = performance.now(), before = history.state, isStale = () => history.state !== before; // a click came between
  try {
    const answer = await api.segment(history.state.image.id, { prompts: [prompt], include: ["low_res"], preview: true }, { isPreview: true });
    const mask = answer.objects[0].masks[0];
    if (!isStale()) hover = { at, entry: { logits: unpackLogits(mask.low_res, asker.threshold), score: mask.score, version: `h${start}` } };
    redraw();
    if (performance.now() - start > 300 && !isStale()) slow();
  } catch (error) {
    if (error instanceof Problem && error.status === 503 && !isStale()) slow();
  }
  await new Promise((done) => setTimeout(done, 100));
  isPreviewing = false;
}
function slow() {
  $("preview").checked = false;
  say(TEXT.previewOff);
}

// ---- keys ----
const pan = (dx, dy) => { view.move(-30 * dx, -30 * dy); redraw(); };
function moveCross(dx, dy) {
  const state = history.state;
  if (!state.image) return false;
  cross ??= { x: Math.round(view.width / 2), y: Math.round(view.height / 2) };
  cross = { x: Math.min(Math.max(cross.x + dx, 0), view.width), y: Math.min(Math.max(cross.y + dy, 0), view.height) };
  if (corner) draft = [Math.min(corner.x, cross.x), Math.min(corner.y, cross.y), Math.max(corner.x, cross.x), Math.max(corner.y, cross.y)];
  redraw();
}
function settle() {
  if (!cross) return;
  const inside = history.state.objects.find((o) => asker.entryOf(o) && isIn(asker.entryOf(o), history.state.image, cross.x, cross.y));
  say(TEXT.at(cross.x, cross.y, inside?.name));
}
function atCross(label) {
  if (!cross) return false;
  if (corner) {
    const box = draft;
    corner = draft = null;
    return box ? setBox(box) : undefined;
  }
  if (found) return keepFound(cross);
  change("point", cross.x, cross.y, label);
}
const zoom = (factor, x, y) => { view.zoom(factor, x, y); redraw(); sharpen().catch(tell); };
// A large image is shown reduced until somebody looks closer.
async function sharpen() {
  if (!isReduced || !source || view.scale * devicePixelRatio * view.width <= picture.width) return;
  isReduced = false;
  const [shown, full] = [picture, await images.bitmapOf(source)];
  if (full && picture === shown) { picture = full; redraw(); }
}
const choose = (index) => {
  const object = currentOf(history.state);
  if (object && asker.answers.get(object.id)?.masks.length > index) change("choose", index); else return false;
};
listen(document, {
  step: moveCross, pan, settle, plus: () => atCross(1), minus: () => atCross(0),
  box() { if (!cross) moveCross(0, 0); corner = cross && { ...cross }; say(TEXT.boxStart); },
  next() { finish(); change("begin"); }, before: () => step(-1), after: () => step(1), remove: () => remove(),
  first: () => choose(0), second: () => choose(1), third: () => choose(2), undo, redo,
  zoomIn: () => zoom(1.25), zoomOut: () => zoom(0.8), actual: () => zoom(1 / view.scale), fit() { view.fit(); redraw(); },
  space(is) { pointer.hasSpace = is; }, hide() { overlay.isHidden = !overlay.isHidden; redraw(); },
  stronger: () => fade(10), fainter: () => fade(-10), preview() { $("preview").click(); }, everything,
  save() { saver.save(); }, copy() { saver.copyMask().catch(tell); }, open() { $("file").click(); }, help() { $("keys").showModal(); },
  cancel() { stop?.abort(); found = draft = corner = hover = null; redraw(); },
});
function fade(by) {
  $("opacity").value = Number($("opacity").value) + by;
  overlay.opacity = $("opacity").value / 100;
  redraw();
}

// ---- wiring ----
const pointer = new Pointer($("canvas"), {
  view, tool: () => tool, grab, onClick: click, onBox: setBox, onHover: hovering, onDouble: () => finish(),
  onDraft(box) { draft = box; redraw(); }, onPan(dx, dy) { view.move(dx, dy); redraw(); }, onZoom: zoom,
  onDrag(grabbed, place) { if (grabbed.edges) { draft = boxWith(grabbed, place); redraw(); } },
  onDrop(grabbed, place) {
    const { x, y } = rounded(place);
    if (grabbed.edges) setBox(boxWith(grabbed, place)); else change("movePoint", grabbed.point, x, y);
  },
});
for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => { tool = button.dataset.tool; drawTool(tool); });
}
for (const button of document.querySelectorAll("[data-as]")) button.addEventListener("click", () => saver.copyText(button.dataset.as));
const wire = (id, action) => $(id).addEventListener("click", action);
wire("undo", undo); wire("redo", redo); wire("add", () => change("begin")); wire("everything", everything); wire("export", () => saver.save());
wire("in", () => zoom(1.25)); wire("out", () => zoom(0.8)); wire("fit", () => { view.fit(); redraw(); });
wire("help", () => $("keys").showModal()); wire("stop", () => stop?.abort());
wire("paste", async () => { try { await open(await images.fromClipboard()); } catch { say(TEXT.pasteByKey); } });
wire("theme", () => {
  const isDark = getComputedStyle(document.documentElement).getPropertyValue("--paper").trim() !== "#fff";
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
});
$("file").addEventListener("change", () => { open($("file").files[0]); $("file").value = ""; });
$("opacity").addEventListener("input", () => fade(0));
document.addEventListener("paste", (event) => { const [file] = images.fromPaste(event); if (file) { event.preventDefault(); open(file); } });
const stage = $("stage");
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (e) => { e.preventDefault(); stage.classList.add("over"); });
document.addEventListener("dragleave", (e) => { if (!e.relatedTarget) stage.classList.remove("over"); });
document.addEventListener("drop", (e) => { e.preventDefault(); stage.classList.remove("over"); open(images.fromDrop(e)[0]); });
window.addEventListener("beforeunload", (e) => { if (isDirty && history.hasUnsaved()) e.preventDefault(); });
new ResizeObserver(() => { view.resize(stage.clientWidth, stage.clientHeight); redraw(); }).observe(stage);

fillDialogs();
drawTool(tool);
$("invitation").textContent = TEXT.empty;
document.body.dataset.state = "empty";
view.resize(stage.clientWidth, stage.clientHeight);
refresh();
examples();
api.about().then((facts) => { about = facts; asker.threshold = facts.thresholds.mask_threshold ?? 0; document.title = `tinyvit · ${about.model?.name ?? ""}`; }).catch(tell);
