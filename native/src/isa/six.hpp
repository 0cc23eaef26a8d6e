// fp32 products made of six bf16 products by tiles.
//
// A number is the sum of three bf16 numbers, high, middle and low, which together have its 24 bits.
// Of the nine products of two such sums, those below the last bit of the result are left out. A token
// with an infinity (or what rounds to one) would give no numbers instead: it is multiplied by vectors.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kParts = 3, kTileBytes = 1024;

static size_t six_scratch(int tokens, int inputs) {
  const size_t padded = static_cast<size_t>(tokens + kTile - 1) / kTile * kTile;
  return padded * inputs * kParts * 2 + padded;
}

// 32 values -> a row of three tiles; whether one has no parts.
TINYVIT_INLINE bool split_thirds(const float* p, char* out) {
  Vec a = load(p), b = load(p + kLanes);
TINYVIT_UNROLL(3)
  for (int i = 0; i < kParts; ++i) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out + i * kTileBytes);
    const __m512i packed = pack_bf16(a, b);
    _mm512_storeu_si512(to, packed);
    a = sub(a, {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(packed)), 16))});
    b = sub(b, {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(packed, 1)), 16))});
  }
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q) != 0;
}

// All tokens as [16 tokens][kChannelStep inputs][part][token][input]; bad[t] where one has no parts.
static void lay_thirds(const LinearCall& l, char* out, char* bad) {
  const int groups = l.weights->inputs / kChannelStep;
  for (int t = 0; t < l.tokens; ++t) {
    const char* a = l.in + t / l.run * l.jump + t % l.run * l.pitch;
    char* to = out + static_cast<long>(t / kTile) * groups * kParts * kTileBytes + t % kTile * 64;
    bool is_bad = false;
    for (int g = 0; g < groups; ++g, to += kParts * kTileBytes)
      is_bad |= split_thirds(reinterpret_cast<const float*>(l.taps ? a + l.taps[g] : a + 128L * g), to);
    bad[t] = is_bad;
  }
}

template <int PART, bool WHOLE>
TINYVIT_INLINE void tokens_part(const char* a, long below) {
  _tile_loadd(4, a + PART * kTileBytes, 64);
  if (WHOLE) _tile_loadd(5, a + below + PART * kTileBytes, 64);
}
template <int PART>
TINYVIT_INLINE void weights_part(const char* b) {
  _tile_loadd(6, b + 2 * PART * kTileBytes, 64);
  _tile_loadd(7, b + (2 * PART + 1) * kTileBytes, 64);
}
template <bool WHOLE>
TINYVIT_INLINE void add_products() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (WHOLE) _tile_dpbf16ps(2, 5, 6);
  if (WHOLE) _tile_dpbf16ps(3, 5, 7);
}

// Tokens at `a` by one panel: 32 of them, or 16.
template <bool WHOLE, bool GELU>
TINYVIT_INLINE void block_of_six(const char* a, const char* b, int groups, float* sums, Finish<GELU, F32>& before,
                                 int each) {
  const long below = static_cast<long>(groups) * kParts * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  if (WHOLE) _tile_zero(2);
  if (WHOLE) _tile_zero(3);
  for (int g = 0; g < groups; ++g, a += kParts * kTileBytes, b += 2 * kParts * kTileBytes) {
    // Small products first, each beside one that shares a part with it.
    tokens_part<2, WHOLE>(a, below), weights_part<0>(b), add_products<WHOLE>();
    tokens_part<1, WHOLE>(a, below), add_products<WHOLE>();
    weights_part<1>(b), add_products<WHOLE>();
    tokens_part<0, WHOLE>(a, below), add_products<WHOLE>();
    weights_part<2>(b), add_products<WHOLE>();
    weights_part<0>(b), add_products<WHOLE>();
    Finish<GELU, F32>::some(before, each);
  }
  Finish<GELU, F32>::some(before, 2 * kTile);
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kTile, 128);
  if (WHOLE) _tile_stored(2, sums + 512, 128);
  if (WHOLE) _tile_stored(3, sums + 512 + kTile, 128);
}

template <bool GELU>
static void linear_of_six(const LinearCall& l) {
  const Matrix& m = *l.weights;
  const int groups = m.inputs / kChannelStep, each = (2 * kTile / groups + 2) / 2 * 2;
  const long tile_row = static_cast<long>(groups) * kParts * kTileBytes;
  char* bad = l.scratch + (l.tokens + kTile - 1) / kTile * tile_row;
  lay_thirds(l, l.scratch, bad);
  alignas(64) float sums[2][4 * kTile * kTile];
  Finish<GELU, F32> before;
  int current = 0;
  configure(kTile);
  for (int n = 0; n < m.outputs; n += 2 * kTile) {
    const char* w = reinterpret_cast<const char*>(m.thirds) + n / (2 * kTile) * 2 * tile_row;
    for (int t = 0; t < l.tokens; t += 2 * kTile) {
      float* s = sums[current];
      const char* a = l.scratch + t / kTile * tile_row;
      const int left = l.tokens - t, rows = left < 2 * kTile ? left : 2 * kTile;
      if (left > kTile) block_of_six<true>(a, w, groups, s, before, each);
      else block_of_six<false>(a, w, groups, s, before, each);
      for (int r = 0; r < rows; ++r) {
        if (!bad[t + r]) continue;
        const char* p = l.in + (t + r) / l.run * l.jump + (t + r) % l.run * l.pitch;
        Vec c[1][2];
        clear(c);
        const long whole = static_cast<long>(m.inputs) * n;
        products<F32, 1, 2>(p, 0, l.taps, l.taps ? groups : 1, l.taps ? kChannelStep : m.inputs, m.panels + whole,
                            2 * kLanes, c);
        store(s + r * 2 * kTile, c[0][0]), store(s + r * 2 * kTile + kTile, c[0][1]);
      }
      before.sums = s, before.bias = m.bias + n, before.out = l.out + t, before.add = l.add ? l.add + t : nullptr;
      before.offset = 4L * n, before.row = 0, before.end = rows;
      current ^= 1;
    }
  }
  Finish<GELU, F32>::some(before, 2 * kTile);
  _tile_release();
}

static void linear_six(const LinearCall& l) {
  if (!l.scratch || !l.weights->thirds) linear<F32>(l);
  else if (l.gelu) linear_of_six<true>(l);
  else linear_of_six<false>(l);
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
