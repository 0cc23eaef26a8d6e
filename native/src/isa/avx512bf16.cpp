// AVX-512 with its bf16 products (Zen 4, Cooper Lake and later).
#define TINYVIT_ISA avx512bf16
#define TINYVIT_ISA_NAME "avx512bf16"
#include "vec_avx512.hpp"
//
#include "table.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

const Kernels* kernels(bool is_bf16) {
  // Single precision is the same as in avx512.cpp.
  return is_bf16 ? &Table<Bf16>::kernels : nullptr;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
