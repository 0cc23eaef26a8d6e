// Masks in an image's own pixels; see masks.hpp.
#include "masks.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>

#include "error.hpp"
#include "weights.hpp"

namespace tinyvit {
namespace {

constexpr int kStep = 64;  // pixels of a line are taken in words of bits

// The two source pixels of a target pixel at half-pixel centres, and the share of the second.
struct Pair {
  int low, high;
  double part;
  Pair(int pixel, int source, int target) {
    const double at = std::max((pixel + 0.5) * (static_cast<double>(source) / target) - 0.5, 0.0);
    low = std::min(static_cast<int>(at), source - 1);
    high = std::min(low + 1, source - 1);
    part = std::min(std::max(at - low, 0.0), 1.0);
  }
};

// [rows][columns] -> [columns][pitch]
std::vector<float> turned(const float* from, int rows, int columns, int pitch) {
  std::vector<float> to(static_cast<size_t>(columns) * pitch + Axis::kTaps * 16, 0.0f);
  for (int y = 0; y < rows; y += 16)
    for (int x = 0; x < columns; ++x)
      for (int i = y; i < std::min(y + 16, rows); ++i)
        to[static_cast<size_t>(x) * pitch + i] = from[static_cast<size_t>(i) * columns + x];
  return to;
}

// Lines of logits, spread along one axis when first asked for. Pixels along the other rise, so four
// are held. Behind the last line are zeros.
class Lines {
 public:
  Lines(int length, std::function<void(int, float*)> spread)
      : length_(length), spread_(std::move(spread)), memory_(static_cast<size_t>(Axis::kTaps + 1) * std::max(length, 1), 0.0f) {}
  // The lines that a pixel of the other axis sees, by `weights`.
  const float* const* at(const Axis& axis, int pixel) {
    for (int k = 0; k < Axis::kTaps; ++k) {
      const int line = axis.first[pixel] + k, slot = line < axis.logits ? line % Axis::kTaps : Axis::kTaps;
      float* memory = &memory_[static_cast<size_t>(slot) * length_];
      if (slot < Axis::kTaps && held_[slot] != line) spread_(line, memory), held_[slot] = line;
      from_[k] = memory, weights[k] = axis.weight(k)[pixel];
    }
    return from_;
  }
  float weights[Axis::kTaps];

