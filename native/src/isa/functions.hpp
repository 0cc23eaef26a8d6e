// GELU and 2^x as polynomials, and the two precisions that maps can have.
//
// GELU(x) = x Q(c), where c is x clamped to [-C, C] and Q(c) = 1/2 + c q(c^2) is the normal
// distribution's integral. The polynomials are minimax fits of x Q with the condition that Q(-C),
// as rounded, is not above 0: max(Q, 0) then is exactly 0 for every x <= -C, so that large negative
// inputs give -0 and minus infinity gives NaN, as with erf. The final product with x passes NaN on.
//
// Largest errors: GELU 9.4e-7 (fp32) and 7.1e-5 (bf16: below half a step of a bf16 number >= 1/64);
// 2^x, relative: 2.2e-7 and 7.5e-5. Shown in tests/test_functions.py.
#pragma once

namespace tinyvit {
namespace TINYVIT_ISA {

#define TINYVIT_EACH TINYVIT_UNROLL(16) for (int i = 0; i < N; ++i)

// The polynomial is one of c^2, or of c^2 stretched to [-1, 1], which high degrees want.
template <int N, int D, bool STRETCHED>
TINYVIT_INLINE void gelu_of(Vec* x, const float* k, float limit) {
  Vec c[N], s[N], q[N];
  TINYVIT_EACH c[i] = clamp(x[i], limit);
  TINYVIT_EACH s[i] = mul(c[i], c[i]);
  if (STRETCHED) TINYVIT_EACH s[i] = fma(s[i], set(2.0f / (limit * limit)), set(-1.0f));
  TINYVIT_EACH q[i] = fma(set(k[D]), s[i], set(k[D - 1]));
TINYVIT_UNROLL(16)
  for (int j = D - 2; j >= 0; --j) TINYVIT_EACH q[i] = fma(q[i], s[i], set(k[j]));
  TINYVIT_EACH q[i] = max2(fma(q[i], c[i], set(0.5f)), zero());
  TINYVIT_EACH x[i] = mul(q[i], x[i]);
}

static const float kGelu13[14] = {
    1.346593797e-01f, -6.712660939e-02f, 4.964310676e-02f,  -3.976863995e-02f, 3.206913918e-02f,
    -2.499254420e-02f, 1.831940375e-02f, -1.297623944e-02f, 9.051127359e-03f,  -5.047462415e-03f,
    1.920034760e-03f,  -1.424075337e-03f, 1.426249393e-03f, -5.147749907e-04f};
static const float kGelu7[8] = {3.984932601e-01f, -6.557351351e-02f, 9.323115461e-03f,
                                -9.570442489e-04f, 6.775707880e-05f, -3.101906032e-06f,
                                8.184223788e-08f, -9.388518851e-10f};

// 2^x for x <= 0. Below -100 the result is that of -100: values near the smallest normal number
// are hundreds of times slower on some processors, and beside the row's largest, 1, they are none.
template <int N, int D>
TINYVIT_INLINE void exp2_of(Vec* x, const float* k) {
  Vec n[N], q[N];
  TINYVIT_EACH x[i] = max2(set(-100.0f), x[i]);
  TINYVIT_EACH n[i] = nearest(x[i]);
  TINYVIT_EACH x[i] = sub(x[i], n[i]);
  TINYVIT_EACH q[i] = fma(set(k[D]), x[i], set(k[D - 1]));
TINYVIT_UNROLL(8)
  for (int j = D - 2; j >= 0; --j) TINYVIT_EACH q[i] = fma(q[i], x[i], set(k[j]));
  TINYVIT_EACH x[i] = times_power(q[i], n[i]);
}

static const float kExp5[6] = {1.000000119e+00f, 6.931469440e-01f, 2.402212024e-01f,
                               5.550713092e-02f, 9.675540961e-03f, 1.327647129e-03f};
static const float kExp3[4] = {9.999280572e-01f, 6.932609677e-01f, 2.426111251e-01f,
                               5.517166853e-02f};

struct F32 {
  typedef float T;
  static const bool kBf16 = false;
  static const int kUnits = kChannelStep;  // four-byte units of kChannelStep channels
  TINYVIT_INLINE Vec madd(Vec acc, Vec a, Vec b) { return fma(a, b, acc); }
  TINYVIT_INLINE Vec load1(const T* p) { return load(p); }
  TINYVIT_INLINE void store1(T* p, Vec a) { store(p, a); }
  TINYVIT_INLINE void load2(const T* p, Vec& a, Vec& b) { a = load(p), b = load(p + kLanes); }
  TINYVIT_INLINE void store2(T* p, Vec a, Vec b) { store(p, a), store(p + kLanes, b); }
  // In any order, as long as `merge` undoes it.
  TINYVIT_INLINE void split(const T* p, Vec& a, Vec& b) { load2(p, a, b); }
  TINYVIT_INLINE void merge(T* p, Vec a, Vec b) { store2(p, a, b); }
  template <int N>
  TINYVIT_INLINE void gelu(Vec* x) { gelu_of<N, 13, true>(x, kGelu13, 5.25f); }
  template <int N>
  TINYVIT_INLINE void exp2(Vec* x) { exp2_of<N, 5>(x, kExp5); }
};

struct Bf16 {
  typedef uint16_t T;
  static const bool kBf16 = true;
  static const int kUnits = kChannelStep / 2;
  TINYVIT_INLINE Vec madd(Vec acc, Vec a, Vec b) { return dot_bf16(acc, a, b); }
  TINYVIT_INLINE Vec load1(const T* p) { return load_bf16(p); }
  TINYVIT_INLINE void store1(T* p, Vec a) { store_bf16(p, a); }
  TINYVIT_INLINE void load2(const T* p, Vec& a, Vec& b) {
    a = load_bf16(p), b = load_bf16(p + kLanes);
  }
  TINYVIT_INLINE void store2(T* p, Vec a, Vec b) { store2_bf16(p, a, b); }
  TINYVIT_INLINE void split(const T* p, Vec& a, Vec& b) { split_bf16(p, a, b); }
  TINYVIT_INLINE void merge(T* p, Vec a, Vec b) { merge_bf16(p, a, b); }
  template <int N>
  TINYVIT_INLINE void gelu(Vec* x) { gelu_of<N, 7, false>(x, kGelu7, 4.1485f); }
  template <int N>
  TINYVIT_INLINE void exp2(Vec* x) { exp2_of<N, 3>(x, kExp3); }
};

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
