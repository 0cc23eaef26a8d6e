// fp32 products by three of bf16 on tiles. A value is taken as the nearest bf16 number and, again as
// bf16, what that leaves: 16 bits together. The product of two rests is left out. Infinities give NaN.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kSplitInputs = 512;  // at most, for the memory of the tokens' parts

TINYVIT_INLINE void split16(Vec x, __m256i& high, __m256i& rest) {
  high = (__m256i)_mm512_cvtneps_pbh(x.v);
  const __m512i back = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  rest = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(x.v, _mm512_castsi512_ps(back)));
}

// One of 32 tokens as numbers and rests, [inputs / 32][32 tokens][32].
TINYVIT_INLINE void split_row(const float* from, int count, uint16_t* high, uint16_t* rest) {
  for (int k = 0; k < count; k += 32) {
    const __m512 a = _mm512_loadu_ps(from + k), b = _mm512_loadu_ps(from + k + 16);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i up = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    const __m512 c = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
    const __m512 d = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_slli_epi32(up, 16)));
    _mm512_store_si512(high + 32 * k, both);
    _mm512_store_si512(rest + 32 * k, (__m512i)_mm512_cvtne2ps_pbh(d, c));
  }
}

TINYVIT_INLINE void store_pairs(uint16_t* to, __m256i even, __m256i odd) {
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
}

// Each panel of 32 outputs as [inputs / 2][32 outputs][2] of the numbers, and then of the rests.
static void split(const float* from, long next_input, long next_panel, int there, int inputs, int outputs, uint16_t* to) {
  for (int n = 0; n < outputs; n += 32, from += next_panel) {
    uint16_t *high = to + 2L * n * inputs, *rest = high + 32L * inputs;
    for (int k = 0; k < inputs; k += 2, high += 64, rest += 64)
      for (int half = 0; half < 2; ++half) {
        __m256i x[2], y[2];
        const float* at = from + k * next_input + 16 * half;
        split16(k < there ? load(at) : zero(), x[0], x[1]);
        split16(k + 1 < there ? load(at + next_input) : zero(), y[0], y[1]);
        store_pairs(high + 32 * half, x[0], y[0]);
        store_pairs(rest + 32 * half, x[1], y[1]);
      }
  }
}

// Where 32 rows of a result begin, and how far they are apart; null where that differs.
struct Rows32 {
  float* first = nullptr;
  long pitch = 0;
  Rows32(const char* const* rows, int n) {
    if (!rows) return;
    const long step = rows[1] - rows[0];
    for (int r = 2; r < 32; ++r)
      if (rows[r] - rows[r - 1] != step) return;
    first = reinterpret_cast<float*>(const_cast<char*>(rows[0])) + n, pitch = step;
  }
};

// Four tiles of 16 tokens by 16 outputs: to begin with, by one panel, and at the end.
TINYVIT_INLINE void begin_tiles(const float* from, long pitch) {
  const char *a = reinterpret_cast<const char*>(from), *b = a + 16 * pitch;
  _tile_loadd(0, a, pitch);
  _tile_loadd(1, a + 64, pitch);
  _tile_loadd(2, b, pitch);
  _tile_loadd(3, b + 64, pitch);
}

// Two by two tiles of tokens (4, 5) and outputs (6, 7), added to the four sums.
TINYVIT_INLINE void add_four() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Meanwhile `each` rows of the block before are finished for each group of inputs.
template <class F>
TINYVIT_INLINE void multiply_tiles(const uint16_t* high, const uint16_t* rest, const uint16_t* panel, int inputs, F& before) {
  const uint16_t* panel_rest = panel + 32L * inputs;
  const int each = (2 * kTile * 32 + inputs - 1) / inputs;
  for (int k = 0; k < inputs; k += 32) {
    _tile_loadd(6, panel + 32L * k, 128);
    _tile_loadd(7, panel + 32L * k + 32, 128);
    _tile_loadd(4, rest + 32L * k, 64);
    _tile_loadd(5, rest + 32L * k + 512, 64);
    add_four();
    _tile_loadd(4, high + 32L * k, 64);
    _tile_loadd(5, high + 32L * k + 512, 64);
    add_four();
    _tile_loadd(6, panel_rest + 32L * k, 128);
    _tile_loadd(7, panel_rest + 32L * k + 32, 128);
    add_four();
    F::some(before, each);
  }
}