 private:
  size_t length_;
  std::function<void(int, float*)> spread_;
  std::vector<float> memory_;
  const float* from_[Axis::kTaps];
  int held_[Axis::kTaps] = {-1, -1, -1, -1};
};

}  // namespace

Axis::Axis(int logits, int covered, int resized, int original)
    : logits(logits), pixels(original), padded(round_up(original, kStep)) {
  if (covered < resized)
    throw Error(TINYVIT_INVALID, "logits cover " + std::to_string(covered) + " pixels and the image has " +
                                     std::to_string(resized) + " in the model's input; do they belong to it?");
  first.resize(padded), last.resize(padded), weights.assign(static_cast<size_t>(kTaps) * padded, 0.0f);
  for (int i = 0; i < pixels; ++i) {
    const Pair middle(i, resized, original);
    int seen[4];
    double parts[4];
    for (int m = 0; m < 2; ++m) {
      const Pair p(m ? middle.high : middle.low, logits, covered);
      const double share = m ? middle.part : 1 - middle.part;
      seen[2 * m] = p.low, parts[2 * m] = share * (1 - p.part);
      seen[2 * m + 1] = p.high, parts[2 * m + 1] = share * p.part;
    }
    int low = logits, high = -1;
    for (int k = 0; k < 4; ++k)
      if (parts[k] != 0) low = std::min(low, seen[k]), high = std::max(high, seen[k]);
    if (high - low >= kTaps) throw Error(TINYVIT_UNSUPPORTED, "logits must be no denser than pixels of the input");
    first[i] = low, last[i] = high;
    for (int k = 0; k < 4; ++k)
      if (parts[k] != 0) weights[static_cast<size_t>(seen[k] - low) * padded + i] += static_cast<float>(parts[k]);
  }
  for (int i = pixels; i < padded; ++i) first[i] = first[pixels - 1], last[i] = last[pixels - 1];
}

void Axis::reach(int low, int high, int& begin, int& end) const {
  begin = static_cast<int>(std::lower_bound(last.begin(), last.begin() + pixels, low) - last.begin());
  end = static_cast<int>(std::upper_bound(first.begin(), first.begin() + pixels, high) - first.begin());
  end = std::max(begin, end);
}

Enlarger::Enlarger(const Kernels* kernels, int height, int width, const tinyvit_placement& p)
    : k_(kernels),
      rows_(height, p.covered_height, p.resized_height, p.original_height),
      columns_(width, p.covered_width, p.resized_width, p.original_width) {}

void Enlarger::enlarge(const float* logits, float threshold, uint8_t* mask, float* values) const {
  const int width = columns_.logits, pitch = round_up(width, kStep) + kStep;
  const size_t pixels = columns_.pixels;
  std::vector<float> source(static_cast<size_t>(rows_.logits + Axis::kTaps) * pitch, 0.0f);
  for (int y = 0; y < rows_.logits; ++y)
    std::memcpy(&source[static_cast<size_t>(y) * pitch], logits + static_cast<size_t>(y) * width, width * sizeof(float));
  Lines lines(columns_.padded, [&](int row, float* to) {
    k_->expand(&source[static_cast<size_t>(row) * pitch], columns_.first.data(), columns_.weight(0), columns_.padded, to,
               columns_.padded);
  });
  std::vector<float> wide(mask ? 0 : columns_.padded);
  for (int y = 0; y < rows_.pixels; ++y) {
    const float* const* from = lines.at(rows_, y);
    if (mask) k_->mark(from, lines.weights, columns_.pixels, threshold, mask + y * pixels);
    else k_->blend(from, lines.weights, wide.data(), columns_.padded);
    if (values) std::memcpy(values + y * pixels, wide.data(), pixels * sizeof(float));
  }
}

void Enlarger::find(const float* logits, const tinyvit_search& s, Region& region) const {
  const int height = rows_.logits, width = columns_.logits, pitch = round_up(height, kStep) + kStep;
  // Only pixels that see a logit above the lowest threshold can be above it themselves.
  const float bounds[3] = {s.threshold, s.threshold + s.offset, s.threshold - s.offset};
  const float lowest = std::min(bounds[0], bounds[2]);
  int top = height, bottom = -1, left = width, right = -1;
  for (int y = 0; y < height; ++y) {
    const float* row = logits + static_cast<size_t>(y) * width;
    int x0 = 0, x1 = width - 1;
    while (x0 < width && !(row[x0] > lowest)) ++x0;
    if (x0 == width) continue;
    while (!(row[x1] > lowest)) --x1;
    top = std::min(top, y), bottom = y;
    left = std::min(left, x0), right = std::max(right, x1);
  }
  region.box[0] = s.left, region.box[1] = s.top, region.box[2] = s.left, region.box[3] = s.top;
  region.stability = std::numeric_limits<float>::quiet_NaN();
  int y0 = 0, y1 = 0, x0 = 0, x1 = 0;
  if (bottom >= 0) rows_.reach(top, bottom, y0, y1), columns_.reach(left, right, x0, x1);
  y0 = y0 / kStep * kStep;
  const int tall = std::min(round_up(y1, kStep), rows_.padded) - y0, words = tall / kStep;
  const std::vector<float> source = turned(logits, height, width, pitch);
  std::vector<float> high(std::max(tall, 1));
  std::vector<uint64_t> bits(static_cast<size_t>(words) * std::max(x1 - x0, 0)), other(std::max(words, 1));
  const uint64_t tail = rows_.pixels % kStep ? (uint64_t(1) << rows_.pixels % kStep) - 1 : ~uint64_t(0);
  const bool has_tail = y0 + tall > rows_.pixels;
  uint64_t sums[3] = {0, 0, 0};
  Lines lines(tall, [&](int column, float* to) {
    k_->expand(&source[static_cast<size_t>(column) * pitch], &rows_.first[y0], rows_.weight(0) + y0, rows_.padded, to, tall);
  });
  for (int x = x0; x < x1; ++x) {
    k_->blend(lines.at(columns_, x), lines.weights, high.data(), tall);
    uint64_t* column = &bits[static_cast<size_t>(x - x0) * words];
    for (int i = 0; i < 3; ++i) {
      uint64_t* to = i ? other.data() : column;
      k_->above(high.data(), tall, bounds[i], to);
      if (has_tail) to[words - 1] &= tail;
      for (int w = 0; w < words; ++w) sums[i] += __builtin_popcountll(to[w]);
    }
  }
  region.area = sums[0];
  if (sums[2]) region.stability = static_cast<float>(static_cast<double>(sums[1]) / static_cast<double>(sums[2]));
  if (s.min_stability > 0 && !(region.stability >= s.min_stability)) return;

  // Places where the mask begins or ends, in the order of columns; a run may go on in the next one.
  const int64_t whole = static_cast<int64_t>(s.frame_height) * s.frame_width;
  int64_t before = 0;
  bool is_on = false;
  int most_x = -1, least_x = x1, most_y = -1, least_y = rows_.pixels;
  const auto change = [&](int64_t at) {
    if (at == before && !region.counts.empty()) {  // ended at a column's foot, begins at the next one's head
      before -= region.counts.back();
      region.counts.pop_back();
    } else {
      region.counts.push_back(at - before), before = at;
    }
    is_on = !is_on;
  };
  for (int x = x0; x < x1; ++x) {
    const uint64_t* column = &bits[static_cast<size_t>(x - x0) * words];
    const int64_t start = static_cast<int64_t>(x + s.left) * s.frame_height + s.top + y0;
    uint64_t carry = 0;
    for (int w = 0; w < words; ++w) {
      const uint64_t word = column[w];
      for (uint64_t turns = word ^ (word << 1 | carry); turns; turns &= turns - 1) {
        const int y = w * kStep + __builtin_ctzll(turns);
        if (!is_on) least_y = std::min(least_y, y0 + y);
        else most_y = std::max(most_y, y0 + y - 1);
        change(start + y);
      }
      carry = word >> 63;
      if (word) least_x = std::min(least_x, x), most_x = x;
    }
    const int foot = std::min(tall, rows_.pixels - y0);
    if (is_on) most_y = std::max(most_y, y0 + foot - 1), change(start + foot);
  }
  if (before < whole || region.counts.empty()) region.counts.push_back(whole - before);
  if (most_x >= 0) {
    region.box[0] = s.left + least_x, region.box[1] = s.top + least_y;
    region.box[2] = s.left + most_x, region.box[3] = s.top + most_y;
  }
}

}  // namespace tinyvit
