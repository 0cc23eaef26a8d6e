// The network: its layers, the sizes of its maps, and the walk of a batch through it.
#pragma once
#include <mutex>

#include "layers.hpp"

namespace tinyvit {

struct Stage {
  int channels = 0, padded = 0;
  std::vector<Bottleneck> convs;   // of the first stage
  std::vector<TokenBlock> tokens;  // of the others
  bool has_merge = false;
  Bottleneck merge;
};

struct Size {
  int height, width;
};

// Everything about one image size that is not the pixels.
struct Plan {
  Size image{}, stem{};
  std::vector<Size> stages;
  Size embedding{};
  int embedding_channels = 0;
  size_t map_bytes = 0, bordered_bytes = 0, float_bytes = 0, scratch_bytes = 0;
  size_t image_bytes() const { return 2 * map_bytes + bordered_bytes + float_bytes; }
};

class Net {
 public:
  Net(const tinyvit_config& config, const Tensors& tensors);
  Plan plan(int height, int width) const;
  size_t workspace_bytes(const Plan& plan) const {
    return plan.image_bytes() + plan.scratch_bytes * pool_.threads();
  }
  // Throws Error where outputs ask for what the network or the workspace does not have.
  void check(const tinyvit_images& images, const tinyvit_outputs& outputs) const;
  void encode(const tinyvit_images& images, const tinyvit_outputs& outputs);
  void trim();
  void describe(tinyvit_info& info) const;
  void measure(const Plan& plan, tinyvit_sizes& sizes) const;
  int in_chans() const { return config_.in_chans; }

 private:
  struct Job;
  void run_image(const Job& job, int index, const Team& team, char* maps, char* scratch) const;
  Map run_stage(const Job& job, int s, Map in, Map spare, char* bordered, const Team& team,
                char* scratch) const;
  Map run_merge(const Job& job, const Bottleneck& b, const Map& in, char* to, const Team& team,
                char* scratch) const;
  void run_ending(const Job& job, int index, const Map& in, char* bordered, char* floats,
                  const Team& team, char* scratch) const;
  void give_map(const Job& job, const Map& map, int channels, int layout, float* to,
                const Team& team, char* scratch) const;

  tinyvit_config config_;
  const Kernels* kernels_;        // of the maps' precision
  const Kernels* float_kernels_;  // for what is fp32 in any case
  Packer pack_, float_pack_;
  Stem stem_;
  std::vector<Stage> stages_;
  Ending ending_;
  Head head_;
  Pool pool_;
  std::mutex mutex_;
  Block workspace_;
};

}  // namespace tinyvit
