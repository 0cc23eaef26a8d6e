// Depthwise convolutions: one row of outputs, 2 * kLanes channels at a time.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

// G neighbouring outputs with a kernel of 3 by 3, which share the columns that they look at.
template <class P, int S, int G, bool GELU>
TINYVIT_INLINE void depthwise3(const DepthwiseCall& d, int at) {
  typedef typename P::T T;
  const int kColumns = (G - 1) * S + 3;
  const Depthwise& m = *d.weights;
  for (int ch = 0; ch < m.channels; ch += 2 * kLanes) {
    Vec acc[2 * G];
    const Vec b0 = load(m.bias + ch), b1 = load(m.bias + ch + kLanes);
TINYVIT_UNROLL(4)
    for (int i = 0; i < G; ++i) acc[2 * i] = b0, acc[2 * i + 1] = b1;
    const float* w = m.taps + ch * 9;
TINYVIT_UNROLL(3)
    for (int r = 0; r < 3; ++r) {
      const char* p = d.in[r] + static_cast<long>(at) * S * d.pitch + ch * sizeof(T);
      Vec x[kColumns][2];
TINYVIT_UNROLL(9)
      for (int c = 0; c < kColumns; ++c)
        P::split(reinterpret_cast<const T*>(p + c * d.pitch), x[c][0], x[c][1]);
TINYVIT_UNROLL(3)
      for (int k = 0; k < 3; ++k) {
        const Vec w0 = load(w + (r * 3 + k) * 2 * kLanes);
        const Vec w1 = load(w + (r * 3 + k) * 2 * kLanes + kLanes);
TINYVIT_UNROLL(4)
        for (int i = 0; i < G; ++i) {
          acc[2 * i] = fma(x[i * S + k][0], w0, acc[2 * i]);
          acc[2 * i + 1] = fma(x[i * S + k][1], w1, acc[2 * i + 1]);
        }
      }
    }
    if (GELU) P::template gelu<2 * G>(acc);
TINYVIT_UNROLL(4)
    for (int i = 0; i < G; ++i)
      P::merge(reinterpret_cast<T*>(d.out + (at + i) * d.out_pitch) + ch, acc[2 * i], acc[2 * i + 1]);
  }
}

// Any kernel, one output at a time. The taps are added in the same order as above.
template <class P, bool GELU>
static void depthwise_any(const DepthwiseCall& d, int at) {
  typedef typename P::T T;
  const Depthwise& m = *d.weights;
  for (int ch = 0; ch < m.channels; ch += 2 * kLanes) {
    Vec acc[2] = {load(m.bias + ch), load(m.bias + ch + kLanes)};
    const float* w = m.taps + static_cast<long>(ch) * m.side * m.side;
    for (int r = 0; r < m.side; ++r)
      for (int k = 0; k < m.side; ++k, w += 2 * kLanes) {
        const char* p = d.in[r] + (static_cast<long>(at) * d.stride + k) * d.pitch;
        Vec x, y;
        P::split(reinterpret_cast<const T*>(p) + ch, x, y);
        acc[0] = fma(x, load(w), acc[0]);
        acc[1] = fma(y, load(w + kLanes), acc[1]);
      }
    if (GELU) P::template gelu<2>(acc);
    P::merge(reinterpret_cast<T*>(d.out + at * d.out_pitch) + ch, acc[0], acc[1]);
  }
}

template <class P, bool GELU>
static void depthwise_of(const DepthwiseCall& d) {
  const int kGroup = kLanes == 16 ? 4 : 2;
  int at = 0;
  if (d.weights->side != 3) {
    for (; at < d.count; ++at) depthwise_any<P, GELU>(d, at);
  } else if (d.stride == 1) {
    for (; at + kGroup <= d.count; at += kGroup) depthwise3<P, 1, kGroup, GELU>(d, at);
    for (; at < d.count; ++at) depthwise3<P, 1, 1, GELU>(d, at);
  } else {
    for (; at + 2 <= d.count; at += 2) depthwise3<P, 2, 2, GELU>(d, at);
    for (; at < d.count; ++at) depthwise3<P, 2, 1, GELU>(d, at);
  }
}

template <class P>
static void depthwise(const DepthwiseCall& d) {
  if (d.gelu) depthwise_of<P, true>(d);
  else depthwise_of<P, false>(d);
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
