// Matrix products. Every sum runs over the inputs in order, so a result does not depend on how many
// tokens are computed together.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

// c[r] += tokens a + r * pitch times one or two vectors of weights. `w` advances by `next` floats
// for each unit; the inputs are `groups` runs of `units` four-byte units, at taps[g] from the token.
template <class P, int R, int V>
TINYVIT_INLINE void products(const char* a, long pitch, const long* taps, int groups, int units,
                             const float* w, long next, Vec (&c)[R][V]) {
  for (int g = 0; g < groups; ++g) {
    const char* p = taps ? a + taps[g] : a;
TINYVIT_UNROLL(2)
    for (int u = 0; u < units; ++u, w += next, p += 4) {
      Vec b[V];
TINYVIT_UNROLL(2)
      for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes);
TINYVIT_UNROLL(16)
      for (int r = 0; r < R; ++r) {
        const Vec x = spread(p + r * pitch);
TINYVIT_UNROLL(2)
        for (int v = 0; v < V; ++v) c[r][v] = P::madd(c[r][v], x, b[v]);
      }
    }
  }
}

template <int R, int V>
TINYVIT_INLINE void clear(Vec (&c)[R][V]) {
TINYVIT_UNROLL(16)
  for (int r = 0; r < R; ++r)
TINYVIT_UNROLL(2)
    for (int v = 0; v < V; ++v) c[r][v] = zero();
}

// Bias, residual and activation of R tokens by one panel, straight from the registers.
template <class P, int R, bool GELU>
TINYVIT_INLINE void finish(Vec (&c)[R][2], const float* bias, char* const* out,
                           const char* const* add, long offset) {
  typedef typename P::T T;
  const int S = R % 2 ? 1 : 2;
  const Vec b0 = load(bias), b1 = load(bias + kLanes);
TINYVIT_UNROLL(16)
  for (int r = 0; r < R; r += S) {
    Vec v[2 * S];
TINYVIT_UNROLL(2)
    for (int i = 0; i < S; ++i) {
      v[2 * i] = tinyvit::TINYVIT_ISA::add(c[r + i][0], b0);
      v[2 * i + 1] = tinyvit::TINYVIT_ISA::add(c[r + i][1], b1);
    }
    if (add) {
TINYVIT_UNROLL(2)
      for (int i = 0; i < S; ++i) {
        Vec x, y;
        P::load2(reinterpret_cast<const T*>(add[r + i] + offset), x, y);
        v[2 * i] = tinyvit::TINYVIT_ISA::add(v[2 * i], x);
        v[2 * i + 1] = tinyvit::TINYVIT_ISA::add(v[2 * i + 1], y);
      }
    }
    if (GELU) P::template gelu<2 * S>(v);
TINYVIT_UNROLL(2)
    for (int i = 0; i < S; ++i)
      P::store2(reinterpret_cast<T*>(out[r + i] + offset), v[2 * i], v[2 * i + 1]);
  }
}

// Tokens [t, t + R) by the panel of outputs from n on.
template <class P, int R, bool GELU>
static __attribute__((noinline)) void tile(const LinearCall& l, const char* a, int t, int n) {
  Vec c[R][2];
  clear(c);
  const Matrix& m = *l.weights;
  const long units = static_cast<long>(m.inputs) / kChannelStep * P::kUnits;
  const float* w = m.panels + n * units;
  if (l.taps)
    products<P, R, 2>(a, l.pitch, l.taps, m.inputs / kChannelStep, P::kUnits, w, 2 * kLanes, c);
  else
    products<P, R, 2>(a, l.pitch, nullptr, 1, static_cast<int>(units), w, 2 * kLanes, c);
  finish<P, R, GELU>(c, m.bias + n, l.out + t, l.add ? l.add + t : nullptr,
                     n * static_cast<long>(sizeof(typename P::T)));
}

template <class P, bool GELU>
static void linear_of(const LinearCall& l) {
  for (int n = 0; n < l.weights->outputs; n += 2 * kLanes)
    for (int start = 0; start < l.tokens; start += l.run) {
      const int end = start + l.run < l.tokens ? start + l.run : l.tokens;
      const char* a = l.in + start / l.run * l.jump;
      int t = start;
      for (; t + kTileRows <= end; t += kTileRows, a += kTileRows * l.pitch)
        tile<P, kTileRows, GELU>(l, a, t, n);
      if (kTileRows > 8 && end - t >= 8) tile<P, 8, GELU>(l, a, t, n), t += 8, a += 8 * l.pitch;
      if (kTileRows > 4 && end - t >= 4) tile<P, 4, GELU>(l, a, t, n), t += 4, a += 4 * l.pitch;
      if (end - t >= 2) tile<P, 2, GELU>(l, a, t, n), t += 2, a += 2 * l.pitch;
      if (end - t >= 1) tile<P, 1, GELU>(l, a, t, n);
    }
}

template <class P>
static void linear(const LinearCall& l) {
  if (l.gelu) linear_of<P, true>(l);
  else linear_of<P, false>(l);
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
