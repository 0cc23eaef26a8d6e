// TinyViTBlock: window attention, then depthwise convolution and perceptron.
//
// The tokens of a group of windows are gathered window by window while they are normalised, so that
// qkv, attention and proj run on one dense block that stays in the cache. Padding positions are no
// tokens here: no product and no query is spent on them, only their key and value take part.
#include <algorithm>
#include <cmath>

#include "layers.hpp"

namespace tinyvit {
namespace {

constexpr double kLog2e = 1.4426950408889634;

struct WindowSpace {
  char *normed, *qkv, *mixed, *attention, *products;
  const char **in, **keys;
  char **rows, **out;
  int* positions;
  long qkv_pitch, mixed_pitch;

  WindowSpace(Arena& arena, const TokenBlock& b, const Kernels& k, int windows) {
    const size_t area = static_cast<size_t>(b.side) * b.side, tokens = area * windows;
    qkv_pitch = b.qkv.outputs * static_cast<long>(k.element);
    mixed_pitch = b.proj.inputs * static_cast<long>(k.element);
    normed = arena.take<char>(tokens * b.padded * k.element);
    qkv = arena.take<char>(tokens * qkv_pitch);
    mixed = arena.take<char>(tokens * mixed_pitch);
    attention = arena.take<char>(k.attend_scratch(b.side, b.width));
    products = take_products(arena, k, tokens, b.padded, tokens, b.proj.inputs);
    in = arena.take<const char*>(tokens);
    keys = arena.take<const char*>(area);
    rows = arena.take<char*>(tokens);
    out = arena.take<char*>(tokens);
    positions = arena.take<int>(area);
  }
};

struct PatchSpace {
  char *local, *normed, *hidden, *products;
  char **rows, **steps, **out;
  const char** kernel;

  PatchSpace(Arena& arena, const TokenBlock& b, const Kernels& k, int tokens) {
    local = arena.take<char>(static_cast<size_t>(tokens) * b.padded * k.element);
    normed = arena.take<char>(static_cast<size_t>(tokens) * b.padded * k.element);
    hidden = arena.take<char>(static_cast<size_t>(tokens) * b.hidden * k.element);
    products = take_products(arena, k, tokens, b.padded, tokens, b.hidden);
    rows = arena.take<char*>(tokens);
    steps = arena.take<char*>(tokens);
    out = arena.take<char*>(tokens);
    kernel = arena.take<const char*>(b.local.side);
  }
};

// Sizes of the part of a window that lies in the map.
int inside(int index, int side, int length) { return std::min(side, length - index * side); }

}  // namespace

std::vector<float> spread_biases(const float* table, int heads, int side) {
  std::vector<float> rows;
  for (int h = 0; h < heads; ++h)
    for (int x = 0; x < side; ++x)
      for (int dy = 1 - side; dy < side; ++dy)
        for (int kx = 0; kx < side; ++kx)
          rows.push_back(static_cast<float>(
              kLog2e * table[(h * side + std::abs(dy)) * side + std::abs(kx - x)]));
  return rows;
}

void TokenBlock::make(const Tensors& tensors, Packer& pack, const std::string& name, int dim,
                      int num_heads, int window) {
  channels = dim, heads = num_heads, side = window;
  const int d = dim / heads;
  width = round_up(d, kChannelStep);
  Folded all = tensors.linear(name + ".attn.qkv", name + ".attn.norm", 3 * dim, dim);
  const double scale = kLog2e / std::sqrt(static_cast<double>(d));
  Packer::Order order;  // q of all heads, then k, then v; each head padded
  for (int part = 0; part < 3; ++part)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < width; ++i) order.push_back(i < d ? (h * 3 + part) * d + i : -1);
  for (int n = 0; n < 3 * dim; ++n) {
    if (n % (3 * d) >= d) continue;
    all.bias[n] *= scale;
    for (int i = 0; i < dim; ++i) all.weight[static_cast<size_t>(n) * dim + i] *= scale;
  }
  qkv = pack.matrix(all, order);
  std::vector<double> outside;
  for (int n : order) outside.push_back(n < 0 ? 0.0 : all.bias[n]);
  padding = pack.values(outside);
  Packer::Order merged;
  for (int h = 0; h < heads; ++h)
    for (int i = 0; i < width; ++i) merged.push_back(i < d ? h * d + i : -1);
  proj = pack.matrix(tensors.linear(name + ".attn.proj", "", dim, dim), {}, merged);
  const std::vector<long> shape = {heads, static_cast<long>(side) * side};
  const float* table = tensors.get(name + ".attn.attention_biases", shape).data;
  const std::vector<float> rows = spread_biases(table, heads, side);
  bias = pack.floats(rows, static_cast<int>(rows.size()) + 64);  // read beyond, in whole vectors
  local = pack.depthwise(tensors.conv(name + ".local_conv", dim, 1, -1));
  if (local.side % 2 == 0)
    throw Error(TINYVIT_INVALID, name + ".local_conv must have an odd kernel");
  const Folded wide = tensors.linear(name + ".mlp.fc1", name + ".mlp.norm", -1, dim);
  fc1 = pack.matrix(wide);
  fc2 = pack.matrix(tensors.linear(name + ".mlp.fc2", "", dim, wide.outputs));
  padded = fc2.outputs, hidden = fc1.outputs;
}

