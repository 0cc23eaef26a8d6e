// The tables of one ISA. Included last, once, by the ISA's own translation unit.
#pragma once
#include "../kernels.hpp"
//
#include "functions.hpp"
//
#include "gemm.hpp"
//
#include "attention.hpp"
#include "depthwise.hpp"
#include "lines.hpp"
#include "softmax.hpp"
#include "norm.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

template <class P, void (*kLinear)(const LinearCall&) = linear<P>,
          void (*kAttend)(const AttendCall&) = attend<P>, size_t (*kScratch)(int, int) = attend_scratch<P>,
          size_t (*kLinearScratch)(int, int) = nullptr>
struct Table {
  static constexpr Kernels kernels = {
      TINYVIT_ISA_NAME,  kLanes,         2 * kLanes,    kTileRows,     P::kBf16,
      sizeof(typename P::T), kLinear, kLinearScratch, depthwise<P>,  normalize<P>,  kAttend,
      kScratch,          from_float<P>,  to_float<P>,   to_planes<P>,  project,
      gelu_many<P>,      exp2_many<P>,   add_many,      place,         largest_of,
      weigh,             soften,
      add_scaled,        blend,         expand,        above,         mark};
};

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
