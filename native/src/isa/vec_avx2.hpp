// Vectors of 8 floats: AVX2 with FMA. The names are explained in vec_avx512.hpp.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "unroll.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 rows by 2 vectors: 12 sums of the 16 registers

struct Vec {
  __m256 v;
};

TINYVIT_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
TINYVIT_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
TINYVIT_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
TINYVIT_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
TINYVIT_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
TINYVIT_INLINE Vec max2(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec min2(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
// Within [-limit, limit]; what is no number may become a limit.
TINYVIT_INLINE Vec clamp(Vec a, float limit) { return max2(set(-limit), min2(set(limit), a)); }
TINYVIT_INLINE Vec nearest(Vec a) { return {_mm256_round_ps(a.v, 8)}; }
TINYVIT_INLINE Vec times_power(Vec a, Vec n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)))};
}
TINYVIT_INLINE float sum(Vec a) {
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
TINYVIT_INLINE float largest(Vec a) {
  const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
TINYVIT_INLINE Vec first(Vec a, int n, Vec other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  return {_mm256_blendv_ps(other.v, a.v, _mm256_castsi256_ps(keep))};
}

TINYVIT_INLINE uint32_t exceeds(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
TINYVIT_INLINE void store_exceeds(uint8_t* p, Vec a, Vec b) {
  const __m256i is_above = _mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(is_above), _mm256_extracti128_si256(is_above, 1));
  const __m128i bytes = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
}
TINYVIT_INLINE void neighbours(const float* line, const int* first, Vec (&x)[4]) {
  const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  if (first[kLanes - 1] - first[0] + 3 < kLanes) {
    const __m256 window = _mm256_loadu_ps(line + first[0]);
    const __m256i from = _mm256_sub_epi32(at, _mm256_set1_epi32(first[0]));
TINYVIT_UNROLL(4)
    for (int k = 0; k < 4; ++k)
      x[k].v = _mm256_permutevar8x32_ps(window, _mm256_add_epi32(from, _mm256_set1_epi32(k)));
  } else {
TINYVIT_UNROLL(4)
    for (int k = 0; k < 4; ++k) x[k].v = _mm256_i32gather_ps(line + k, at, 4);
  }
}

// -- bf16 ---------------------------------------------------------------------------------------

TINYVIT_INLINE Vec load_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
TINYVIT_INLINE __m256i round_bf16(Vec a) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 none = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(none));
}
TINYVIT_INLINE void store2_bf16(uint16_t* p, Vec lo, Vec hi) {
  const __m256i a = _mm256_srli_epi32(round_bf16(lo), 16);
  const __m256i b = _mm256_srli_epi32(round_bf16(hi), 16);
  const __m256i v = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}
TINYVIT_INLINE void store_bf16(uint16_t* p, Vec a) {
  const __m256i h = _mm256_srli_epi32(round_bf16(a), 16);
  const __m256i v = _mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(v));
}
TINYVIT_INLINE void split_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even.v = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  odd.v = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
TINYVIT_INLINE void merge_bf16(uint16_t* p, Vec even, Vec odd) {
  const __m256i lo = _mm256_srli_epi32(round_bf16(even), 16);
  const __m256i hi =
      _mm256_and_si256(round_bf16(odd), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(lo, hi));
}

TINYVIT_INLINE void interleave_bf16(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
  const __m256i y = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(x, _mm256_slli_epi32(y, 16)));
}

// -- products -------------------------------------------------------------------------------------

TINYVIT_INLINE Vec spread(const char* p) {
  return {_mm256_broadcast_ss(reinterpret_cast<const float*>(p))};
}
TINYVIT_INLINE Vec dot_bf16(Vec acc, Vec a, Vec b) {
  const __m256i x = _mm256_castps_si256(a.v), y = _mm256_castps_si256(b.v);
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256 odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, high)),
                                     _mm256_castsi256_ps(_mm256_and_si256(y, high)), acc.v);
  return {_mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                          _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)), odd)};
}

TINYVIT_INLINE void transpose(const char* const* rows, char* out, long out_stride) {
  __m256 r[8], t[8], u[8];
TINYVIT_UNROLL(8)
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i]));
TINYVIT_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
TINYVIT_UNROLL(2)
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
TINYVIT_UNROLL(4)
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(reinterpret_cast<float*>(out + j * out_stride),
                     _mm256_permute2f128_ps(u[j], u[4 + j], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(out + (4 + j) * out_stride),
                     _mm256_permute2f128_ps(u[j], u[4 + j], 0x31));
  }
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
