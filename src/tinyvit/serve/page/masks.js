// Masks in numbers: unpack low-res logits, enlarge them, read run lengths. Pure.
export function unpackLogits(lowRes, threshold = 0) {
  const raw = atob(lowRes.data);
  const [height, width] = lowRes.size;
  const values = new Float32Array(height * width);
  for (let i = 0; i < values.length; i++) {
    const q = (raw.charCodeAt(i) << 24) >> 24;
    values[i] = Math.sign(q) * (q / 32) ** 2 - threshold;
  }
  return { height, width, values, inputSize: lowRes.input_size, stride: lowRes.logit_stride };
}

// Places and weights along one axis: `count` samples from `first` on, `step` image pixels apart. The server enlarges
// logits twice, to the model's input and from there to the image; together that is a sum of three logits in a row.
function axis(count, first, step, imageSize, inputSize, stride, cells) {
  const low = new Int32Array(count), weights = new Float32Array(3 * count);
  const limit = (value, most) => Math.min(Math.max(value, 0), most);
  const add = (i, at, weight) => {
    const cell = Math.floor(at), part = at - cell, place = 3 * i + cell - low[i];
    weights[place] += weight * (1 - part);
    if (part) weights[place + 1] += weight * part;
  };
  for (let i = 0; i < count; i++) {
    const at = limit(((first + (i + 0.5) * step) * inputSize) / imageSize - 0.5, inputSize - 1), pixel = Math.floor(at);
    const [a, b] = [pixel, pixel + 1].map((one) => limit((one + 0.5) / stride - 0.5, cells - 1));
    low[i] = limit(Math.floor(a), cells - 3);
    add(i, a, 1 - (at - pixel));
    if (at > pixel) add(i, b, at - pixel);
  }
  return { low, weights };
}

// The mask in a window of the image: [height * width] bytes, 1 where it is.
// window: {x, y, step, width, height}, x y in image pixels, step image pixels for one sample.
export function enlarge(logits, image, window) {
  const { width, height } = window;
  const across = axis(width, window.x, window.step, image.width, logits.inputSize[1], logits.stride, logits.width);
  const down = axis(height, window.y, window.step, image.height, logits.inputSize[0], logits.stride, logits.height);
  const out = new Uint8Array(width * height);
  const row = new Float32Array(logits.width);
  const firstX = Math.max(0, Math.ceil(-window.x / window.step - 0.5));
  const lastX = Math.min(width, Math.ceil((image.width - window.x) / window.step - 0.5));
  const firstY = Math.max(0, Math.ceil(-window.y / window.step - 0.5));
  const lastY = Math.min(height, Math.ceil((image.height - window.y) / window.step - 0.5));
  // Samples of one cell lie side by side: where its three logits have one sign, so have all its samples.
  const ends = [];
  for (let x = firstX; x < lastX; x++) if (x + 1 === lastX || across.low[x + 1] !== across.low[x]) ends.push(x + 1);
  for (let y = firstY; y < lastY; y++) {
    const a = down.low[y] * logits.width, b = a + logits.width, c = b + logits.width;
    const [p, q, r] = down.weights.subarray(3 * y, 3 * y + 3);
    for (let i = 0; i < logits.width; i++) {
      row[i] = logits.values[a + i] * p + logits.values[b + i] * q + logits.values[c + i] * r;
    }
    const start = y * width;
    let x = firstX;
    for (const end of ends) {
      const i = across.low[x], u = row[i], v = row[i + 1], z = row[i + 2];
      if (u > 0 && v > 0 && z > 0) out.fill(1, start + x, start + end);
      else if (u > 0 || v > 0 || z > 0) {
        for (let w = 3 * x, own = across.weights; x < end; x++, w += 3) {
          if (u * own[w] + v * own[w + 1] + z * own[w + 2] > 0) out[start + x] = 1;
        }
      }
      x = end;
    }
  }
  return out;
}

// COCO's compressed run lengths -> counts.
export function readCounts(text) {
  const counts = [];
  let at = 0;
  while (at < text.length) {
    let value = 0, shift = 0, byte;
    do {
      byte = text.charCodeAt(at++) - 48;
      value |= (byte & 31) << (5 * shift++);
    } while (byte & 32);
    if (byte & 16) value |= -1 << (5 * shift);
    if (counts.length > 2) value += counts[counts.length - 2];
    counts.push(value);
  }
  return counts;
}

// Run lengths -> {width, height, data}: bytes row by row, 1 where the mask is.
export function readRle(rle) {
  const [height, width] = rle.size;
  const counts = typeof rle.counts === "string" ? readCounts(rle.counts) : rle.counts;
  const data = new Uint8Array(width * height);
  let at = 0, value = 0;
  for (const count of counts) {
    if (value) {
      for (let i = at; i < at + count; i++) data[(i % height) * width + Math.floor(i / height)] = 1;
    }
    at += count;
    value ^= 1;
  }
  return { width, height, data };
}

export function sampleExact(mask, window) {
  const out = new Uint8Array(window.width * window.height);
  for (let y = 0; y < window.height; y++) {
    const sy = Math.floor(window.y + (y + 0.5) * window.step);
    if (sy < 0 || sy >= mask.height) continue;
    for (let x = 0; x < window.width; x++) {
      const sx = Math.floor(window.x + (x + 0.5) * window.step);
      if (sx >= 0 && sx < mask.width) out[y * window.width + x] = mask.data[sy * mask.width + sx];
    }
  }
  return out;
}

export function isIn(entry, image, x, y) {
  if (entry.exact) {
    const sx = Math.floor(x), sy = Math.floor(y);
    return Boolean(entry.exact.data[sy * entry.exact.width + sx]);
  }
  return Boolean(enlarge(entry.logits, image, { x: x - 0.5, y: y - 0.5, step: 1, width: 1, height: 1 })[0]);
}
