// Ask the server for masks: one request in flight, the newest waiting one replaces the older.
import { Problem } from "./api.js";
import { keyOf, promptOf } from "./state.js";
import { readRle, unpackLogits } from "./masks.js";

let versions = 0;

export class Asker {
  // onAnswer(object id), onLost() -> promise: sends the image again, onError(error)
  constructor(api, { onAnswer, onLost, onError, onBusy }) {
    Object.assign(this, { api, onAnswer, onLost, onError, onBusy });
    this.answers = new Map(); // object id -> {key, masks, best, times}
    this.waiting = null;
    this.isAsking = false;
  }
  forget() {
    this.answers.clear();
    this.waiting = null;
  }
  isFresh(object) {
    return this.answers.get(object.id)?.key === keyOf(object);
  }
  // The mask that is shown for an object: {logits | exact, version, score, area}, or null.
  entryOf(object) {
    const answer = this.answers.get(object.id);
    if (!answer) return null;
    return answer.masks[object.chosen ?? answer.best] ?? answer.masks[answer.best] ?? null;
  }
  ask(image, object) {
    this.waiting = { image, object };
    if (!this.isAsking) this.run();
  }
  async run() {
    this.isAsking = true;
    while (this.waiting) {
      const { image, object } = this.waiting;
      this.waiting = null;
      if (this.isFresh(object)) continue;
      this.onBusy(true);
      try {
        const request = { prompts: [promptOf(object)], which: "all", include: ["low_res"] };
        const start = performance.now();
        const found = await this.again(() => this.api.segment(image.id, request));
        this.take(object, found.objects[0], { ...found.timing, round_ms: performance.now() - start });
      } catch (error) {
        this.onError(error);
      }
      this.onBusy(false);
    }
    this.isAsking = false;
  }
  take(object, found, times) {
    const masks = found.masks.map((mask) => ({
      logits: unpackLogits(mask.low_res), score: mask.score, area: null, version: ++versions,
    }));
    this.answers.set(object.id, { key: keyOf(object), masks, best: found.best, times });
    this.onAnswer(object.id);
  }
  // A server that has forgotten the image gets it again.
  async again(work) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof Problem) || error.name !== "unknown-image") throw error;
      await this.onLost();
      return work();
    }
  }
  // The exact masks of objects: what is shown from then on, and what is saved.
  async exact(image, objects, tolerance = 0, polygons = false) {
    const include = polygons ? ["rle", "polygons"] : ["rle"];
    const found = [];
    for (const object of objects) {
      if (object.given) {
        const extra = polygons ? await this.polygonsOf(image, object, tolerance) : {};
        found.push({ object, ...object.given, ...extra });
        continue;
      }
      const request = { prompts: [promptOf(object)], which: "all", include, tolerance };
      const answer = (await this.again(() => this.api.segment(image.id, request))).objects[0];
      const mask = answer.masks[object.chosen ?? answer.best];
      const kept = this.answers.get(object.id);
      if (kept?.key === keyOf(object)) {
        const entry = kept.masks[object.chosen ?? kept.best];
        Object.assign(entry, { exact: readRle(mask.rle), area: mask.area, version: ++versions });
      }
      found.push({ object, ...mask });
    }
    return found;
  }
  // Outlines of a mask that came from everything mode: it is its own prompt.
  async polygonsOf(image, object, tolerance) {
    const rings = ringsOf(readRle(object.given.rle));
    return { polygons: tolerance ? rings.map((ring) => ring.filter((_, i) => i % Math.ceil(tolerance) === 0)) : rings };
  }
  keep(object, given) {
    const entry = { exact: readRle(given.rle), score: given.score, area: given.area, version: ++versions };
    this.answers.set(object.id, { key: keyOf(object), masks: [entry], best: 0, times: {} });
  }
}

// Exact outlines of a mask: corners pair up by row and by column (as tinyvit.sam.contours).
export function ringsOf({ width, height, data }) {
  const at = (x, y) => (x >= 0 && y >= 0 && x < width && y < height ? data[y * width + x] : 0);
  const xs = [], ys = [];
  for (let y = 0; y <= height; y++) {
    for (let x = 0; x <= width; x++) {
      const a = at(x - 1, y - 1), b = at(x, y - 1), c = at(x - 1, y), d = at(x, y);
      const times = a ^ b ^ c ^ d ? 1 : a === d && a !== b ? 2 : 0;
      for (let i = 0; i < times; i++) { xs.push(x); ys.push(y); }
    }
  }
  const order = xs.map((_, i) => i).sort((i, j) => xs[i] - xs[j] || ys[i] - ys[j] || i - j);
  const below = new Int32Array(xs.length);
  for (let i = 0; i < order.length; i += 2) { below[order[i]] = order[i + 1]; below[order[i + 1]] = order[i]; }
  const used = new Uint8Array(xs.length), rings = [];
  for (let start = 0; start < xs.length; start++) {
    const ring = [];
    for (let i = start; !used[i]; i = below[i ^ 1]) {
      used[i] = used[i ^ 1] = 1;
      ring.push([xs[i], ys[i]], [xs[i ^ 1], ys[i ^ 1]]);
    }
    if (ring.length) rings.push(at(xs[start], ys[start]) ? ring : ring.reverse());
  }
  return rings;
}