int TokenBlock::windows_at_once(const Kernels& k, int windows, int threads) const {
  const long kBytes = 384 << 10;  // of q, k and v: with the rest of the block they fill a cache
  const long each = static_cast<long>(side) * side * qkv.outputs * static_cast<long>(k.element);
  const long share = threads > 1 ? std::max(windows / (4 * threads), 1) : windows;
  return static_cast<int>(std::max(std::min(kBytes / each, share), 1L));
}

size_t TokenBlock::attend_scratch(const Kernels& k, int windows) const {
  Arena arena(nullptr);
  WindowSpace(arena, *this, k, windows);
  return arena.used();
}

void TokenBlock::attend(const Kernels& k, const Map& in, const Map& out, int row, int first,
                        int last, char* scratch) const {
  Arena arena(scratch);
  WindowSpace s(arena, *this, k, last - first);
  const int top = row * side, rows = inside(row, side, in.height);
  int tokens = 0;
  for (int w = first; w < last; ++w)
    for (int y = 0; y < rows; ++y)
      for (int x = 0; x < inside(w, side, in.width); ++x, ++tokens) {
        s.in[tokens] = in.at(top + y, w * side + x);
        s.out[tokens] = out.at(top + y, w * side + x);
        s.rows[tokens] = s.normed + tokens * in.pitch;
      }
  k.normalize({s.in, tokens, channels, padded, 1e-5f, nullptr, nullptr, s.rows, false});
  for (int t = 0; t < tokens; ++t) s.rows[t] = s.qkv + t * s.qkv_pitch;
  k.linear({s.normed, in.pitch, tokens, 0, tokens, &qkv, nullptr, false, s.rows, nullptr, s.products});
  int done = 0;
  for (int w = first; w < last; ++w) {
    const int columns = inside(w, side, in.width);
    int count = 0;
    for (int y = 0; y < side; ++y)
      for (int x = 0; x < side; ++x) {
        const bool is_inside = y < rows && x < columns;
        s.keys[y * side + x] = is_inside ? s.rows[done + count] : padding;
        if (is_inside) s.positions[count++] = y * side + x;
      }
    k.attend({s.keys, s.rows[done], s.qkv_pitch, s.positions, count, side, heads, width, bias,
              s.mixed + done * s.mixed_pitch, s.mixed_pitch, s.attention});
    done += count;
  }
  k.linear({s.mixed, s.mixed_pitch, tokens, 0, tokens, &proj, nullptr, false, s.out, s.in, s.products});
}

size_t TokenBlock::mix_scratch(const Kernels& k, int tokens) const {
  Arena arena(nullptr);
  PatchSpace(arena, *this, k, tokens);
  return arena.used();
}

void TokenBlock::mix(const Kernels& k, const Map& in, const Map& out, int top, int bottom, int left,
                     int right, char* scratch) const {
  Arena arena(scratch);
  const int columns = right - left, tokens = (bottom - top) * columns, border = local.side / 2;
  PatchSpace s(arena, *this, k, tokens);
  for (int y = top; y < bottom; ++y) {
    for (int d = 0; d < local.side; ++d) s.kernel[d] = in.at(y - border + d, left - border);
    char* to = s.local + (y - top) * columns * in.pitch;
    k.depthwise({s.kernel, in.pitch, columns, 1, &local, false, to, in.pitch});
    for (int x = 0; x < columns; ++x) s.out[(y - top) * columns + x] = out.at(y, left + x);
  }
  for (int t = 0; t < tokens; ++t) s.rows[t] = s.local + t * in.pitch;
  // The depthwise result is both what is normalised and what the perceptron's output is added to.
  for (int t = 0; t < tokens; ++t) s.steps[t] = s.normed + t * in.pitch;
  k.normalize({s.rows, tokens, channels, padded, 1e-5f, nullptr, nullptr, s.steps, false});
  const long wide = hidden * static_cast<long>(k.element);
  for (int t = 0; t < tokens; ++t) s.steps[t] = s.hidden + t * wide;
  k.linear({s.normed, in.pitch, tokens, 0, tokens, &fc1, nullptr, true, s.steps, nullptr, s.products});
  k.linear({s.hidden, wide, tokens, 0, tokens, &fc2, nullptr, false, s.out, s.rows, s.products});
}

}  // namespace tinyvit
