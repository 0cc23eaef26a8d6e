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
    this.threshold = 0; // logits above it are mask
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
      logits: unpackLogits(mask.low_res, this.threshold), score: mask.score, area: null, version: ++versions,
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
  // The exact masks of objects, [{object, score, area, box, rle, mask}]: what is shown from then on, and saved.
  async exact(image, objects) {
    const found = [];
    for (const object of objects) {
      let made = object.given;
      if (!made) {
        const which = object.chosen === null ? "best" : "all";
        const request = { prompts: [promptOf(object)], which, include: ["rle"] };
        const { masks } = (await this.again(() => this.api.segment(image.id, request))).objects[0];
        made = masks[object.chosen ?? 0];
      }
      const mask = readRle(made.rle), kept = this.answers.get(object.id);
      if (kept?.key === keyOf(object)) {
        Object.assign(kept.masks[object.chosen ?? kept.best], { exact: mask, area: made.area, version: ++versions });
      }
      found.push({ object, ...made, mask });
    }
    return found;
  }
  keep(object, given) {
    const entry = { exact: readRle(given.rle), score: given.score, area: given.area, version: ++versions };
    this.answers.set(object.id, { key: keyOf(object), masks: [entry], best: 0, times: {} });
  }
}
