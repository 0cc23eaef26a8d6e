// Attention within one window: scores by the same products as everywhere, softmax by rows.
//
// The keys are laid out once for each head as columns, [units of a head][keys], the values as rows,
// [keys or pairs of keys][width]. log2(e) and the scale are inside q and the bias, so the softmax is
// 2^x. A row is divided by its sum after the product with the values.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

constexpr int kPanel = 2 * kLanes;

struct AttendSpace {
  char* keys;    // [width in units][padded] four-byte units
  char* values;  // [pairs][width]
  float* scores;  // [kTileRows][padded]
  char* weights;  // [kTileRows][padded]; for fp32 the scores themselves
  int padded;     // keys, to a multiple of kPanel
};

template <class P>
TINYVIT_INLINE AttendSpace attend_space(char* p, int side, int width) {
  AttendSpace s;
  const int tokens = side * side;
  s.padded = (tokens + kPanel - 1) / kPanel * kPanel;
  const long unit = sizeof(typename P::T), pairs = P::kBf16 ? (tokens + 1) / 2 : tokens;
  s.keys = p, p += s.padded * static_cast<long>(width) * unit;
  s.values = p, p += pairs * width * 4;
  s.scores = reinterpret_cast<float*>(p);
  s.weights = p;
  p += static_cast<long>(kTileRows) * s.padded * 4;
  if (P::kBf16) s.weights = p;
  return s;
}

template <class P>
static size_t attend_scratch(int side, int width) {
  const AttendSpace s = attend_space<P>(nullptr, side, width);
  return (s.weights - static_cast<char*>(nullptr)) + static_cast<size_t>(kTileRows) * s.padded * 4 + 256;
}

// Four-byte units of the keys of one head, turned so that neighbouring keys are neighbours.
template <class P>
TINYVIT_INLINE void lay_keys(const AttendCall& c, const AttendSpace& s, long offset, int units) {
  alignas(64) char nothing[4 * kLanes] = {};
  for (int g = 0; g < s.padded; g += kLanes)
    for (int u = 0; u < units; u += kLanes) {
      const char* rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = g + i < c.side * c.side ? c.keys[g + i] + offset + 4 * u : nothing;
      transpose(rows, s.keys + (static_cast<long>(u) * s.padded + g) * 4, 4L * s.padded);
    }
}

template <class P>
TINYVIT_INLINE void lay_values(const AttendCall& c, const AttendSpace& s, long offset) {
  const int tokens = c.side * c.side;
  if (!P::kBf16) {
    for (int t = 0; t < tokens; ++t) {
      const float* from = reinterpret_cast<const float*>(c.keys[t] + offset);
      float* to = reinterpret_cast<float*>(s.values) + static_cast<long>(t) * c.width;
      for (int i = 0; i < c.width; i += kLanes) store(to + i, load(from + i));
    }
    return;
  }
  alignas(64) uint16_t nothing[kPanel] = {};
  for (int t = 0; t < tokens; t += 2)
    for (int i = 0; i < c.width; i += kLanes) {  // pairs of neighbouring keys, channel by channel
      const uint16_t* a = reinterpret_cast<const uint16_t*>(c.keys[t] + offset) + i;
      const uint16_t* b =
          t + 1 < tokens ? reinterpret_cast<const uint16_t*>(c.keys[t + 1] + offset) + i : nothing;
      uint16_t* to = reinterpret_cast<uint16_t*>(s.values) + (static_cast<long>(t) * c.width + 2 * i);
      interleave_bf16(a, b, to);
    }
}

// Rows of scores -> rows of weights and one over their sums.
template <class P, int R>
TINYVIT_INLINE void soften(const AttendSpace& s, int row, int tokens, const float* const* bias,
                           float* inverse) {
  typedef typename P::T T;
  Vec high[R], total[R];
  const int last = (tokens - 1) / kLanes * kLanes, rest = tokens - last;
TINYVIT_UNROLL(4)
  for (int r = 0; r < R; ++r) high[r] = set(-3e38f), total[r] = zero();
  for (int i = 0; i <= last; i += kLanes)
TINYVIT_UNROLL(4)
    for (int r = 0; r < R; ++r) {
      float* p = s.scores + (row + r) * s.padded + i;
      Vec x = add(load(p), load(bias[r] + i));
      if (i == last) x = first(x, rest, set(-3e38f));
      high[r] = max2(high[r], x);
      store(p, x);
    }
TINYVIT_UNROLL(4)
  for (int r = 0; r < R; ++r) high[r] = set(largest(high[r]));
  for (int i = 0; i <= last; i += kLanes) {
    Vec x[R];
TINYVIT_UNROLL(4)
    for (int r = 0; r < R; ++r) x[r] = sub(load(s.scores + (row + r) * s.padded + i), high[r]);
    P::template exp2<R>(x);
TINYVIT_UNROLL(4)
    for (int r = 0; r < R; ++r) {
      total[r] = add(total[r], x[r]);
      P::store1(reinterpret_cast<T*>(s.weights) + (row + r) * s.padded + i, x[r]);
    }
  }
TINYVIT_UNROLL(4)
  for (int r = 0; r < R; ++r) inverse[row + r] = 1.0f / sum(total[r]);
}

