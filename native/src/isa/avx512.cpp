// AVX-512 F, BW, DQ, VL; bf16 products in pieces, for tests.
#define TINYVIT_ISA avx512
#define TINYVIT_ISA_NAME "avx512"
#include "vec_avx512.hpp"
//
#include "table.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

const Kernels* kernels(bool is_bf16) {
  return is_bf16 ? &Table<Bf16>::kernels : &Table<F32>::kernels;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
