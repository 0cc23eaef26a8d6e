// Vectors of 16 floats: AVX-512 F, BW, DQ, VL; with BF16 where the compiler was told so.
//
// Every ISA has a header with the same names. All of it is inline in a namespace of its own, so
// that the linker can never take a function compiled for one processor for another.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "unroll.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kLanes = 16;
constexpr int kTileRows = 12;  // 12 rows by 2 vectors: 24 sums of the 32 registers

struct Vec {
  __m512 v;
};

TINYVIT_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
TINYVIT_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
TINYVIT_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
TINYVIT_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
TINYVIT_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
// a * b + c
TINYVIT_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second one where either is no number.
TINYVIT_INLINE Vec max2(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
TINYVIT_INLINE Vec min2(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// Within [-limit, limit]; what is no number may become a limit.
TINYVIT_INLINE Vec clamp(Vec a, float limit) { return {_mm512_range_ps(a.v, _mm512_set1_ps(limit), 2)}; }
TINYVIT_INLINE Vec nearest(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }
// a * 2^n for a whole n in [-126, 127]
TINYVIT_INLINE Vec times_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
TINYVIT_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
// The largest lane; a lane that is no number may be passed over.
TINYVIT_INLINE float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Lanes from n on become `other`.
TINYVIT_INLINE Vec first(Vec a, int n, Vec other) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), other.v, a.v)};
}

// A bit, or a byte, for each lane of a that is above b's; none where one is no number.
TINYVIT_INLINE uint32_t exceeds(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
TINYVIT_INLINE void store_exceeds(uint8_t* p, Vec a, Vec b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(static_cast<__mmask16>(exceeds(a, b)), 1));
}
// x[k] = line[first[lane] + k] for four k; `first` rises.
TINYVIT_INLINE void neighbours(const float* line, const int* first, Vec (&x)[4]) {
  const __m512i at = _mm512_loadu_si512(first);
  if (first[kLanes - 1] - first[0] + 3 < kLanes) {  // one vector has them all
    const __m512 window = _mm512_loadu_ps(line + first[0]);
    const __m512i from = _mm512_sub_epi32(at, _mm512_set1_epi32(first[0]));
TINYVIT_UNROLL(4)
    for (int k = 0; k < 4; ++k)
      x[k].v = _mm512_permutexvar_ps(_mm512_add_epi32(from, _mm512_set1_epi32(k)), window);
  } else {
TINYVIT_UNROLL(4)
    for (int k = 0; k < 4; ++k) x[k].v = _mm512_i32gather_ps(at, line + k, 4);
  }
}

// -- bf16 ---------------------------------------------------------------------------------------

TINYVIT_INLINE Vec load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
#ifdef __AVX512BF16__
TINYVIT_INLINE __m512i pack_bf16(Vec lo, Vec hi) {
  return (__m512i)_mm512_cvtne2ps_pbh(hi.v, lo.v);
}
TINYVIT_INLINE void store_bf16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#else
// Rounds to nearest even in the upper half of each lane; what is no number stays none.
TINYVIT_INLINE __m512i round_bf16(Vec a) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 none = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(r, none, u, _mm512_set1_epi32(0x400000));
}
TINYVIT_INLINE void store_bf16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(a), 16)));
}
TINYVIT_INLINE __m512i pack_bf16(Vec lo, Vec hi) {
  const __m256i a = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(lo), 16));
  const __m256i b = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(hi), 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}
#endif
TINYVIT_INLINE void store2_bf16(uint16_t* p, Vec lo, Vec hi) {
  _mm512_storeu_si512(p, pack_bf16(lo, hi));
}
// 2 * kLanes neighbours as the even ones and the odd ones: one load, no shuffle.
TINYVIT_INLINE void split_bf16(const uint16_t* p, Vec& even, Vec& odd) {
  const __m512i v = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
TINYVIT_INLINE void merge_bf16(uint16_t* p, Vec even, Vec odd) {
#ifdef __AVX512BF16__
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, pack_bf16(even, odd)));
#else
  const __m512i lo = _mm512_srli_epi32(round_bf16(even), 16);
  const __m512i hi = _mm512_and_si512(round_bf16(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  _mm512_storeu_si512(p, _mm512_or_si512(lo, hi));
#endif
}

// a0 b0 a1 b1 ... of kLanes values each
TINYVIT_INLINE void interleave_bf16(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  _mm512_storeu_si512(out, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
}

// -- products: a lane of weights is one float, or a pair of bf16 ----------------------------------

// The four bytes at p in every lane.
TINYVIT_INLINE Vec spread(const char* p) {
  return {_mm512_set1_ps(*reinterpret_cast<const float*>(p))};
}
// acc + the sum of the two products of each pair
TINYVIT_INLINE Vec dot_bf16(Vec acc, Vec a, Vec b) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, high)),
                                     _mm512_castsi512_ps(_mm512_and_si512(y, high)), acc.v);
  return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), odd)};
#endif
}

// A square of kLanes by kLanes four-byte values: rows with a stride in bytes -> columns.
TINYVIT_INLINE void transpose(const char* const* rows, char* out, long out_stride) {
  __m512i r[16], t[16], u[16];
TINYVIT_UNROLL(16)
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i]);
TINYVIT_UNROLL(8)
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
TINYVIT_UNROLL(4)
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
TINYVIT_UNROLL(4)
  for (int j = 0; j < 4; ++j) {  // u[4 i + j]: column j of each 128-bit lane, rows 4 i to 4 i + 3
    const __m512i a = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    _mm512_storeu_si512(out + j * out_stride, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(out + (8 + j) * out_stride, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(out + (4 + j) * out_stride, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(out + (12 + j) * out_stride, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
