// AMX: products by tiles, in fp32 six of bf16; everything else as avx512bf16.
//
// Taken only where the processor has it, the kernel allows it, and a self-check agrees with the
// products of avx512bf16 (see kernels() below).
#define TINYVIT_ISA amx
#define TINYVIT_ISA_NAME "amx"
#include "vec_avx512.hpp"
//
#include "table.hpp"
//
#include "tiles.hpp"
//
#include "tiles_split.hpp"
//
#include "six.hpp"
//
#include "attention_tiles.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

// Whether tiles and vectors agree on small whole numbers, whose sums are exact in any order.
static bool agrees() {
  constexpr int kTokens = 2 * kTile, kInputs = 64, kOutputs = 32;
  alignas(64) uint16_t in[kTokens * kInputs], tiles[kTokens * kOutputs], vectors[kTokens * kOutputs];
  alignas(64) uint16_t panels[kInputs * kOutputs];
  alignas(64) float bias[kOutputs] = {};
  const auto whole = [](int n) {  // as bf16
    const float f = static_cast<float>(n);
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return static_cast<uint16_t>(u >> 16);
  };
  for (int i = 0; i < kTokens * kInputs; ++i) in[i] = whole(i * 7 % 5 - 2);
  for (int i = 0; i < kInputs * kOutputs; ++i) panels[i] = whole(i * 11 % 7 - 3);
  Matrix m;
  m.panels = reinterpret_cast<float*>(panels), m.bias = bias, m.inputs = kInputs, m.outputs = kOutputs;
  char* out[2][kTokens];
  for (int t = 0; t < kTokens; ++t) {
    out[0][t] = reinterpret_cast<char*>(tiles + t * kOutputs);
    out[1][t] = reinterpret_cast<char*>(vectors + t * kOutputs);
  }
  LinearCall call = {reinterpret_cast<char*>(in), 2 * kInputs, kTokens, 0, kTokens, &m, nullptr, false, out[0], nullptr};
  linear_tiles(call);
  call.out = out[1];
  linear<Bf16>(call);
  return __builtin_memcmp(tiles, vectors, sizeof tiles) == 0;
}

const Kernels* kernels(bool is_bf16) {
  if (!agrees()) return nullptr;
  return is_bf16 ? &Table<Bf16, linear_tiles, attend_tiles, attend_tiles_scratch>::kernels
                 : &Table<F32, linear_six, attend<F32>, attend_scratch<F32>, six_scratch>::kernels;
}

const Kernels* splitting_kernels() {
  static const Kernels kernels = [] {
    Kernels k = Table<F32, linear_split>::kernels;
    k.split = split;
    return k;
  }();
  return agrees() ? &kernels : nullptr;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
