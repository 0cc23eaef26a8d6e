// A door for the tests to single kernels of any ISA: dense fp32 arrays in and out.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.hpp"
#include "layers.hpp"

using namespace tinyvit;

namespace {

// Rows of floats as tokens of padded channels, and back.
struct Tokens {
  const Kernels& k;
  int padded;
  std::vector<char> data;
  std::vector<char*> rows;
  Tokens(const Kernels& kernels, int count, int channels, const float* from = nullptr)
      : k(kernels), padded(round_up(channels, kChannelStep)), data(count * pitch() + kReadBeyond) {
    for (int t = 0; t < count; ++t) {
      rows.push_back(data.data() + t * pitch());
      if (from) k.from_float(from + t * channels, rows[t], channels);
    }
  }
  long pitch() const { return padded * static_cast<long>(k.element); }
  void read(float* to, int channels) const {
    for (size_t t = 0; t < rows.size(); ++t) k.to_float(rows[t], to + t * channels, channels);
  }
};

Folded folded(const float* w, const float* b, int outputs, int inputs, int side) {
  Folded f;
  f.outputs = outputs, f.inputs = inputs, f.side = side;
  f.weight.assign(w, w + static_cast<size_t>(outputs) * inputs * side * side);
  f.bias.assign(b, b + outputs);
  return f;
}

}  // namespace

#define DOOR extern "C" __attribute__((visibility("default")))

DOOR int door_has(const char* isa, int is_bf16) {
  try {
    return !std::strcmp(choose_kernels(is_bf16, isa)->isa, isa);
  } catch (const Error&) {
    return 0;
  }
}

DOOR void door_linear(const char* isa, int is_bf16, int tokens, int inputs, int outputs, const float* x,
                      const float* w, const float* b, const float* add, int gelu, float* y) {
  const Kernels& k = *choose_kernels(is_bf16, isa);
  Packer pack(&k, true);
  const Matrix m = pack.matrix(folded(w, b, outputs, inputs, 1));
  const Block scratch(k.linear_scratch ? k.linear_scratch(tokens, m.inputs) : 0);
  Tokens in(k, tokens, inputs, x), plus(k, tokens, outputs, add), out(k, tokens, outputs);
  k.linear({in.data.data(), in.pitch(), tokens, 0, tokens, &m, nullptr, gelu != 0, out.rows.data(),
            add ? plus.rows.data() : nullptr, scratch.data()});
  out.read(y, outputs);
}

// The same in fp32 by parts; 0 where such products are not to be had.
DOOR int door_linear_by_parts(int tokens, int inputs, int outputs, const float* x, const float* w, const float* b,
                              const float* add, int gelu, float* y) {
  const Kernels& k = *choose_kernels(false, nullptr, true);
  if (!k.split) return 0;
  Packer pack(&k);
  Matrix m = pack.matrix(folded(w, b, outputs, inputs, 1));
  std::vector<uint16_t> parts(2 * static_cast<size_t>(m.inputs) * m.outputs);
  k.split(m.panels, k.panel, static_cast<long>(k.panel) * m.inputs, m.inputs, m.inputs, m.outputs, parts.data());
  m.parts = parts.data();
  Tokens in(k, tokens, inputs, x), plus(k, tokens, outputs, add), out(k, tokens, outputs);
  k.linear({in.data.data(), in.pitch(), tokens, 0, tokens, &m, nullptr, gelu != 0, out.rows.data(),
            add ? plus.rows.data() : nullptr});
  out.read(y, outputs);
  return 1;
}

// A 3 by 3 convolution over a map [height + 2][width + 2][inputs], border included.
DOOR void door_conv(const char* isa, int is_bf16, int height, int width, int inputs, int outputs,
                    const float* x, const float* w, const float* b, float* y) {
  const Kernels& k = *choose_kernels(is_bf16, isa);
  Packer pack(&k, true);
  const Matrix m = pack.matrix(folded(w, b, outputs, inputs, 3));
  const Block scratch(k.linear_scratch ? k.linear_scratch(height * width, m.inputs) : 0);
  Tokens in(k, (height + 2) * (width + 2), inputs, x), out(k, height * width, outputs);
  std::vector<long> taps;
  const long row = (width + 2) * in.pitch();
  for (int d = 0; d < 3; ++d)
    for (int e = 0; e < 3; ++e)
      for (int c = 0; c < in.padded; c += kChannelStep)
        taps.push_back(d * row + e * in.pitch() + c * static_cast<long>(k.element));
  k.linear({in.data.data(), in.pitch(), width, row, height * width, &m, taps.data(), false,
            out.rows.data(), nullptr, scratch.data()});
  out.read(y, outputs);
}