// The biases of a query's scores.
TINYVIT_INLINE const float* bias_of(const AttendCall& c, int head, int query) {
  const int y = c.positions[query] / c.side, x = c.positions[query] % c.side;
  const long at = (static_cast<long>(head) * c.side + x) * (2 * c.side - 1) + (c.side - 1 - y);
  return c.bias + at * c.side;
}

// The queries [m, m + R) of one head.
template <class P, int R>
static __attribute__((noinline)) void attend_rows(const AttendCall& c, const AttendSpace& s, int head,
                                                  int m) {
  typedef typename P::T T;
  const int tokens = c.side * c.side;
  const int units = c.width / kChannelStep * P::kUnits;
  const char* q = c.queries + m * c.pitch + static_cast<long>(head) * c.width * sizeof(T);
  for (int n = 0; n < tokens; n += kPanel) {
    Vec x[R][2];
    clear(x);
    products<P, R, 2>(q, c.pitch, nullptr, 1, units,
                      reinterpret_cast<const float*>(s.keys) + n, s.padded, x);
TINYVIT_UNROLL(16)
    for (int r = 0; r < R; ++r) {
      store(s.scores + r * s.padded + n, x[r][0]);
      store(s.scores + r * s.padded + n + kLanes, x[r][1]);
    }
  }
  const float* bias[R];
  float inverse[R];
  for (int r = 0; r < R; ++r) bias[r] = bias_of(c, head, m + r);
  int r = 0;
  for (; r + 4 <= R; r += 4) soften<P, 4>(s, r, tokens, bias + r, inverse);
  for (; r < R; ++r) soften<P, 1>(s, r, tokens, bias + r, inverse);
  const int pairs = P::kBf16 ? (tokens + 1) / 2 : tokens;
  for (int n = 0; n < c.width; n += kPanel) {
    Vec x[R][2];
    clear(x);
    products<P, R, 2>(s.weights, static_cast<long>(s.padded) * sizeof(T), nullptr, 1, pairs,
                      reinterpret_cast<const float*>(s.values) + n, c.width, x);
TINYVIT_UNROLL(16)
    for (int k = 0; k < R; ++k) {
      const Vec f = set(inverse[k]);
      T* o = reinterpret_cast<T*>(c.out + (m + k) * c.out_pitch) + head * c.width + n;
      P::store2(o, mul(x[k][0], f), mul(x[k][1], f));
    }
  }
}

template <class P>
static void attend(const AttendCall& c) {
  typedef typename P::T T;
  const AttendSpace s = attend_space<P>(c.scratch, c.side, c.width);
  const int units = c.width / kChannelStep * P::kUnits;
  const long all = static_cast<long>(c.heads) * c.width * sizeof(T);
  for (int h = 0; h < c.heads; ++h) {
    const long offset = static_cast<long>(h) * c.width * sizeof(T);
    lay_keys<P>(c, s, all + offset, units);
    lay_values<P>(c, s, 2 * all + offset);
    int m = 0;
    for (; m + kTileRows <= c.count; m += kTileRows) attend_rows<P, kTileRows>(c, s, h, m);
    if (kTileRows > 8 && c.count - m >= 8) attend_rows<P, 8>(c, s, h, m), m += 8;
    if (kTileRows > 4 && c.count - m >= 4) attend_rows<P, 4>(c, s, h, m), m += 4;
    if (c.count - m >= 2) attend_rows<P, 2>(c, s, h, m), m += 2;
    if (c.count - m >= 1) attend_rows<P, 1>(c, s, h, m);
  }
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
