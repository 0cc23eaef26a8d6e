// What follows the stages: SAM's neck, EfficientSAM3's head, the classification head.
#include <cmath>
#include <cstring>

#include "layers.hpp"

namespace tinyvit {
namespace {

struct EndSpace {
  char *row, *products;
  char** rows;
  char** out;
  long* taps;

  EndSpace(Arena& arena, const Ending& end, const Kernels& k, int width) {
    row = arena.take<char>(static_cast<size_t>(width) * end.padded * k.element);
    rows = arena.take<char*>(width);
    out = arena.take<char*>(width);
    taps = arena.take<long>(9 * end.padded / kChannelStep);
    products = take_products(arena, k, width, end.reduce.inputs, width, end.conv.inputs);
  }
};

}  // namespace

void Ending::make(const Tensors& tensors, Packer& pack, int what, int in) {
  kind = what;
  const bool is_neck = kind == TINYVIT_END_SAM;
  const std::string own = is_neck || tensors.has("neck.1.running_mean") ? "neck." : "head.";
  const Folded a = tensors.conv(own + "0", is_neck ? "" : own + "1", -1, in, 1);
  channels = a.outputs;
  reduce = pack.matrix(a);
  conv = pack.matrix(tensors.conv(own + (is_neck ? "2" : "3"), "", channels, channels, 3));
  padded = reduce.outputs;
  for (int i = 0; is_neck && i < 2; ++i) {
    const std::string norm = i ? "neck.3" : "neck.1";
    gamma[i] = pack.floats(tensors.vector(norm + ".weight", channels), padded);
    beta[i] = pack.floats(tensors.vector(norm + ".bias", channels), padded);
  }
}

size_t Ending::scratch(const Kernels& k, int width) const {
  Arena arena(nullptr);
  EndSpace(arena, *this, k, width);
  return arena.used();
}

void Ending::reduce_row(const Kernels& k, const Map& in, const Map& out, int y, char* scratch) const {
  Arena arena(scratch);
  EndSpace s(arena, *this, k, in.width);
  for (int x = 0; x < in.width; ++x) s.rows[x] = out.at(y, x);
  const bool is_neck = kind == TINYVIT_END_SAM;
  k.linear({in.at(y, 0), in.pitch, in.width, 0, in.width, &reduce, nullptr, !is_neck, s.rows, nullptr, s.products});
  if (is_neck)
    k.normalize({s.rows, in.width, channels, padded, 1e-6f, gamma[0], beta[0], s.rows, false});
}

void Ending::conv_row(const Kernels& k, const Map& in, int y, float* out, char* scratch) const {
  Arena arena(scratch);
  EndSpace s(arena, *this, k, in.width);
  const long px = padded * static_cast<long>(k.element);
  for (int x = 0; x < in.width; ++x) {
    s.rows[x] = s.row + x * px;
    s.out[x] = reinterpret_cast<char*>(out + static_cast<long>(x) * padded);
  }
  long* tap = s.taps;
  for (int d = -1; d <= 1; ++d)
    for (int x = -1; x <= 1; ++x)
      for (int c = 0; c < padded; c += kChannelStep)
        *tap++ = d * in.row + x * in.pitch + c * static_cast<long>(k.element);
  k.linear({in.at(y, 0), in.pitch, in.width, 0, in.width, &conv, s.taps, false, s.rows, nullptr, s.products});
  if (kind == TINYVIT_END_SAM) {
    k.normalize({s.rows, in.width, channels, padded, 1e-6f, gamma[1], beta[1], s.out, true});
  } else {
    k.to_float(s.row, out, in.width * padded);
  }
}

void Head::make(const Tensors& tensors, Packer& pack, int dim) {
  is_there = true, channels = dim;
  gamma = tensors.vector("norm_head.weight", dim), beta = tensors.vector("norm_head.bias", dim);
  has_linear = tensors.has("head.weight");
  outputs = dim;
  if (has_linear) {
    const Folded f = tensors.linear("head", "", -1, dim);
    outputs = f.outputs;
    linear = pack.matrix(f);
  }
}

size_t Head::scratch(const Kernels& k, const Map& in) const {
  (void)k;
  Arena arena(nullptr);
  const int padded = round_up(channels, kChannelStep);
  arena.take<float>(static_cast<size_t>(in.width) * padded);
  arena.take<double>(channels), arena.take<float>(padded), arena.take<float>(round_up(outputs, kChannelStep));
  return arena.used();
}

void Head::run(const Kernels& maps, const Kernels& floats, const Map& in, float* out,
               char* scratch) const {
  Arena arena(scratch);
  const int padded = round_up(channels, kChannelStep);
  float* row = arena.take<float>(static_cast<size_t>(in.width) * padded);
  double* mean = arena.take<double>(channels);
  float* pooled = arena.take<float>(padded);
  float* result = arena.take<float>(round_up(outputs, kChannelStep));
  for (int c = 0; c < channels; ++c) mean[c] = 0;
  for (int y = 0; y < in.height; ++y) {
    maps.to_float(in.at(y, 0), row, in.width * padded);
    for (int x = 0; x < in.width; ++x)
      for (int c = 0; c < channels; ++c) mean[c] += row[static_cast<long>(x) * padded + c];
  }
  const double area = static_cast<double>(in.height) * in.width;
  double average = 0, variance = 0;
  for (int c = 0; c < channels; ++c) average += mean[c] /= area;
  average /= channels;
  for (int c = 0; c < channels; ++c) variance += (mean[c] - average) * (mean[c] - average);
  const double scale = 1.0 / std::sqrt(variance / channels + 1e-5);
  std::memset(pooled, 0, sizeof(float) * padded);
  for (int c = 0; c < channels; ++c)
    pooled[c] = static_cast<float>((mean[c] - average) * scale * gamma[c] + beta[c]);
  if (has_linear) {
    char* to = reinterpret_cast<char*>(result);
    floats.linear({reinterpret_cast<char*>(pooled), 0, 1, 0, 1, &linear, nullptr, false, &to, nullptr});
  }
  std::memcpy(out, has_linear ? result : pooled, sizeof(float) * outputs);
}

}  // namespace tinyvit
