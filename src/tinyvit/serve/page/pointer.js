// Pointer events on the canvas -> what is meant: click, box, drag of a point, move, zoom.
const MOVED = 4; // CSS pixels that decide between a click and a drag
const LONG_PRESS = 400; // ms
const DOUBLE = 350; // ms between the two presses of a double click

export class Pointer {
  // page: {view, tool(), grab(x, y), onClick, onBox, onDraft, onDrag, onDrop, onPan, onZoom, onHover, onDouble}
  constructor(canvas, page) {
    this.page = page;
    this.canvas = canvas;
    this.down = new Map(); // pointer id -> position
    this.gesture = null;
    this.hasSpace = false;
    canvas.addEventListener("pointerdown", (e) => this.begin(e));
    canvas.addEventListener("pointermove", (e) => this.move(e));
    canvas.addEventListener("pointerup", (e) => this.end(e));
    canvas.addEventListener("pointercancel", (e) => this.cancel(e));
    canvas.addEventListener("pointerleave", () => page.onHover(null));
    canvas.addEventListener("contextmenu", (e) => e.preventDefault());
    canvas.addEventListener("dblclick", (e) => e.preventDefault());
    this.lastClick = { time: -DOUBLE, place: { x: 0, y: 0 } };
    canvas.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
  }
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }
  begin(event) {
    event.preventDefault();
    this.canvas.focus({ preventScroll: true });
    try { this.canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone */ }
    const at = this.at(event);
    this.down.set(event.pointerId, at);
    if (this.down.size === 2) {
      clearTimeout(this.press);
      this.page.onDraft(null);
      this.gesture = { kind: "pinch", ...this.pinch() };
      return;
    }
    const isMinus = event.button === 2 || event.shiftKey || event.altKey || this.page.tool() === "minus";
    const pans = event.button === 1 || this.hasSpace || (this.page.tool() === "move" && event.button === 0);
    const grabbed = pans ? null : this.page.grab(at.x, at.y);
    this.gesture = { kind: pans ? "pan" : "press", start: at, last: at, isMinus, grabbed, isTouch: event.pointerType === "touch" };
    if (this.gesture.isTouch && !pans) {
      this.press = setTimeout(() => {
        if (this.gesture?.kind === "press") this.finish({ ...this.gesture, isMinus: true });
      }, LONG_PRESS);
    }
  }
  pinch() {
    const [a, b] = [...this.down.values()];
    return { distance: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  }
  move(event) {
    const at = this.at(event);
    if (!this.down.has(event.pointerId)) {
      this.page.onHover(at);
      return;
    }
    this.down.set(event.pointerId, at);
    const own = this.gesture;
    if (!own) return;
    if (own.kind === "pinch") {
      const now = this.pinch();
      if (own.distance > 0) this.page.onZoom(now.distance / own.distance, now.x, now.y);
      this.page.onPan(now.x - own.x, now.y - own.y);
      Object.assign(own, now);
      return;
    }
    if (own.kind === "press" && Math.hypot(at.x - own.start.x, at.y - own.start.y) > MOVED) {
      clearTimeout(this.press);
      own.kind = own.grabbed !== null ? "drag" : "box";
    }
    if (own.kind === "drag") this.page.onDrag(own.grabbed, this.placeOf(at));
    if (own.kind === "pan") this.page.onPan(at.x - own.last.x, at.y - own.last.y);
    if (own.kind === "box") this.page.onDraft(this.boxOf(own.start, at));
    own.last = at;
  }
  placeOf({ x, y }) {
    return this.page.view.clamp(this.page.view.toImage(x, y));
  }
  boxOf(a, b) {
    const view = this.page.view;
    const from = view.clamp(view.toImage(a.x, a.y)), to = view.clamp(view.toImage(b.x, b.y));
    return [Math.min(from.x, to.x), Math.min(from.y, to.y), Math.max(from.x, to.x), Math.max(from.y, to.y)];
  }
  end(event) {
    const own = this.gesture;
    this.down.delete(event.pointerId);
    clearTimeout(this.press);
    if (!own) return;
    if (own.kind === "pinch") {
      if (!this.down.size) this.gesture = null;
      return;
    }
    this.finish({ ...own, last: this.at(event) });
  }
  finish(own) {
    clearTimeout(this.press);
    this.gesture = null;
    this.page.onDraft(null);
    if (own.kind === "box") {
      const box = this.boxOf(own.start, own.last);
      if (box[2] > box[0] && box[3] > box[1]) this.page.onBox(box);
    } else if (own.kind === "drag") {
      this.page.onDrop(own.grabbed, this.placeOf(own.last));
    } else if (own.kind === "press") {
      const { x, y } = own.start, last = this.lastClick, time = performance.now();
      const before = this.page.view.toScreen(last.place.x, last.place.y);
      const isDouble = time - last.time < DOUBLE && Math.hypot(x - before.x, y - before.y) <= MOVED;
      this.lastClick = { time: isDouble ? -DOUBLE : time, place: this.page.view.toImage(x, y) };
      if (isDouble) this.page.onDouble();
      else this.page.onClick(own.start, own.isMinus ? 0 : 1, own.grabbed);
    }
  }
  cancel(event) {
    this.down.delete(event.pointerId);
    clearTimeout(this.press);
    this.gesture = null;
    this.page.onDraft(null);
  }
  wheel(event) {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    const at = this.at(event);
    this.page.onZoom(Math.exp((-event.deltaY * lines) / 400), at.x, at.y);
  }
}