// x: [side][(count - 1) * stride + side][channels]
DOOR void door_depthwise(const char* isa, int is_bf16, int count, int channels, int side, int stride,
                         const float* x, const float* w, const float* b, int gelu, float* y) {
  const Kernels& k = *choose_kernels(is_bf16, isa);
  Packer pack(&k);
  const Depthwise d = pack.depthwise(folded(w, b, channels, 1, side));
  const int columns = (count - 1) * stride + side;
  Tokens in(k, side * columns, channels, x), out(k, count, channels);
  std::vector<const char*> rows;
  for (int r = 0; r < side; ++r) rows.push_back(in.rows[r * columns]);
  k.depthwise({rows.data(), in.pitch(), count, stride, &d, gelu != 0, out.data.data(), out.pitch()});
  out.read(y, channels);
}

DOOR void door_normalize(const char* isa, int is_bf16, int tokens, int channels, const float* gamma,
                         const float* beta, const float* x, float* y) {
  const Kernels& k = *choose_kernels(is_bf16, isa);
  Packer pack(&k);
  Tokens in(k, tokens, channels, x), out(k, tokens, channels);
  const auto padded = [&](const float* p) {
    return p ? pack.floats(std::vector<float>(p, p + channels), in.padded) : nullptr;
  };
  k.normalize({in.rows.data(), tokens, channels, in.padded, 1e-5f, padded(gamma), padded(beta),
               out.rows.data(), false});
  out.read(y, channels);
}

// qkv: [side * side][3][heads][width], q times log2(e); positions: [count]; y: [count][heads][width]
DOOR void door_attend(const char* isa, int is_bf16, int side, int heads, int width, int count,
                      const int* positions, const float* qkv, const float* table, float* y) {
  const Kernels& k = *choose_kernels(is_bf16, isa);
  const int tokens = side * side, padded = round_up(width, kChannelStep);
  std::vector<float> spread(static_cast<size_t>(tokens) * 3 * heads * padded), out(count * heads * padded);
  for (int i = 0; i < tokens * 3 * heads; ++i)
    std::copy_n(qkv + i * width, width, spread.data() + i * padded);
  Tokens rows(k, tokens, 3 * heads * padded, spread.data()), result(k, count, heads * padded);
  std::vector<char> queries(count * rows.pitch() + kReadBeyond), scratch(k.attend_scratch(side, padded));
  for (int i = 0; i < count; ++i)
    std::memcpy(queries.data() + i * rows.pitch(), rows.rows[positions[i]], rows.pitch());
  std::vector<float> bias = spread_biases(table, heads, side);
  bias.resize(bias.size() + 64);
  k.attend({rows.rows.data(), queries.data(), rows.pitch(), positions, count, side, heads, padded,
            bias.data(), result.data.data(), result.pitch(), scratch.data()});
  result.read(out.data(), heads * padded);
  for (int i = 0; i < count * heads; ++i) std::copy_n(out.data() + i * padded, width, y + i * width);
}

DOOR void door_planes(const char* isa, int is_bf16, int tokens, int channels, const float* x, float* y) {
  const Kernels& k = *choose_kernels(is_bf16, isa);
  Tokens in(k, tokens, channels, x);
  k.to_planes(in.rows.data(), tokens, channels, y, tokens);
}

DOOR void door_gelu(const char* isa, int is_bf16, const float* x, float* y, int count) {
  choose_kernels(is_bf16, isa)->gelu(x, y, count);
}

DOOR void door_exp2(const char* isa, int is_bf16, const float* x, float* y, int count) {
  choose_kernels(is_bf16, isa)->exp2(x, y, count);
}
