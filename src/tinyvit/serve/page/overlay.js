// Draw the image, the masks and the prompts on one canvas of the size that is seen.
import { enlarge, sampleExact } from "./masks.js";

// Okabe and Ito's palette: distinct also for the colour blind; a stripe pattern each besides.
export const COLOURS = [
  [86, 180, 233], [230, 159, 0], [0, 158, 115], [204, 121, 167], [240, 228, 66], [0, 114, 178], [213, 94, 0],
];
export const colourOf = (id) => COLOURS[(id - 1) % COLOURS.length];

export class Overlay {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: false });
    this.layer = document.createElement("canvas");
    this.cache = new Map();
    this.opacity = 0.45;
    this.isHidden = false;
  }
  resize(view) {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(view.boxWidth * ratio), Math.round(view.boxHeight * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = this.layer.width = width;
      this.canvas.height = this.layer.height = height;
    }
    return ratio;
  }
  // masks: [{id, entry, isCurrent, dashed}], entry: {logits | exact, version}
  draw({ view, picture, masks, points, box, draft, cross, image }) {
    const ratio = this.resize(view);
    const own = this.context;
    own.setTransform(1, 0, 0, 1, 0, 0);
    own.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!picture) return;
    own.imageSmoothingEnabled = view.scale < 2;
    own.drawImage(
      picture, view.x * ratio, view.y * ratio, view.width * view.scale * ratio, view.height * view.scale * ratio,
    );
    if (!this.isHidden && masks.length) this.drawMasks(view, ratio, masks, image);
    own.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (box) this.drawBox(view, box, false);
    if (draft) this.drawBox(view, draft, true);
    for (const point of points) this.drawPoint(view.toScreen(point.x, point.y), point.label);
    if (cross) this.drawCross(view.toScreen(cross.x, cross.y));
  }
  windowOf(view, ratio) {
    const step = 1 / (view.scale * ratio);
    return { x: -view.x / view.scale, y: -view.y / view.scale, step, width: this.canvas.width, height: this.canvas.height };
  }
  drawMasks(view, ratio, masks, image) {
    const window_ = this.windowOf(view, ratio);
    const key = [window_.x, window_.y, window_.step, window_.width, window_.height].join();
    if (this.pixels?.width !== window_.width || this.pixels.height !== window_.height) {
      this.pixels = new ImageData(window_.width, window_.height);
    }
    const words = new Uint32Array(this.pixels.data.buffer); // all of them are written below
    const seen = new Set();
    const draw = (target, { id, entry, isCurrent, dashed }) => {
      const name = `${id}:${entry.version}:${key}`;
      let mask = this.cache.get(name);
      if (!mask) {
        mask = entry.exact ? sampleExact(entry.exact, window_) : enlarge(entry.logits, image, window_);
        mask.box = boxOf(mask, window_.width, window_.height);
        this.cache.set(name, mask);
      }
      paint(target, mask, window_.width, window_.height, colourOf(id), id, isCurrent, dashed, this.opacity, ratio);
    };
    for (const { id, entry } of masks) seen.add(`${id}:${entry.version}:${key}`);
    // Masks that nobody works on are painted once: only new ones are added, until something else changes.
    const still = masks.filter((m) => !m.isCurrent && !m.dashed);
    const names = still.map((m) => `${m.id}:${m.entry.version}`), frame = `${key}:${this.opacity}`;
    if (this.still?.frame !== frame || this.still.names.some((name, i) => name !== names[i])) {
      this.still = { frame, names: [], words: new Uint32Array(words.length) };
    }
    for (const mask of still.slice(this.still.names.length)) draw(this.still.words, mask);
    this.still.names = names;
    words.set(this.still.words);
    for (const mask of masks) if (!still.includes(mask)) draw(words, mask);
    for (const name of this.cache.keys()) if (!seen.has(name)) this.cache.delete(name);
    this.layer.getContext("2d").putImageData(this.pixels, 0, 0);
    this.context.drawImage(this.layer, 0, 0);
  }
  drawPoint({ x, y }, label) {
    const own = this.context;
    own.beginPath();
    own.arc(x, y, 7, 0, 2 * Math.PI);
    own.fillStyle = label ? "#0a7d3c" : "#c3282d";
    own.fill();
    own.lineWidth = 2;
    own.strokeStyle = "#fff";
    own.stroke();
    own.beginPath();
    own.moveTo(x - 3.5, y);
    own.lineTo(x + 3.5, y);
    if (label) {
      own.moveTo(x, y - 3.5);
      own.lineTo(x, y + 3.5);
    }
    own.stroke();
  }
  drawBox(view, box, isDraft) {
    const a = view.toScreen(box[0], box[1]), b = view.toScreen(box[2], box[3]);
    const own = this.context;
    for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
      own.setLineDash(isDraft && width === 2 ? [6, 4] : []);
      own.strokeStyle = colour;
      own.lineWidth = width;
      own.strokeRect(a.x, a.y, b.x - a.x, b.y - a.y);
    }
    own.setLineDash([]);
  }
  drawCross({ x, y }) {
    const own = this.context;
    for (const [colour, width] of [["#000", 3], ["#fff", 1]]) {
      own.strokeStyle = colour;
      own.lineWidth = width;
      own.beginPath();
      own.moveTo(x - 14, y); own.lineTo(x + 14, y);
      own.moveTo(x, y - 14); own.lineTo(x, y + 14);
      own.stroke();
    }
  }
}

