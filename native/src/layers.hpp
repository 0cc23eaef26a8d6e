// The layers of the network: packed weights, and the function that computes one piece of each.
//
// A piece is a range of rows or windows of one map. Pieces write disjoint parts of their output and
// share nothing, so they can run in any order and on any thread; what a piece needs in between lies
// in its worker's scratch memory. Halo rows are computed by both neighbours, with the same bits.
#pragma once
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"
#include "weights.hpp"

namespace tinyvit {

// Hands out parts of a block of memory; over null it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return base_ ? p : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A map [height][width][channels]; `pitch` bytes from a token to the next, `row` to the row below.
struct Map {
  char* data = nullptr;
  int height = 0, width = 0;
  long pitch = 0, row = 0;
  char* at(int y, int x) const { return data + y * row + x * pitch; }
};

inline Map dense_map(char* data, int height, int width, long pitch) {
  return {data, height, width, pitch, pitch * width};
}
// A map with `border` zero rows and columns around it; they are written here.
Map bordered_map(char* data, int height, int width, long pitch, int border);

// Memory for either of two products, where the kernels want some.
inline char* take_products(Arena& arena, const Kernels& k, size_t tokens, int inputs, size_t other_tokens,
                           int other_inputs) {
  if (!k.linear_scratch) return nullptr;
  const size_t a = k.linear_scratch(static_cast<int>(tokens), inputs);
  const size_t b = k.linear_scratch(static_cast<int>(other_tokens), other_inputs);
  return arena.take<char>(a > b ? a : b);
}

// The pixels of one image of a batch.
struct Picture {
  const float* planes = nullptr;  // one of the two
  const uint8_t* bytes = nullptr;
  int channels = 0, height = 0, width = 0;  // of the data; zeros beyond
  const float* values = nullptr;            // [channels][256] of bytes
};

// -- the stem ---------------------------------------------------------------------------------------

struct Stem {
  bool is_pointwise = false;
  int in_chans = 0, half = 0, out = 0;  // padded, but for in_chans
  Matrix first, second;

  void make(const Tensors& tensors, Packer& pack, int in_chans, int width, bool is_pointwise);
  int reduced(int n) const { return is_pointwise ? n : ((n + 1) / 2 + 1) / 2; }
  size_t scratch(const Kernels& k, int width) const;
  // Rows [top, bottom) of `out` for an image of height by width, zeros included.
  void run(const Kernels& k, const Picture& image, int height, int width, const Map& out, int top,
           int bottom, char* scratch) const;
};

// -- MBConv and PatchMerging --------------------------------------------------------------------------

struct Bottleneck {
  int stride = 1, in = 0, hidden = 0, out = 0;  // channels, padded
  bool is_residual = false;  // MBConv: add the input and activate
  Matrix expand, project;
  Depthwise local;

  void make(const Tensors& tensors, Packer& pack, const std::string& name, int in, int out,
            int stride, bool is_residual);
  int reduced(int n) const { return (n - 1) / stride + 1; }
  static constexpr int kColumns = 64;  // outputs of a piece; its rows then stay in the cache
  size_t scratch(const Kernels& k) const;
  void run(const Kernels& k, const Map& in, const Map& out, int top, int bottom, int left,
           int right, char* scratch) const;
};

// -- TinyViTBlock ---------------------------------------------------------------------------------------

// A table of biases by distance, [heads][side * side], as rows that kernels can read in one run:
// [heads][x][2 side - 1][side], for a query in column x of the window and a key of each row (whose
// distance counts from -(side - 1)) and column; times log2(e).
std::vector<float> spread_biases(const float* table, int heads, int side);

struct TokenBlock {
  int channels = 0, padded = 0, heads = 0, width = 0, side = 0, hidden = 0;  // width: of a head
  Matrix qkv, proj, fc1, fc2;
  Depthwise local;
  float* bias = nullptr;    // see spread_biases
  char* padding = nullptr;  // q, k, v of a position outside the map: LayerNorm's bias through qkv

  void make(const Tensors& tensors, Packer& pack, const std::string& name, int dim, int num_heads,
            int window);
  int windows_at_once(const Kernels& k, int windows, int threads) const;
  size_t attend_scratch(const Kernels& k, int windows) const;
  // Windows [first, last) of window row `row`: x + attention(x).
  void attend(const Kernels& k, const Map& in, const Map& out, int row, int first, int last,
              char* scratch) const;
  size_t mix_scratch(const Kernels& k, int tokens) const;
  // A patch: y = local(in), y + mlp(y). `in` has a border.
  void mix(const Kernels& k, const Map& in, const Map& out, int top, int bottom, int left,
           int right, char* scratch) const;
};

// -- what follows the stages ------------------------------------------------------------------------------

// SAM's neck, or EfficientSAM3's head without its resize.
struct Ending {
  int kind = TINYVIT_END_NONE, channels = 0, padded = 0;
  Matrix reduce, conv;
  float *gamma[2] = {}, *beta[2] = {};

  void make(const Tensors& tensors, Packer& pack, int kind, int in);
  size_t scratch(const Kernels& k, int width) const;
  void reduce_row(const Kernels& k, const Map& in, const Map& out, int y, char* scratch) const;
  // Row y as floats, [width][padded].
  void conv_row(const Kernels& k, const Map& in, int y, float* out, char* scratch) const;
};

struct Head {
  bool is_there = false, has_linear = false;
  int channels = 0, outputs = 0;
  std::vector<float> gamma, beta;
  Matrix linear;  // for the fp32 kernels, whatever the precision of the maps

  void make(const Tensors& tensors, Packer& pack, int channels);
  size_t scratch(const Kernels& k, const Map& in) const;
  void run(const Kernels& maps, const Kernels& floats, const Map& in, float* out,
           char* scratch) const;
};

}  // namespace tinyvit
