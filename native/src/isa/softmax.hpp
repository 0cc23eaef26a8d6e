// Softmax over thousands of rows (a column at a time) and over the few values of a row.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

static void largest_of(const float* scores, int rows, int columns, float* most) {
  for (int c = 0; c < columns; c += kLanes) {
    Vec a = load(scores + c), b = a;
    int r = 1;
    for (; r + 2 <= rows; r += 2) {
      a = max2(a, load(scores + static_cast<long>(r) * columns + c));
      b = max2(b, load(scores + static_cast<long>(r + 1) * columns + c));
    }
    if (r < rows) a = max2(a, load(scores + static_cast<long>(r) * columns + c));
    store(most + c, max2(a, b));
  }
}

static void weigh(const float* scores, int rows, int columns, const float* most, float* turned, int pitch,
                  float* total) {
  alignas(64) float square[kLanes][kLanes];
  const char* from[kLanes];
  for (int i = 0; i < kLanes; ++i) from[i] = reinterpret_cast<const char*>(square[i]);
  for (int c = 0; c < columns; c += kLanes) {
    const Vec m = load(most + c);
    Vec sum = zero();
    for (int r = 0; r < pitch; r += kLanes) {
      for (int i = 0; i < kLanes; i += 4) {
        Vec x[4];
TINYVIT_UNROLL(4)
        for (int k = 0; k < 4; ++k)
          x[k] = r + i + k < rows ? sub(load(scores + static_cast<long>(r + i + k) * columns + c), m) : zero();
        F32::exp2<4>(x);
TINYVIT_UNROLL(4)
        for (int k = 0; k < 4; ++k) {
          if (r + i + k >= rows) x[k] = zero();
          sum = add(sum, x[k]);
          store(square[i + k], x[k]);
        }
      }
      transpose(from, reinterpret_cast<char*>(turned + static_cast<long>(c) * pitch + r), pitch * 4L);
    }
    store(total + c, sum);
  }
}

// The largest or the sum over lanes of the same head, in all of them; `heads` divides them to a power of 2.
template <class F>
TINYVIT_INLINE Vec folded(Vec a, int heads, const F& join) {
  alignas(64) float b[2 * kLanes];
  for (int step = heads; step < kLanes; step *= 2) {
    store(b, a), store(b + kLanes, a);
    a = join(a, load(b + step));
  }
  return a;
}

static void soften(float* scores, int rows, long pitch, int columns, int used, int heads) {
  const Vec least = set(-__builtin_inff());
  if (kLanes % heads || (kLanes / heads & (kLanes / heads - 1))) {  // no fixed lane for a head
    for (int r = 0; r < rows; ++r) {
      float* s = scores + r * pitch;
      for (int h = 0; h < heads; ++h) {
        float most = s[h], total = 0;
        for (int i = h; i < used; i += heads) most = s[i] > most ? s[i] : most;
        for (int i = h; i < used; i += heads) {
          Vec x = set(s[i] - most);
          F32::exp2<1>(&x);
          alignas(64) float y[kLanes];
          store(y, x);
          total += s[i] = y[0];
        }
        for (int i = h; i < used; i += heads) s[i] /= total;
      }
      for (int i = used; i < columns; ++i) s[i] = 0;
    }
    return;
  }
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * pitch;
    Vec most = least, total = zero();
    for (int c = 0; c < used; c += kLanes) most = max2(most, first(load(s + c), used - c < kLanes ? used - c : kLanes, least));
    most = folded(most, heads, [](Vec a, Vec b) { return max2(a, b); });
    for (int c = 0; c < columns; c += 2 * kLanes) {
      Vec x[2] = {sub(load(s + c), most), sub(load(s + c + kLanes), most)};
      F32::exp2<2>(x);
TINYVIT_UNROLL(2)
      for (int k = 0; k < 2; ++k) {
        const int left = used - c - k * kLanes;
        if (left < kLanes) x[k] = first(x[k], left > 0 ? left : 0, zero());
        total = add(total, x[k]);
        store(s + c + k * kLanes, x[k]);
      }
    }
    total = folded(total, heads, [](Vec a, Vec b) { return add(a, b); });
    alignas(64) float share[kLanes];
    store(share, total);
    for (int i = 0; i < kLanes; ++i) share[i] = 1.0f / share[i];
    const Vec scale = load(share);
    for (int c = 0; c < used; c += kLanes) store(s + c, mul(load(s + c), scale));
  }
}

static void add_scaled(const float* from, float scale, float* to, int count) {
  const Vec s = set(scale);
  for (int i = 0; i + kLanes <= count; i += kLanes) store(to + i, fma(load(from + i), s, load(to + i)));
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
