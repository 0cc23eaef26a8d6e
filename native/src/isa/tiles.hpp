// bf16 products by tiles: up to 32 tokens by 32 outputs at a time.
//
// A tile sums in an order of its own, so every token goes through tiles, whatever the number of
// tokens is: what a run has left over is computed with tokens before it a second time.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kTile = 16;  // rows of a tile; each has 64 bytes

// Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights. Tiles 0, 1 and 4 get so many rows.
static void configure(int rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; ++i) c.columns[i] = 64, c.rows[i] = kTile;
  c.rows[0] = c.rows[1] = c.rows[4] = static_cast<uint8_t>(rows);
  __asm__ volatile("" : : "r"(&c) : "memory");  // GCC's intrinsic reads eight bytes, as it says
  _tile_loadconfig(&c);
}

// A block's sums, whose bias, residual and activation are done while tiles compute the next block.
template <bool GELU, class P = Bf16>
struct Finish {
  const float *sums = nullptr, *bias = nullptr;
  char* const* out = nullptr;
  const char* const* add = nullptr;
  long offset = 0;
  int row = 0, end = 0;

  template <int R>
  TINYVIT_INLINE void rows(Finish& f) {
    Vec c[R][2];
TINYVIT_UNROLL(2)
    for (int i = 0; i < R; ++i) {
      c[i][0] = load(f.sums + (f.row + i) * 2 * kTile);
      c[i][1] = load(f.sums + (f.row + i) * 2 * kTile + kTile);
    }
    finish<P, R, GELU>(c, f.bias, f.out + f.row, f.add ? f.add + f.row : nullptr, f.offset);
    f.row += R;
  }
  TINYVIT_INLINE void some(Finish& f, int count) {
    const int stop = f.row + count < f.end ? f.row + count : f.end;
    while (f.row + 2 <= stop) rows<2>(f);
    if (f.row < stop) rows<1>(f);
  }
};

// The sums of tokens at `a` by one panel: 32 tokens, or those of the upper tiles only.
template <bool WHOLE, bool GELU>
TINYVIT_INLINE void block(const char* a, const LinearCall& l, const char* b, int groups, float* sums,
                          Finish<GELU>& before, int each) {
  // A panel is [inputs / 2][32 outputs][2]: each half of it is a tile with rows 128 bytes apart.
  _tile_zero(0);
  _tile_zero(1);
  if (WHOLE) _tile_zero(2);
  if (WHOLE) _tile_zero(3);
  for (int g = 0; g < groups; ++g, b += 2048) {
    const char* p = l.taps ? a + l.taps[g] : a + 64L * g;
    _tile_loadd(4, p, l.pitch);
    _tile_loadd(6, b, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 64, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (WHOLE) {
      _tile_loadd(5, p + kTile * l.pitch, l.pitch);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    Finish<GELU>::some(before, each);
  }
  Finish<GELU>::some(before, 2 * kTile);
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kTile, 128);
  if (WHOLE) _tile_stored(2, sums + 512, 128);
  if (WHOLE) _tile_stored(3, sums + 512 + kTile, 128);
}

template <bool GELU>
static void linear_of_tiles(const LinearCall& l) {
  const Matrix& m = *l.weights;
  const int groups = m.inputs / kChannelStep, each = (2 * kTile / groups + 2) / 2 * 2;
  alignas(64) float sums[2][4 * kTile * kTile];
  Finish<GELU> before;
  int current = 0, configured = kTile;
  configure(kTile);
  for (int n = 0; n < m.outputs; n += 2 * kTile) {
    const char* w = reinterpret_cast<const char*>(m.panels + static_cast<long>(n) * m.inputs / 2);
    for (int start = 0; start < l.tokens; start += l.run) {
      const int end = start + l.run < l.tokens ? start + l.run : l.tokens, count = end - start;
      const char* run = l.in + start / l.run * l.jump;
      for (int t = start; t < end;) {
        const int left = end - t;
        const bool is_whole = left >= 2 * kTile || (left > kTile && count >= 2 * kTile);
        const int rows = is_whole ? 2 * kTile : count < kTile ? count : kTile;
        const int first = left < rows ? end - rows : t;
        if (!is_whole && rows != configured) configure(configured = rows);
        else if (is_whole && configured != kTile) configure(configured = kTile);
        const char* a = run + (first - start) * l.pitch;
        if (is_whole) block<true>(a, l, w, groups, sums[current], before, each);
        else block<false>(a, l, w, groups, sums[current], before, each);
        before.sums = sums[current], before.bias = m.bias + n;
        before.out = l.out + first, before.add = l.add ? l.add + first : nullptr;
        before.offset = 2L * n, before.row = t - first, before.end = rows;
        current ^= 1, t = first + rows;
      }
    }
  }
  Finish<GELU>::some(before, 2 * kTile);
  _tile_release();
}

static void linear_tiles(const LinearCall& l) {
  if (l.gelu) linear_of_tiles<true>(l);
  else linear_of_tiles<false>(l);
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
