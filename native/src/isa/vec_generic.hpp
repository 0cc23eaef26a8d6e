// Vectors of 8 floats as a plain array: the scalar twin that the tests compare with, and what runs
// on a processor that nothing else here was written for. The names are explained in vec_avx512.hpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "unroll.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kLanes = 8;
constexpr int kTileRows = 4;

struct Vec {
  float v[8];
};

#define TINYVIT_LANES for (int i = 0; i < 8; ++i)

TINYVIT_INLINE Vec set(float x) {
  Vec r;
  TINYVIT_LANES r.v[i] = x;
  return r;
}
TINYVIT_INLINE Vec zero() { return set(0.0f); }
TINYVIT_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
TINYVIT_INLINE void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof a.v); }
TINYVIT_INLINE Vec add(Vec a, Vec b) {
  TINYVIT_LANES a.v[i] += b.v[i];
  return a;
}
TINYVIT_INLINE Vec sub(Vec a, Vec b) {
  TINYVIT_LANES a.v[i] -= b.v[i];
  return a;
}
TINYVIT_INLINE Vec mul(Vec a, Vec b) {
  TINYVIT_LANES a.v[i] *= b.v[i];
  return a;
}
// Rounded twice: fmaf without the instruction is a hundred times slower.
TINYVIT_INLINE Vec fma(Vec a, Vec b, Vec c) {
  TINYVIT_LANES c.v[i] += a.v[i] * b.v[i];
  return c;
}
TINYVIT_INLINE Vec max2(Vec a, Vec b) {
  TINYVIT_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
TINYVIT_INLINE Vec min2(Vec a, Vec b) {
  TINYVIT_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
// Within [-limit, limit]; what is no number may become a limit.
TINYVIT_INLINE Vec clamp(Vec a, float limit) { return max2(set(-limit), min2(set(limit), a)); }
TINYVIT_INLINE Vec nearest(Vec a) {
  TINYVIT_LANES a.v[i] = std::nearbyintf(a.v[i]);
  return a;
}
TINYVIT_INLINE Vec times_power(Vec a, Vec n) {
  TINYVIT_LANES {
    if (n.v[i] != n.v[i]) continue;  // a is no number either
    const uint32_t u = static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23;
    float f;
    std::memcpy(&f, &u, 4);
    a.v[i] *= f;
  }
  return a;
}
TINYVIT_INLINE float sum(Vec a) {
  float s = 0;
  TINYVIT_LANES s += a.v[i];
  return s;
}
TINYVIT_INLINE float largest(Vec a) {
  float m = a.v[0];
  TINYVIT_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}
TINYVIT_INLINE Vec first(Vec a, int n, Vec other) {
  TINYVIT_LANES if (i >= n) a.v[i] = other.v[i];
  return a;
}

TINYVIT_INLINE void store_exceeds(uint8_t* p, Vec a, Vec b) {
  TINYVIT_LANES p[i] = a.v[i] > b.v[i];
}
TINYVIT_INLINE uint32_t exceeds(Vec a, Vec b) {
  uint32_t bits = 0;
  TINYVIT_LANES bits |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return bits;
}
TINYVIT_INLINE void neighbours(const float* line, const int* first, Vec (&x)[4]) {
  for (int k = 0; k < 4; ++k) TINYVIT_LANES x[k].v[i] = line[first[i] + k];
}

// -- bf16 ---------------------------------------------------------------------------------------

TINYVIT_INLINE float widen(uint32_t upper) {
  const uint32_t u = upper << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
TINYVIT_INLINE uint16_t narrow(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
TINYVIT_INLINE Vec load_bf16(const uint16_t* p) {
  Vec r;
  TINYVIT_LANES r.v[i] = widen(p[i]);
  return r;
}
TINYVIT_INLINE void store_bf16(uint16_t* p, Vec a) { TINYVIT_LANES p[i] = narrow(a.v[i]); }
TINYVIT_INLINE void store2_bf16(uint16_t* p, Vec lo, Vec hi) {
  store_bf16(p, lo);
  store_bf16(p + 8, hi);
}
TINYVIT_INLINE void split_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  TINYVIT_LANES {
    even.v[i] = widen(p[2 * i]);
    odd.v[i] = widen(p[2 * i + 1]);
  }
}
TINYVIT_INLINE void merge_bf16(uint16_t* p, Vec even, Vec odd) {
  TINYVIT_LANES {
    p[2 * i] = narrow(even.v[i]);
    p[2 * i + 1] = narrow(odd.v[i]);
  }
}

TINYVIT_INLINE void interleave_bf16(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  TINYVIT_LANES {
    out[2 * i] = a[i];
    out[2 * i + 1] = b[i];
  }
}

// -- products -------------------------------------------------------------------------------------

TINYVIT_INLINE Vec spread(const char* p) {
  float f;
  std::memcpy(&f, p, 4);
  return set(f);
}
TINYVIT_INLINE Vec dot_bf16(Vec acc, Vec a, Vec b) {
  TINYVIT_LANES {
    uint32_t x, y;
    std::memcpy(&x, &a.v[i], 4);
    std::memcpy(&y, &b.v[i], 4);
    acc.v[i] += widen(x >> 16) * widen(y >> 16);
    acc.v[i] += widen(x & 0xffff) * widen(y & 0xffff);
  }
  return acc;
}

TINYVIT_INLINE void transpose(const char* const* rows, char* out, long out_stride) {
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) std::memcpy(out + c * out_stride + 4 * r, rows[r] + 4 * c, 4);
}

#undef TINYVIT_LANES

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
