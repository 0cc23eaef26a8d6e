// One transform between the pixels of the image and those of the screen. Pure.
export class View {
  constructor() {
    this.width = this.height = 1; // of the image
    this.boxWidth = this.boxHeight = 1; // of the canvas, in CSS pixels
    this.scale = 1; // CSS pixels for one of the image
    this.x = this.y = 0; // where the image's corner is, in CSS pixels
  }
  setImage(width, height) {
    Object.assign(this, { width, height });
    this.fit();
  }
  resize(boxWidth, boxHeight) {
    const fitted = this.isFitted();
    const middle = this.toImage(this.boxWidth / 2, this.boxHeight / 2);
    Object.assign(this, { boxWidth, boxHeight });
    if (fitted) return this.fit();
    this.x = boxWidth / 2 - middle.x * this.scale;
    this.y = boxHeight / 2 - middle.y * this.scale;
    this.keepInside();
  }
  fitScale() {
    return Math.min(this.boxWidth / this.width, this.boxHeight / this.height);
  }
  isFitted() {
    return Math.abs(this.scale - this.fitScale()) < 1e-9;
  }
  fit() {
    this.scale = this.fitScale();
    this.x = (this.boxWidth - this.width * this.scale) / 2;
    this.y = (this.boxHeight - this.height * this.scale) / 2;
  }
  zoom(factor, atX = this.boxWidth / 2, atY = this.boxHeight / 2) {
    const before = this.toImage(atX, atY);
    const least = Math.min(this.fitScale(), 1) / 4;
    this.scale = Math.min(Math.max(this.scale * factor, least), 64);
    this.x = atX - before.x * this.scale;
    this.y = atY - before.y * this.scale;
    this.keepInside();
  }
  move(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.keepInside();
  }
  keepInside() {
    const margin = 40;
    const limit = (value, size, box) => Math.min(Math.max(value, margin - size), box - margin);
    this.x = limit(this.x, this.width * this.scale, this.boxWidth);
    this.y = limit(this.y, this.height * this.scale, this.boxHeight);
  }
  toImage(x, y) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }
  toScreen(x, y) {
    return { x: x * this.scale + this.x, y: y * this.scale + this.y };
  }
  isInside({ x, y }) {
    return x >= 0 && y >= 0 && x <= this.width && y <= this.height;
  }
  clamp({ x, y }) {
    return { x: Math.min(Math.max(x, 0), this.width), y: Math.min(Math.max(y, 0), this.height) };
  }
}

// A coordinate as it is sent: a quarter of a pixel is finer than any click.
export const rounded = ({ x, y }) => ({ x: Math.round(x * 4) / 4, y: Math.round(y * 4) / 4 });
