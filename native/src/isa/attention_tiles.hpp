// Attention within one window by tiles, 16 queries at a time; keys, values and softmax as in
// attention.hpp.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

struct TileSpace {
  AttendSpace s;  // scores and weights of kTile queries; zeros behind the last value
  float* sums;    // [kTile][width]
};

TINYVIT_INLINE TileSpace tile_space(char* p, int side, int width) {
  TileSpace t;
  t.s.padded = (side * side + kPanel - 1) / kPanel * kPanel;
  const long keys = static_cast<long>(t.s.padded) * width * 2;
  t.s.keys = p;
  t.s.values = p + keys;
  t.s.scores = reinterpret_cast<float*>(p + 2 * keys);
  t.s.weights = p + 2 * keys + kTile * 4L * t.s.padded;
  t.sums = reinterpret_cast<float*>(t.s.weights + kTile * 2L * t.s.padded);
  return t;
}

static size_t attend_tiles_scratch(int side, int width) {
  const TileSpace t = tile_space(nullptr, side, width);
  return reinterpret_cast<char*>(t.sums) - static_cast<char*>(nullptr) + kTile * 4u * width + 256;
}

// Scores of the queries at q: each pair of sums has one column of tiles of keys.
TINYVIT_INLINE void score(const AttendCall& c, const AttendSpace& s, const char* q) {
  const int groups = c.width / kChannelStep;
  const long row = 4L * s.padded;
  for (int n = 0; n < s.padded; n += kPanel) {
    const char* k = s.keys + 4L * n;
    _tile_zero(0);
    _tile_zero(1);
    for (int g = 0; g < groups; ++g, k += kTile * row) {
      _tile_loadd(4, q + 64L * g, c.pitch);
      _tile_loadd(6, k, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, k + 64, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, s.scores + n, row);
    _tile_stored(1, s.scores + n + kTile, row);
  }
}

// The weighted sums of values.
TINYVIT_INLINE void gather(const AttendCall& c, const TileSpace& t) {
  const long row = 4L * c.width;
  for (int n = 0; n < c.width; n += kPanel) {
    const char* v = t.s.values + 4L * n;
    _tile_zero(0);
    _tile_zero(1);
    for (int k = 0; k < t.s.padded; k += kPanel, v += kTile * row) {
      _tile_loadd(4, t.s.weights + 2L * k, 2L * t.s.padded);
      _tile_loadd(6, v, row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, v + 64, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, t.sums + n, row);
    _tile_stored(1, t.sums + n + kTile, row);
  }
}

static void attend_tiles(const AttendCall& c) {
  const TileSpace t = tile_space(c.scratch, c.side, c.width);
  const AttendSpace& s = t.s;
  const int tokens = c.side * c.side, units = c.width / kChannelStep * Bf16::kUnits;
  const int rows = c.count < kTile ? c.count : kTile;
  const long all = static_cast<long>(c.heads) * c.width * 2;
  const long used = static_cast<long>(tokens + 1) / 2 * c.width * 4;
  __builtin_memset(s.values + used, 0, static_cast<size_t>(s.padded) * c.width * 2 - used);
  __builtin_memset(s.weights, 0, kTile * 2u * s.padded);
  configure(rows);
  for (int h = 0; h < c.heads; ++h) {
    const long offset = static_cast<long>(h) * c.width * 2;
    lay_keys<Bf16>(c, s, all + offset, units);
    lay_values<Bf16>(c, s, 2 * all + offset);
    for (int m = 0; m < c.count; m += kTile) {
      const int first = m + rows <= c.count ? m : c.count - rows;  // some queries a second time
      score(c, s, c.queries + first * c.pitch + offset);
      const float* bias[kTile];
      float inverse[kTile];
      for (int r = m - first; r < rows; ++r) bias[r] = bias_of(c, h, first + r);
      int r = m - first;
      for (; r + 4 <= rows; r += 4) soften<Bf16, 4>(s, r, tokens, bias + r, inverse);
      for (; r < rows; ++r) soften<Bf16, 1>(s, r, tokens, bias + r, inverse);
      gather(c, t);
      for (r = m - first; r < rows; ++r) {
        const Vec f = set(inverse[r]);
        uint16_t* o = reinterpret_cast<uint16_t*>(c.out + (first + r) * c.out_pitch + offset);
        for (int n = 0; n < c.width; n += kPanel) {
          const float* p = t.sums + r * c.width + n;
          Bf16::store2(o + n, mul(load(p), f), mul(load(p + kLanes), f));
        }
      }
    }
  }
  _tile_release();
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
