// SAM's prompt encoder and mask decoder: prompts on an image's features become masks and scores.
#pragma once
#include <functional>
#include <memory>
#include <mutex>

#include "layers.hpp"
#include "masks.hpp"

namespace tinyvit {

// Image tokens [L][C] with their positions, shared by all prompts on an image.
struct ImageTokens {
  int height = 0, width = 0, channels = 0;
  Block tokens;  // features + the embedding of "no mask"
  std::vector<float> along, down;  // positions: sines and cosines of each column and row
  Block keys, queries;  // [L][inner] of the first block's attentions, the same for all prompts
  Block values;         // of each chunk as weights, or their parts
  int inner = 0;
  std::vector<float> detail;    // [4h][4w][C / 8], Light HQ-SAM's, of features and early map
  int count() const { return height * width; }
  size_t bytes() const {
    return (along.size() + down.size() + detail.size()) * sizeof(float) + tokens.bytes() + keys.bytes() + queries.bytes() + values.bytes();
  }
};

// Cross attention between few tokens and many image tokens. What multiplies image tokens is moved
// to the side of the few: q . (W k) = (W^T q) . k, and sum(p W v) = W sum(p v).
struct CrossAttention {
  int inner = 0;
  Matrix query, key, value, out;    // of the side that has few tokens: two of the first three
  std::vector<float> wide, bias;    // [inner][C] of what multiplies image tokens for the scores
  std::vector<float> wide_values;   // [inner][C]: value projection, or the output's transposed
  std::vector<float> value_bias, out_bias;
};

struct Norm {
  float *gamma = nullptr, *beta = nullptr;
};

struct TwoWayBlock {
  Matrix query, key, value, out, hidden, shrink;
  Norm norm1, norm2, norm3, norm4;
  CrossAttention to_image, to_tokens;
};

struct Mlp {
  std::vector<Matrix> layers;
};

// Four times the size in two steps.
struct Upscaling {
  Matrix first, second;
  Norm norm;
  int middle = 0, out = 0;
  bool activates = false;  // at the end too
};

class Decoder {
 public:
  Decoder(const tinyvit_decoder_config& config, const Tensors& tensors);
  ~Decoder();
  int channels() const { return channels_; }
  bool is_hq() const { return is_hq_; }
  int early_channels() const { return early_channels_; }
  int masks(bool multimask) const { return multimask && !is_hq_ ? num_masks_ - 1 : 1; }
  void prepare(const float* features, const float* early, int height, int width, ImageTokens& image) const;
  void decode(const ImageTokens& image, const tinyvit_prompts& prompts, float* logits,
              float* scores);
  std::vector<Region> find(const ImageTokens& image, const tinyvit_prompts& prompts,
                           const tinyvit_placement& placement, const tinyvit_search& search, float* scores);

 private:
  struct Space;
  struct Prompt;
  struct Update;
  typedef std::vector<float> Floats;

  Norm norm(const Tensors& tensors, const std::string& name, int channels);
  CrossAttention cross(const Tensors& tensors, const std::string& name, bool to_image);
  Mlp mlp(const Tensors& tensors, const std::string& name);
  Upscaling upscaling(const Tensors& tensors, const std::string& name, int in, int middle, bool activates);
  void load_hq(const Tensors& tensors);
  Floats linear(const Matrix& m, const Floats& in, int tokens) const;
  void normalize(Floats& rows, int tokens, const Norm& norm) const;
  Floats run_mlp(const Mlp& mlp, const float* in, int outputs) const;
  Floats position(double x, double y) const;
  Floats prompt_tokens(const tinyvit_prompts& prompts, int index) const;
  Floats self_attention(const TwoWayBlock& block, const Floats& placed, const Floats& tokens,
                        int count) const;
  Floats masked_tokens(const ImageTokens& image, const float* mask) const;
  // What a prompt's tokens become; p.own is then the image.
  Floats transform(const ImageTokens& image, const tinyvit_prompts& prompts, int index, Prompt& p) const;
  // Whether mask m of the prompt was wanted, for each.
  std::vector<bool> decode_one(const ImageTokens& image, const tinyvit_prompts& prompts, int index, const Team& team,
                               Space& space, float* logits, float* scores) const;
  void run(int count, const std::function<void(int, const Team&, Space&)>& work);
  Floats attend_image(const CrossAttention& a, const Floats& placed, int count, Prompt& prompt,
                      const Update* update) const;
  // The same in the first block, where the image is the same for all prompts.
  Floats attend_shared(const CrossAttention& a, const Floats& placed, int count, Prompt& prompt) const;
  void share(ImageTokens& image) const;
  Floats axis(int length, int whole, const float* frequencies) const;
  Matrix with_parts(Matrix m);
  void merge(const Prompt& prompt, int columns, int used, int width, Floats& total, Floats& sums) const;
  int group(int count) const;
  const float* place(const ImageTokens& image, const float* x, int first, int count, float* to) const;
  void attend_chunk(Prompt& prompt, const Update* update, const Matrix& scores, int used,
                    int chunk, int worker) const;
  void update_chunk(const Prompt& prompt, const Update& update, int first, int count, char* scratch,
                    float* x) const;
  void upscale_tokens(const Upscaling& u, const float* tokens, int count, float* between, float* out) const;
  // `map`: null, or where the upscaled tokens go too, [4h + 2][4w + 2][C / 8] with zeros around.
  void upscale(const Prompt& prompt, const float* filters, int masks, float* logits, float* map) const;
  void detail(const float* early, ImageTokens& image) const;
  void refine(const Prompt& prompt, const float* map, const Floats& filter, bool adds, float* logits) const;
  size_t scratch_bytes(int columns) const;

  tinyvit_decoder_config config_;
  const Kernels* k_;
  Packer pack_;
  int channels_ = 0, heads_ = 0, num_masks_ = 0;
  std::vector<TwoWayBlock> blocks_;
  CrossAttention last_;
  Matrix shared_key_, shared_value_, shared_query_;
  Norm last_norm_;
  Upscaling output_;
  Matrix mask3_;
  Mlp iou_head_;
  bool is_hq_ = false;
  int early_channels_ = 0;
  Upscaling from_early_, from_features_;
  Matrix fine1_;
  Norm fine_norm_;
  Floats fine2_, fine2_bias_;  // [C / 8][C / 4][3][3]
  Mlp hq_mlp_;
  std::vector<Mlp> hyper_;
  Floats own_tokens_, frequencies_, points_[4], no_point_, no_mask_;
  std::vector<Block> parts_;
  Floats mask1_, mask1_bias_, mask1_gamma_, mask1_beta_, mask2_, mask2_bias_, mask2_gamma_, mask2_beta_;
  Pool pool_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Space>> spaces_;
};

}  // namespace tinyvit
