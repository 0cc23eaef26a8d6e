// Outlines of masks: exact along the edges of pixels, or simplified. Pure.
// Exact outlines of a mask: corners pair up by row and by column (as tinyvit.images.mask_ops).
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

// Fewer corners, at most `tolerance` pixels beside the exact ones (Douglas and Peucker, 1973).
export function simplify(ring, tolerance) {
  if (!tolerance) return ring;
  const far = ring.reduce((best, p, i) => (away(p, ring[0]) > away(ring[best], ring[0]) ? i : best), 0);
  const closed = [...ring, ring[0]], keep = new Set([0, far]), parts = [[0, far], [far, ring.length]];
  while (parts.length) {
    const [first, last] = parts.pop();
    let worst = 0, place = 0;
    for (let i = first + 1; i < last; i++) {
      const distance = beside(closed[i], closed[first], closed[last]);
      if (distance > worst) [worst, place] = [distance, i];
    }
    if (worst > tolerance) {
      keep.add(place);
      parts.push([first, place], [place, last]);
    }
  }
  return ring.filter((_, i) => keep.has(i));
}

const away = ([x, y], [u, v]) => Math.hypot(x - u, y - v);
function beside(p, a, b) {
  const length = away(a, b);
  return length ? Math.abs((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])) / length : away(p, a);
}

// The outlines of a mask {width, height, data}; those that simplify to a line are left out.
export const outlines = (mask, tolerance = 0) =>
  ringsOf(mask).map((ring) => simplify(ring, tolerance)).filter((ring) => ring.length > 2);
