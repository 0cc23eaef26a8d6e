// Lines of enlarged logits: four rows or neighbours by their weights, and comparisons.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

static void blend(const float* const* rows, const float* weights, float* out, int count) {
  const Vec w0 = set(weights[0]), w1 = set(weights[1]), w2 = set(weights[2]), w3 = set(weights[3]);
  for (int i = 0; i < count; i += kLanes) {
    const Vec a = fma(load(rows[1] + i), w1, mul(load(rows[0] + i), w0));
    store(out + i, fma(load(rows[3] + i), w3, fma(load(rows[2] + i), w2, a)));
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

static void mark(const float* in, int count, float bound, uint8_t* out) {
  for (int i = 0; i < count; ++i) out[i] = in[i] > bound;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
