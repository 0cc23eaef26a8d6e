// Loops that must be unrolled, since their arrays are meant to be registers.
#pragma once

#define TINYVIT_INLINE static inline __attribute__((always_inline))
#define TINYVIT_TEXT(x) #x
#if defined(TINYVIT_SANITIZED)  // unrolled and instrumented code takes minutes to compile
#define TINYVIT_UNROLL(n)
#elif defined(__clang__)
#define TINYVIT_UNROLL(n) _Pragma(TINYVIT_TEXT(unroll n))
#else
#define TINYVIT_UNROLL(n) _Pragma(TINYVIT_TEXT(GCC unroll n))
#endif
