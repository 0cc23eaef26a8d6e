// AMX: bf16 products of 32 tokens by 32 outputs at a time; everything else as avx512bf16.
//
// Taken only where the processor has it, the kernel allows it, and a self-check agrees with the
// products of avx512bf16 (see kernels() below).
#define TINYVIT_ISA amx
#define TINYVIT_ISA_NAME "amx"
#include "vec_avx512.hpp"
//
#include "table.hpp"

namespace tinyvit {
namespace TINYVIT_ISA {

// Tiles 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights; 16 rows of 64 bytes each.
static void configure() {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
  } c;
  for (int i = 0; i < 8; ++i) c.columns[i] = 64, c.rows[i] = 16;
  _tile_loadconfig(&c);
}

static void linear_tiles(const LinearCall& l) {
  const Matrix& m = *l.weights;
  const int groups = m.inputs / kChannelStep;
  alignas(64) float sums[32 * 32];
  configure();
  for (int n = 0; n < m.outputs; n += 32) {
    // A panel is [inputs / 2][32 outputs][2]: each half of it is a tile with rows 128 bytes apart.
    const char* w = reinterpret_cast<const char*>(m.panels + static_cast<long>(n) * m.inputs / 2);
    for (int start = 0; start < l.tokens; start += l.run) {
      const int end = start + l.run < l.tokens ? start + l.run : l.tokens;
      const char* a = l.in + start / l.run * l.jump;
      for (int t = start; t + 32 <= end; t += 32, a += 32 * l.pitch) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int g = 0; g < groups; ++g) {
          const char* p = l.taps ? a + l.taps[g] : a + 64L * g;
          const char* b = w + 2048L * g;
          _tile_loadd(4, p, l.pitch);
          _tile_loadd(6, b, 128);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b + 64, 128);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, p + 16 * l.pitch, l.pitch);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 128);
        _tile_stored(1, sums + 16, 128);
        _tile_stored(2, sums + 512, 128);
        _tile_stored(3, sums + 528, 128);
        for (int r = 0; r < 32; r += 4) {
          Vec c[4][2];
          for (int i = 0; i < 4; ++i)
            c[i][0] = load(sums + (r + i) * 32), c[i][1] = load(sums + (r + i) * 32 + 16);
          const char* const* add = l.add ? l.add + t + r : nullptr;
          if (l.gelu) finish<Bf16, 4, true>(c, m.bias + n, l.out + t + r, add, 2L * n);
          else finish<Bf16, 4, false>(c, m.bias + n, l.out + t + r, add, 2L * n);
        }
      }
    }
  }
  _tile_release();
}

// Whole blocks of 32 tokens by tiles, what is left of each run by vectors.
static void linear_amx(const LinearCall& l) {
  if (l.run >= 32) linear_tiles(l);
  for (int start = 0; start < l.tokens; start += l.run) {
    const int end = start + l.run < l.tokens ? start + l.run : l.tokens;
    const int first = start + (end - start) / 32 * 32;
    if (first == end) continue;
    LinearCall rest = l;
    rest.in = l.in + start / l.run * l.jump + (first - start) * l.pitch;
    rest.tokens = rest.run = end - first;
    rest.out = l.out + first;
    rest.add = l.add ? l.add + first : nullptr;
    linear<Bf16>(rest);
  }
}

// The sums of tiles and of vectors for small whole numbers, where both are exact.
static bool agrees() {
  alignas(64) static const int kTokens = 32, kInputs = 64, kOutputs = 32;
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
  return is_bf16 && agrees() ? &Table<Bf16, linear_amx>::kernels : nullptr;
}

}  // namespace TINYVIT_ISA
}  // namespace tinyvit
