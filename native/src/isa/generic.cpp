// Any processor.
#define TINYVIT_ISA generic
#define TINYVIT_ISA_NAME "generic"
#include "vec_generic.hpp"
//
#include "table.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

const Kernels* kernels(bool is_bf16) {
  return is_bf16 ? &Table<Bf16>::kernels : &Table<F32>::kernels;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