TINYVIT_INLINE void end_tiles(float* to, long pitch) {
  char *a = reinterpret_cast<char*>(to), *b = a + 16 * pitch;
  _tile_stored(0, a, pitch);
  _tile_stored(1, a + 64, pitch);
  _tile_stored(2, b, pitch);
  _tile_stored(3, b + 64, pitch);
}

// Blocks of 32 tokens by tiles. Where rows lie apart evenly, tiles begin with what is
// added and end there; elsewhere by way of sums, which are finished beside the next block.
template <bool GELU>
static void split_blocks(const LinearCall& l, int count) {
  // Two blocks of tokens: what has just been written is slow to load as a tile.
  alignas(64) uint16_t memory[2][2][32 * kSplitInputs];
  alignas(64) float sums[2][32 * 32];
  alignas(64) static const float none[32] = {};
  const Matrix& m = *l.weights;
  const auto take = [&](int t) {
    uint16_t *high = memory[t / 32 % 2][0], *rest = memory[t / 32 % 2][1];
    for (int r = 0; r < 32; ++r)
      split_row(reinterpret_cast<const float*>(l.in + (t + r) * l.pitch), m.inputs, high + 32 * r, rest + 32 * r);
  };
  Finish<GELU, F32> before;
  int which = 0;
  take(0);
  for (int t = 0; t < count; t += 32) {
    if (t + 32 < count) take(t + 32);
    for (int n = 0; n < m.outputs; n += 32) {
      const float* bias = m.bias + n;
      const Rows32 out(l.out + t, n), plus(l.add ? l.add + t : nullptr, n);
      const bool is_biased = (exceeds(load(bias), zero()) | exceeds(zero(), load(bias)) |
                              exceeds(load(bias + 16), zero()) | exceeds(zero(), load(bias + 16))) != 0;
      const bool adds = plus.first && !is_biased, is_direct = !GELU && out.first && (adds || !l.add);
      begin_tiles(adds ? plus.first : bias, adds ? plus.pitch : 0);
      multiply_tiles(memory[t / 32 % 2][0], memory[t / 32 % 2][1], m.parts + 2L * n * m.inputs, m.inputs, before);
      if (is_direct) {
        end_tiles(out.first, out.pitch);
        continue;
      }
      end_tiles(sums[which], 128);
      before.sums = sums[which], before.bias = none, before.out = l.out + t;
      before.add = l.add && !adds ? l.add + t : nullptr;
      before.offset = 4L * n, before.row = 0, before.end = 32, which = 1 - which;
    }
  }
  Finish<GELU, F32>::some(before, 32);
}

// What is no whole block, and what has no parts, goes by vectors.
static void linear_split(const LinearCall& l) {
  const Matrix& m = *l.weights;
  int t = 0;
  if (m.parts && !l.taps && l.run >= l.tokens && m.inputs <= kSplitInputs && l.tokens >= 32) {
    t = l.tokens / 32 * 32;
    configure(kTile);
    if (l.gelu) split_blocks<true>(l, t);
    else split_blocks<false>(l, t);
    _tile_release();
  }
  if (t == l.tokens) return;
  LinearCall rest = l;
  if (t) {
    rest.in = l.in + t * l.pitch, rest.tokens = rest.run = l.tokens - t;
    rest.out = l.out + t, rest.add = l.add ? l.add + t : nullptr;
  }
  linear<F32>(rest);
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
