// Layer norm, and copies between precisions and layouts.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

template <class P>
static void normalize(const NormCall& n) {
  typedef typename P::T T;
  const int whole = n.channels / kLanes * kLanes, rest = n.channels - whole;
  const Vec share = set(1.0f / static_cast<float>(n.channels));
  for (int t = 0; t < n.tokens; ++t) {
    const T* x = reinterpret_cast<const T*>(n.in[t]);
    Vec s0 = zero(), s1 = zero();  // padding channels are zero
    for (int i = 0; i < n.padded; i += 2 * kLanes)
      s0 = add(s0, P::load1(x + i)), s1 = add(s1, P::load1(x + i + kLanes));
    const Vec mean = mul(set(sum(add(s0, s1))), share);
    s0 = s1 = zero();
    int i = 0;
    for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
      const Vec a = sub(P::load1(x + i), mean), b = sub(P::load1(x + i + kLanes), mean);
      s0 = fma(a, a, s0), s1 = fma(b, b, s1);
    }
    for (; i < n.channels; i += kLanes) {
      const Vec a = sub(P::load1(x + i), mean);
      const Vec b = i < whole ? a : first(a, rest, zero());
      s0 = fma(b, b, s0);
    }
    const float variance = sum(mul(add(s0, s1), share));
    const Vec scale = set(1.0f / __builtin_sqrtf(variance + n.eps));
    for (i = 0; i < n.padded; i += kLanes) {
      Vec y = mul(sub(P::load1(x + i), mean), scale);
      if (n.gamma) y = fma(y, load(n.gamma + i), load(n.beta + i));
      if (i >= whole) y = first(y, i < n.channels ? rest : 0, zero());
      if (n.out_is_float) store(reinterpret_cast<float*>(n.out[t]) + i, y);
      else P::store1(reinterpret_cast<T*>(n.out[t]) + i, y);
    }
  }
}

template <class P>
static void from_float(const float* in, char* out, int count) {
  typename P::T* o = reinterpret_cast<typename P::T*>(out);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) P::store1(o + i, load(in + i));
  if (i < count) {
    float buffer[kLanes] = {};
    typename P::T rounded[kLanes];
    for (int k = 0; i + k < count; ++k) buffer[k] = in[i + k];
    P::store1(rounded, load(buffer));
    for (int k = 0; i + k < count; ++k) o[i + k] = rounded[k];
  }
}

template <class P>
static void to_float(const char* in, float* out, int count) {
  const typename P::T* p = reinterpret_cast<const typename P::T*>(in);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, P::load1(p + i));
  if (i < count) {
    float buffer[kLanes];
    typename P::T rest[kLanes] = {};
    for (int k = 0; i + k < count; ++k) rest[k] = p[i + k];
    store(buffer, P::load1(rest));
    for (int k = 0; i + k < count; ++k) out[i + k] = buffer[k];
  }
}

template <class P>
static void to_planes(const char* const* rows, int tokens, int channels, float* out, long plane) {
  typedef typename P::T T;
  alignas(64) float square[kLanes][kLanes], turned[kLanes][kLanes];
  const char* from[kLanes];
  for (int i = 0; i < kLanes; ++i) from[i] = reinterpret_cast<const char*>(square[i]);
  for (int t = 0; t < tokens; t += kLanes) {
    const int count = tokens - t < kLanes ? tokens - t : kLanes;
    for (int c = 0; c < channels; c += kLanes) {  // padding channels can be read
      for (int i = 0; i < count; ++i)
        store(square[i], P::load1(reinterpret_cast<const T*>(rows[t + i]) + c));
      transpose(from, reinterpret_cast<char*>(turned), sizeof turned[0]);
      for (int k = 0; k < kLanes && c + k < channels; ++k) {
        float* to = out + (c + k) * plane + t;
        if (count == kLanes) store(to, load(turned[k]));
        else
          for (int i = 0; i < count; ++i) to[i] = turned[k][i];
      }
    }
  }
}

static void project(const char* const* rows, int tokens, int channels, const float* filters, int count, float* out,
                    long plane) {
  constexpr int kMost = 4;  // filters at once
  alignas(64) float turned[kLanes][kLanes];
  const char* from[kLanes];
  for (int t = 0; t < tokens; t += kLanes) {
    const int here = tokens - t < kLanes ? tokens - t : kLanes;
    for (int m = 0; m < count; m += kMost) {
      const int some = count - m < kMost ? count - m : kMost;
      Vec sums[kMost] = {zero(), zero(), zero(), zero()};
      for (int c = 0; c < channels; c += kLanes) {
        for (int i = 0; i < kLanes; ++i) from[i] = rows[t + (i < here ? i : 0)] + c * sizeof(float);
        transpose(from, reinterpret_cast<char*>(turned), sizeof turned[0]);
        for (int k = 0; k < kLanes; ++k) {
          const Vec x = load(turned[k]);
          for (int i = 0; i < some; ++i) sums[i] = fma(x, set(filters[(m + i) * channels + c + k]), sums[i]);
        }
      }
      for (int i = 0; i < some; ++i) {
        float* to = out + (m + i) * plane + t;
        alignas(64) float buffer[kLanes];
        store(here == kLanes ? to : buffer, sums[i]);
        for (int k = 0; here < kLanes && k < here; ++k) to[k] = buffer[k];
      }
    }
  }
}

template <class P>
static void gelu_many(const float* in, float* out, int count) {
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    Vec x[4];
TINYVIT_UNROLL(4)
    for (int k = 0; k < 4; ++k) x[k] = load(in + i + k * kLanes);
    P::template gelu<4>(x);
TINYVIT_UNROLL(4)
    for (int k = 0; k < 4; ++k) store(out + i + k * kLanes, x[k]);
  }
  for (; i + kLanes <= count; i += kLanes) {
    Vec x = load(in + i);
    P::template gelu<1>(&x);
    store(out + i, x);
  }
}

template <class P>
static void exp2_many(const float* in, float* out, int count) {
  for (int i = 0; i + kLanes <= count; i += kLanes) {
    Vec x = load(in + i);
    P::template exp2<1>(&x);
    store(out + i, x);
  }
}

static void add_many(const float* a, const float* b, float* out, int count) {
  for (int i = 0; i + kLanes <= count; i += kLanes) store(out + i, add(load(a + i), load(b + i)));
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
