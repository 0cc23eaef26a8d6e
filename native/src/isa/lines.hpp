// Lines of enlarged logits: four rows or neighbours by their weights, and comparisons; positions.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

TINYVIT_INLINE Vec blended(const float* const* rows, const Vec (&w)[4], int i) {
  const Vec a = fma(load(rows[1] + i), w[1], mul(load(rows[0] + i), w[0]));
  return fma(load(rows[3] + i), w[3], fma(load(rows[2] + i), w[2], a));
}

static void blend(const float* const* rows, const float* weights, float* out, int count) {
  const Vec w[4] = {set(weights[0]), set(weights[1]), set(weights[2]), set(weights[3])};
  for (int i = 0; i < count; i += kLanes) store(out + i, blended(rows, w, i));
}

static void place(const float* x, const float* a, const float* b, int half, float* out) {
  for (int i = 0; i < half; i += kLanes) {
    const Vec s = load(a + i), c = load(a + half + i), t = load(b + i), d = load(b + half + i);
    store(out + i, fma(s, d, fma(c, t, load(x + i))));
    store(out + half + i, fma(c, d, sub(load(x + half + i), mul(s, t))));
  }
}

static void expand(const float* line, const int* first, const float* weights, long pitch, float* out, int count) {
  for (int i = 0; i < count; i += kLanes) {
    Vec x[4];
    neighbours(line, first + i, x);
    Vec s = mul(x[0], load(weights + i));
TINYVIT_UNROLL(3)
    for (int k = 1; k < 4; ++k) s = fma(x[k], load(weights + k * pitch + i), s);
    store(out + i, s);
  }
}

static void above(const float* in, int count, float bound, uint64_t* bits) {
  const Vec b = set(bound);
  for (int i = 0; i < count; i += 64) {
    uint64_t word = 0;
TINYVIT_UNROLL(8)
    for (int k = 0; k < 64; k += kLanes) word |= static_cast<uint64_t>(exceeds(load(in + i + k), b)) << k;
    *bits++ = word;
  }
}

static void mark(const float* const* rows, const float* weights, int count, float bound, uint8_t* out) {
  const Vec w[4] = {set(weights[0]), set(weights[1]), set(weights[2]), set(weights[3])}, b = set(bound);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store_exceeds(out + i, blended(rows, w, i), b);
  uint8_t rest[kLanes];
  if (i < count) store_exceeds(rest, blended(rows, w, i), b);
  for (int k = 0; i + k < count; ++k) out[i + k] = rest[k];
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
