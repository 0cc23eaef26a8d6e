// Named tensors, as in a state dict, made into the form that kernels want.
//
// What is affine and stands beside a matrix product is folded into it, in double: batch norm into
// its convolution, LayerNorm's affine into the linear layer behind it. A norm whose tensors are
// absent is the identity, so tensors that were folded before are taken as they are.
#include "weights.hpp"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef _WIN32
#include <malloc.h>
#endif

namespace tinyvit {

void Block::Free::operator()(char* p) const {
#ifdef _WIN32
  _aligned_free(p);
#else
  std::free(p);
#endif
}

Block::Block(size_t bytes) : bytes_(bytes) {
  const size_t kHuge = size_t(2) << 20;
  const size_t alignment = bytes >= 2 * kHuge ? kHuge : 64;
  const size_t all = (bytes + kReadBeyond + 63) / 64 * 64;
  if (all < bytes) throw std::bad_alloc();
  void* p = nullptr;
#ifdef _WIN32
  p = _aligned_malloc(all, alignment);
#else
  if (posix_memalign(&p, alignment, all)) p = nullptr;
#endif
  if (!p) throw std::bad_alloc();
  data_.reset(static_cast<char*>(p));
#ifdef __linux__
  if (alignment == kHuge) madvise(p, all / kHuge * kHuge, MADV_HUGEPAGE);  // a wish
#endif
  std::memset(p, 0, all);
}

Tensors::Tensors(const tinyvit_tensor* tensors, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (!tensors[i].name || (!tensors[i].data && tensors[i].ndim >= 0))
      throw Error(TINYVIT_INVALID, "tensor " + std::to_string(i) + " has no name or no data");
    if (tensors[i].ndim < 0 || tensors[i].ndim > 4)
      throw Error(TINYVIT_INVALID, std::string("tensor '") + tensors[i].name + "' has " +
                                       std::to_string(tensors[i].ndim) + " dimensions; 0 to 4 go");
    by_name_[tensors[i].name] = &tensors[i];
  }
}

static std::string text(const std::vector<long>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i)
    s += (i ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  return s + "]";
}

const tinyvit_tensor& Tensors::get(const std::string& name, const std::vector<long>& shape) const {
  const auto at = by_name_.find(name);
  if (at == by_name_.end()) throw Error(TINYVIT_INVALID, "tensor '" + name + "' is missing");
  const tinyvit_tensor& t = *at->second;
  bool fits = t.ndim == static_cast<int>(shape.size());
  for (size_t i = 0; fits && i < shape.size(); ++i)
    fits = t.shape[i] > 0 && (shape[i] < 0 || t.shape[i] == shape[i]);
  if (!fits) {
    const std::vector<long> got(t.shape, t.shape + t.ndim);
    throw Error(TINYVIT_INVALID,
                "tensor '" + name + "' must be " + text(shape) + ", got " + text(got));
  }
  return t;
}

std::vector<float> Tensors::vector(const std::string& name, int size) const {
  const float* p = get(name, {size}).data;
  return std::vector<float>(p, p + size);
}

Folded Tensors::conv(const std::string& name, int outputs, int inputs, int side) const {
  if (has(name + ".c.weight")) return conv(name + ".c", name + ".bn", outputs, inputs, side);
  return conv(name, "", outputs, inputs, side);
}

Folded Tensors::conv(const std::string& conv, const std::string& norm, int outputs, int inputs,
                     int side) const {
  const tinyvit_tensor& w = get(conv + ".weight", {outputs, inputs, side, side});
  Folded f;
  f.outputs = static_cast<int>(w.shape[0]), f.inputs = static_cast<int>(w.shape[1]);
  f.side = static_cast<int>(w.shape[2]);
  if (w.shape[3] != w.shape[2])
    throw Error(TINYVIT_INVALID, "tensor '" + conv + ".weight' must have a square kernel");
  const size_t each = static_cast<size_t>(f.inputs) * f.side * f.side;
  f.weight.assign(w.data, w.data + each * f.outputs);
  f.bias.assign(f.outputs, 0.0);
  if (has(conv + ".bias")) {
    const std::vector<float> b = vector(conv + ".bias", f.outputs);
    f.bias.assign(b.begin(), b.end());
  }
  if (!norm.empty() && has(norm + ".weight")) {
    const auto gamma = vector(norm + ".weight", f.outputs), beta = vector(norm + ".bias", f.outputs);
    const auto mean = vector(norm + ".running_mean", f.outputs);
    const auto var = vector(norm + ".running_var", f.outputs);
    for (int n = 0; n < f.outputs; ++n) {
      const double scale = gamma[n] / std::sqrt(static_cast<double>(var[n]) + 1e-5);
      for (size_t k = 0; k < each; ++k) f.weight[n * each + k] *= scale;
      f.bias[n] = beta[n] + (f.bias[n] - mean[n]) * scale;
    }
  }
  return f;
}

Folded Tensors::linear(const std::string& name, const std::string& norm, int outputs,
                       int inputs) const {
  const tinyvit_tensor& w = get(name + ".weight", {outputs, inputs});
  Folded f;
  f.outputs = static_cast<int>(w.shape[0]), f.inputs = static_cast<int>(w.shape[1]);
  f.weight.assign(w.data, w.data + static_cast<size_t>(f.outputs) * f.inputs);
  const std::vector<float> b = vector(name + ".bias", f.outputs);
  f.bias.assign(b.begin(), b.end());
  if (!norm.empty() && has(norm + ".weight")) {
    const auto gamma = vector(norm + ".weight", f.inputs), beta = vector(norm + ".bias", f.inputs);
    for (int n = 0; n < f.outputs; ++n)
      for (int k = 0; k < f.inputs; ++k) {
        double& v = f.weight[static_cast<size_t>(n) * f.inputs + k];
        f.bias[n] += v * beta[k];
        v *= gamma[k];
      }
  }
  return f;
}

