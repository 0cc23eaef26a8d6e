// Masks in an image's own pixels: low-res logits are enlarged, compared and counted line by line.
//
// Segment Anything enlarges bilinearly twice, to the model's input and from there to the image. Along
// an axis both together are four weights for each pixel. Enlarged logits exist for one line only.
#pragma once
#include <vector>

#include "kernels.hpp"
#include "tinyvit.h"

namespace tinyvit {

// Both enlargements along one axis: pixel i is sum(weights[k][i] * logit[first[i] + k]).
struct Axis {
  static constexpr int kTaps = 4;
  int logits = 0, pixels = 0, padded = 0;  // padded: to whole vectors; the rest has no weight
  std::vector<int> first, last;            // logits that a pixel sees; both rise
  std::vector<float> weights;              // [kTaps][padded]

  Axis(int logits, int covered, int resized, int original);
  const float* weight(int tap) const { return &weights[static_cast<size_t>(tap) * padded]; }
  // Pixels [begin, end) that see any of the logits from `low` to `high`.
  void reach(int low, int high, int& begin, int& end) const;
};

// A mask as COCO's run lengths, column by column, and what is known of it.
struct Region {
  int prompt = 0, mask = 0;
  float score = 0, stability = 0;  // of no pixels: no number
  int box[4] = {0, 0, 0, 0};       // first and last pixels, x0, y0, x1, y1; of a mask without any: the offset
  uint64_t area = 0;
  std::vector<int64_t> counts;     // empty where it is not stable enough
};

// Logits [height][width] in an image: where they lie, and what is wanted.
class Enlarger {
 public:
  Enlarger(const Kernels* kernels, int height, int width, const tinyvit_placement& placement);
  // One of the two, [H][W]: 1 where logits exceed the threshold, or the logits.
  void enlarge(const float* logits, float threshold, uint8_t* mask, float* values) const;
  // The mask of a part of a larger image, as run lengths in that one.
  void find(const float* logits, const tinyvit_search& search, Region& region) const;

 private:
  const Kernels* k_;
  Axis rows_, columns_;
};

}  // namespace tinyvit