// Columns and rows within which a mask has pixels: [x0, y0, x1, y1]; most masks are small.
function boxOf(mask, width, height) {
  let [x0, y0, x1, y1] = [width, height, 0, 0];
  for (let y = 0; y < height; y++) {
    const row = mask.subarray(y * width, (y + 1) * width), first = row.indexOf(1);
    if (first < 0) continue;
    x0 = Math.min(x0, first);
    x1 = Math.max(x1, row.lastIndexOf(1) + 1);
    y0 = Math.min(y0, y);
    y1 = y + 1;
  }
  return [x0, y0, x1, y1];
}

// Striped fill and two-tone outline, straight into 32-bit pixels (little endian: ABGR).
function paint(words, mask, width, height, [r, g, b], id, isCurrent, dashed, opacity, ratio) {
  const colour = (b << 16) | (g << 8) | r;
  const weak = (Math.round(255 * opacity) << 24) | colour;
  const strong = (Math.round(255 * Math.min(1, opacity + 0.2)) << 24) | colour;
  const white = (255 << 24) | 0xffffff, around = (255 << 24) | (isCurrent || dashed ? 0x101010 : colour);
  const period = Math.round(10 * ratio), thick = Math.max(1, Math.round(ratio)), below = thick * width;
  const [sx, sy] = [[1, 1], [1, -1], [1, 0], [0, 1], [2, 1]][id % 5];
  const rows = Array.from({ length: period }, (_, k) => // the stripes repeat after so many rows
    Uint32Array.from({ length: width }, (_, x) => (((x * sx + k) % period) * 2 < period ? strong : weak)));
  const [x0, y0, x1, y1] = mask.box;
  const first = Math.max(x0 - thick, 0), last = Math.min(x1 + thick, width);
  for (let y = Math.max(y0 - thick, 0); y < Math.min(y1 + thick, height); y++) {
    const fill = rows[(((y * sy) % period) + period) % period], hasUp = y >= thick, hasDown = y < height - thick;
    for (let x = first, i = y * width + first; x < last; x++, i++) {
      const near = (x >= thick ? mask[i - thick] : 0) + (x < width - thick ? mask[i + thick] : 0) +
        (hasUp ? mask[i - below] : 0) + (hasDown ? mask[i + below] : 0);
      if (mask[i]) {
        if (near === 4) { if (!dashed) words[i] = fill[x]; }
        else if (!dashed || ((x + y) / period) & 1) words[i] = white;
      } else if (near && (!dashed || ((x + y) / period) & 1)) words[i] = around;
    }
  }
}
