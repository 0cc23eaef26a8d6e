// What decoding one prompt needs in between: memory, packed matrices, the pending change of the image.
#pragma once
#include <cmath>
#include <cstring>
#include <memory>

#include "decoder.hpp"

namespace tinyvit {

inline void add_to(std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
}

inline std::vector<float> sum_of(std::vector<float> a, const std::vector<float>& b) {
  add_to(a, b);
  return a;
}

// A matrix of weights that is made anew for each prompt.
struct Packed {
  Matrix matrix;
  int panel;
  std::vector<float> memory, bias;
  std::vector<uint16_t> parts;

  Packed(const Kernels& k, int inputs, int outputs) : panel(k.panel) {
    matrix.inputs = round_up(inputs, kChannelStep), matrix.outputs = round_up(outputs, kChannelStep);
    memory.assign(static_cast<size_t>(matrix.inputs) * matrix.outputs + 16, 0.0f);
    bias.assign(matrix.outputs, 0.0f);
    const size_t off = reinterpret_cast<uintptr_t>(memory.data()) % 64;
    matrix.panels = memory.data() + (off ? (64 - off) / sizeof(float) : 0);
    matrix.bias = bias.data();
  }
  Packed(const Packed&) = delete;
  // All weights are there; returns them.
  const Matrix& ready(const Kernels& k) {
    if (k.split) {
      parts.resize(2 * static_cast<size_t>(matrix.inputs) * matrix.outputs + 32);
      const size_t off = reinterpret_cast<uintptr_t>(parts.data()) % 64;
      uint16_t* to = parts.data() + (off ? (64 - off) / sizeof(uint16_t) : 0);
      k.split(matrix.panels, panel, static_cast<long>(panel) * matrix.inputs, matrix.inputs, matrix.inputs, matrix.outputs, to);
      matrix.parts = to;
    }
    return matrix;
  }
  float& at(int k, int n) {
    return matrix.panels[static_cast<size_t>(n / panel) * panel * matrix.inputs + static_cast<size_t>(k) * panel + n % panel];
  }
};

// Pointers to rows of floats.
struct Rows {
  std::vector<char*> at;
  Rows(float* first, int count, long step) : at(count) {
    for (int i = 0; i < count; ++i) at[i] = reinterpret_cast<char*>(first + i * step);
  }
};

inline const char* bytes(const float* p) { return reinterpret_cast<const char*>(p); }

// Where the result in this row and column of a token's 4x4 lies: in quarters, then their quarters.
inline int quarter(int row, int column) { return row / 2 * 8 + column / 2 * 4 + row % 2 * 2 + column % 2; }

// Image tokens are taken so many at a time; sums over chunks are added up in their order.
// 96: whole tiles of 12 rows and of 32 inputs.
constexpr int kChunk = 192, kUpscaled = 32;

struct Decoder::Space {
  Block image, scratch, partial, map;
  static char* grown(Block& b, size_t bytes) {
    if (b.bytes() < bytes) b = Block(bytes);
    return b.data();
  }
};

struct Decoder::Prompt {
  const ImageTokens& image;
  const Team& team;
  Space& space;
  const float* source;  // the image's tokens so far, [L][C]
  float* own;           // where changed ones go
  int count;            // tokens of the prompt
  size_t each = 0, partial_each = 0;

  int chunks() const { return (image.count() + kChunk - 1) / kChunk; }
  void reserve(int channels, size_t scratch_bytes, int columns) {
    own = reinterpret_cast<float*>(Space::grown(space.image, static_cast<size_t>(image.count()) * channels * sizeof(float)));
    each = scratch_bytes;
    Space::grown(space.scratch, each * team.threads());
    partial_each = static_cast<size_t>(columns) * (channels + 2);
    Space::grown(space.partial, partial_each * chunks() * sizeof(float));
  }
};

// Heads that share a panel of 32 columns where an image token has a projection for each head; column
// t * heads + h belongs to token t and head h of the group.
constexpr int kGroupColumns = 32;

// Weights of one group: projections [group * width] of an image token give its scores.
inline std::unique_ptr<Packed> grouped(const Kernels& k, const float* few, int pitch, int count, int heads, int width,
                                       float scale) {
  std::unique_ptr<Packed> to(new Packed(k, heads * width, kGroupColumns));
  for (int t = 0; t < count; ++t)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < width; ++i)
        to->at(h * width + i, t * heads + h) = scale * few[static_cast<size_t>(t) * pitch + h * width + i];
  to->ready(k);
  return to;
}

// What attention of the image to the tokens will change, applied when the image is read next:
// x + softmax((x + position) . scores) . values, normalised. Columns are [token][head], or those of
// groups in the first block, where the image's projections are there.
struct Decoder::Update {
  std::vector<std::unique_ptr<Packed>> scores;  // one for all, or one for each group
  Packed values;
  const Norm& norm;
  int count, heads, group, width;

  Update(const CrossAttention& a, const Norm& norm, const Kernels& k, const Floats& keys, const Floats& vs,
         int count, int heads, int channels, int group)
      : values(k, group ? heads / group * kGroupColumns : count * heads, channels), norm(norm), count(count),
        heads(heads), group(group), width(a.inner / heads) {
    const int padded = round_up(a.inner, kChannelStep);
    if (group) {
      const float scale = 1.44269504f / std::sqrt(static_cast<float>(width));
      for (int h = 0; h < heads; h += group)
        scores.push_back(grouped(k, &keys[static_cast<size_t>(h) * width], padded, count, group, width, scale));
    } else {
      scores.emplace_back(new Packed(k, channels, count * heads));
      spread(k, a, keys, *scores[0], count, heads, channels);
      scores[0]->ready(k);
    }
    std::vector<float> row(channels);
    for (int t = 0; t < count; ++t)
      for (int h = 0; h < heads; ++h) {
        std::fill(row.begin(), row.end(), 0.0f);
        for (int i = 0; i < width; ++i)
          k.add_scaled(&a.wide_values[static_cast<size_t>(h * width + i) * channels],
                       vs[static_cast<size_t>(t) * padded + h * width + i], row.data(), channels);
        const int column = group ? h / group * kGroupColumns + t * group + h % group : t * heads + h;
        // weights of a head sum to 1, so that each value brings its share of the bias
        for (int c = 0; c < channels; ++c) values.at(column, c) = row[c] + a.out_bias[c] / heads;
      }
    values.ready(k);
  }
  int columns() const { return values.matrix.inputs; }

  // The weights with which an image token gives its scores, one column for each token and head.
  static void spread(const Kernels& k, const CrossAttention& a, const Floats& few, Packed& to, int count, int heads,
                     int channels) {
    const int width = a.inner / heads, padded = round_up(a.inner, kChannelStep);
    std::vector<float> row(channels);
    for (int t = 0; t < count; ++t)
      for (int h = 0; h < heads; ++h) {
        std::fill(row.begin(), row.end(), 0.0f);
        float bias = 0;
        for (int i = 0; i < width; ++i) {
          const float q = few[static_cast<size_t>(t) * padded + h * width + i];
          k.add_scaled(&a.wide[static_cast<size_t>(h * width + i) * channels], q, row.data(), channels);
          bias += q * a.bias[h * width + i];
        }
        for (int c = 0; c < channels; ++c) to.at(c, t * heads + h) = row[c];
        to.bias[t * heads + h] = bias;
      }
  }
};

}  // namespace tinyvit
