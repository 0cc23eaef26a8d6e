// x86-64 with AVX2 and FMA.
#define TINYVIT_ISA avx2
#define TINYVIT_ISA_NAME "avx2"
#include "vec_avx2.hpp"
//
#include "table.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

const Kernels* kernels(bool is_bf16) {
  return is_bf16 ? &Table<Bf16>::kernels : &Table<F32>::kernels;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