char* Packer::take(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  const size_t kChunk = size_t(4) << 20;
  if (blocks_.empty() || used_ + bytes > blocks_.back().bytes()) {
    blocks_.emplace_back(bytes > kChunk ? bytes : kChunk);
    used_ = 0;
  }
  char* p = blocks_.back().data() + used_;
  used_ += bytes, bytes_ += bytes;
  return p;
}

static uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static Packer::Order all_of(const Packer::Order& order, int count) {
  Packer::Order o = order;
  for (int i = 0; order.empty() && i < count; ++i) o.push_back(i);
  o.resize(round_up(static_cast<int>(o.size()), kChannelStep), -1);
  return o;
}

Matrix Packer::matrix(const Folded& layer, const Order& outputs, const Order& inputs) {
  const int taps = layer.side * layer.side;
  const Order out = all_of(outputs, layer.outputs), in = all_of(inputs, layer.inputs);
  Matrix m;
  m.outputs = static_cast<int>(out.size()), m.inputs = static_cast<int>(in.size()) * taps;
  const size_t unit = kernels_->element, panel = kernels_->panel;
  char* p = take(static_cast<size_t>(m.outputs) * m.inputs * unit);
  m.panels = reinterpret_cast<float*>(p);
  m.bias = reinterpret_cast<float*>(take(m.outputs * sizeof(float)));
  const int pair = kernels_->is_bf16 ? 2 : 1;
  for (int n = 0; n < m.outputs; ++n) {
    if (out[n] < 0) continue;  // memory is zero
    m.bias[n] = static_cast<float>(layer.bias[out[n]]);
    char* column = p + static_cast<size_t>(n) / panel * panel * m.inputs * unit;
    for (int k = 0; k < m.inputs; ++k) {
      const int tap = k / static_cast<int>(in.size()), channel = in[k % in.size()];
      if (channel < 0) continue;
      const float v = static_cast<float>(
          layer.weight[(static_cast<size_t>(out[n]) * layer.inputs + channel) * taps + tap]);
      const size_t at = (k / pair * panel + n % panel) * pair + k % pair;
      if (kernels_->is_bf16) reinterpret_cast<uint16_t*>(column)[at] = to_bf16(v);
      else reinterpret_cast<float*>(column)[at] = v;
    }
  }
  if (has_thirds_) add_thirds(m);
  return m;
}

// Of finite weights only.
void Packer::add_thirds(Matrix& m) {
  const int panel = kernels_->panel, half = panel / 2, groups = m.inputs / kChannelStep, kParts = 3;
  const size_t count = static_cast<size_t>(m.outputs) * m.inputs;
  uint16_t* parts = reinterpret_cast<uint16_t*>(take(count * kParts * sizeof(uint16_t)));
  for (int n = 0; n < m.outputs; ++n)
    for (int k = 0; k < m.inputs; ++k) {
      const int column = n % panel, within = k % kChannelStep;
      float left = m.panels[static_cast<size_t>(n / panel) * panel * m.inputs + static_cast<size_t>(k) * panel + column];
      const size_t group = (static_cast<size_t>(n / panel) * groups + k / kChannelStep) * kParts;
      for (int i = 0; i < kParts; ++i) {
        const uint16_t part = to_bf16(left);
        const uint32_t bits = static_cast<uint32_t>(part) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        left -= f;
        parts[(((group + i) * 2 + column / half) * (kChannelStep / 2) + within / 2) * panel + column % half * 2 + within % 2] = part;
      }
      if (left != left) return;
    }
  m.thirds = parts;
}

Depthwise Packer::depthwise(const Folded& layer) {
  Depthwise d;
  d.channels = round_up(layer.outputs, kChannelStep), d.side = layer.side;
  const int taps = d.side * d.side, lanes = kernels_->lanes;
  d.taps = reinterpret_cast<float*>(take(sizeof(float) * d.channels * taps));
  d.bias = reinterpret_cast<float*>(take(sizeof(float) * d.channels));
  for (int ch = 0; ch < layer.outputs; ++ch) {
    const int group = ch / (2 * lanes) * (2 * lanes), within = ch - group;
    // bf16 values are read as the even ones and the odd ones
    const int half = kernels_->is_bf16 ? within % 2 : within / lanes;
    const int lane = kernels_->is_bf16 ? within / 2 : within % lanes;
    d.bias[group + half * lanes + lane] = static_cast<float>(layer.bias[ch]);
    for (int t = 0; t < taps; ++t)
      d.taps[group * taps + (t * 2 + half) * lanes + lane] =
          static_cast<float>(layer.weight[static_cast<size_t>(ch) * taps + t]);
  }
  return d;
}

float* Packer::floats(const std::vector<float>& values, int padded) {
  float* p = reinterpret_cast<float*>(take(sizeof(float) * padded));
  std::memcpy(p, values.data(), sizeof(float) * values.size());
  return p;
}

char* Packer::values(const std::vector<double>& values) {
  const std::vector<float> f(values.begin(), values.end());
  char* p = take(kernels_->element * f.size());
  kernels_->from_float(f.data(), p, static_cast<int>(f.size()));
  return p;
}

}  // namespace tinyvit
